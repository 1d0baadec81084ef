"""What a run would do, without starting anything."""

from __future__ import annotations

import os

from rich.console import Console

from rlhf_dist.config import Config, to_yaml
from rlhf_dist.driver.preparation import check_inputs, check_sources, shares


def print_plan(config: Config, console: Console) -> None:
    """Check the inputs that can be checked without making anything, and print configuration and placement.

    Rows of data are not read, and names of data sets are not looked up. The model of a built-in task is not
    made, so `learner.lora.target_modules` are not checked against it.

    Raises:
        RunError: an input cannot be used.
    """
    check_sources(config)
    check_inputs(config)
    console.print(to_yaml(config), highlight=False, markup=False)
    node_cpus = os.cpu_count() or 1
    console.print(f"Workers, for nodes of {node_cpus} CPUs:", highlight=False)
    engines = {
        "rollout": ("ray::RolloutWorker", "vLLM"),
        "scoring": ("ray::ScoringWorker", "transformers"),
        "learner": ("ray::LearnerWorker", f"DeepSpeed ZeRO-{config.learner.zero_stage}"),
    }
    for role, share in shares(config, node_cpus=node_cpus).items():
        process, engine = engines[role]
        console.print(
            f"  {share.num_workers} x {process}  {engine}: {share.cpus:g} CPUs, {share.gpus:g} GPUs, "
            f"{share.threads} threads each",
            highlight=False,
        )
    console.print("  1 x ray::ExperienceQueue  references only", highlight=False)
