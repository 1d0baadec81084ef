"""What is shown when a run is over: the table of first and last steps, and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_dist.observability.metrics import Metrics

WINDOW = 5
"""Steps that the first and the last column are means of."""
ROWS = {
    "reward_mean": "reward",
    "reward_std": "reward, standard deviation",
    "kl_ref": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "response_tokens_mean": "response tokens",
    "finished_share": "responses that ended by themselves",
    "policy_clip_fraction": "clip fraction",
    "explained_variance": "explained variance of the value model",
    "rollout_learner_gap_max": "largest gap, engine to learner, nats",
    "tokens_per_s": "response tokens a second",
    "seconds_step": "seconds a step",
}


def summary_table(metrics: Sequence[Metrics]) -> Table:
    """Means over the first and the last steps of a run."""
    width = max(1, min(WINDOW, len(metrics) // 2))
    table = Table(title=f"{len(metrics)} steps", title_justify="left")
    table.add_column("")
    table.add_column(f"first {width}", justify="right")
    table.add_column(f"last {width}", justify="right")
    parts = {
        name: name.replace("reward_part_", "reward: ")
        for name in metrics[0]
        if name.startswith("reward_part_")
    }
    for name, label in (ROWS | parts).items():
        if any(name in row for row in metrics):  # the first steps may warm up the value model only
            table.add_row(label, _mean(metrics[:width], name), _mean(metrics[-width:], name))
    return table


def print_report(
    console: Console,
    metrics: Sequence[Metrics],
    answers: Sequence[tuple[str, str, str]],
    *,
    policy_folder: Path,
    seconds: float,
) -> None:
    """Print the end of a run.

    Args:
        answers: (prompt, answer before, answer after) of each sample prompt.
    """
    console.print(summary_table(metrics))
    for prompt, before, after in answers:
        console.print(Text.assemble(("prompt  ", "bold"), _shortened(prompt)))
        console.print(Text.assemble(("before  ", "bold red"), _shortened(before)))
        console.print(Text.assemble(("after   ", "bold green"), _shortened(after)))
        console.print()
    console.print(f"trained policy: {policy_folder}   ({seconds:.0f} s)", highlight=False, soft_wrap=True)


def _mean(metrics: Sequence[Metrics], name: str) -> str:
    values = [row[name] for row in metrics if row.get(name) is not None]
    return f"{sum(values) / len(values):.4g}" if values else "-"


def _shortened(text: str, limit: int = 400) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= limit else one_line[:limit] + " …"
