"""What a run would do, without starting anything."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from rlhf_dist.config import Config, to_yaml
from rlhf_dist.driver.preparation import check_inputs, shares


def print_plan(config: Config, console: Console) -> None:
    """Check the inputs that can be checked without making anything, and print configuration and placement.

    Raises:
        RunError: an input cannot be used.
    """
    check_inputs(config)
    console.print(to_yaml(config), highlight=False, markup=False)
    node_cpus = os.cpu_count() or 1
    table = Table(title=f"Workers, for nodes of {node_cpus} CPUs", title_justify="left")
    for heading in ("role", "process", "workers", "CPUs each", "GPUs each", "threads each", "engine"):
        table.add_column(heading)
    engines = {
        "rollout": ("ray::RolloutWorker", "vLLM"),
        "scoring": ("ray::ScoringWorker", "transformers"),
        "learner": ("ray::LearnerWorker", f"DeepSpeed ZeRO-{config.learner.zero_stage}"),
    }
    for role, share in shares(config, node_cpus=node_cpus).items():
        process, engine = engines[role]
        cells = (share.num_workers, f"{share.cpus:g}", f"{share.gpus:g}", share.threads)
        table.add_row(role, process, *map(str, cells), engine)
    table.add_row("queue", "ray::ExperienceQueue", "1", "0", "0", "1", "Arrow by reference")
    console.print(table)
