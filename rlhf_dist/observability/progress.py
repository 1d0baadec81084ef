"""The run as it goes: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from rlhf_dist.observability.metrics import Metrics


class Progress:
    """Shows the step, the phase, the reward and the KL while the run works."""

    def __init__(self, console: Console, *, num_steps: int) -> None:
        self._console, self._num_steps = console, num_steps
        self._num_done, self._phase, self._latest = 0, "starting", ""
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=8, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """The run is now busy with `name`."""
        self._phase = name

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False)

    def step_done(self, metrics: Metrics) -> None:
        """A learner step of a training run is over."""
        kl = metrics.get("kl_ref")
        latest = f"reward {metrics['reward_mean']:.3f}" + (f"  KL {kl:z.4f}" if kl is not None else "")
        self.advance(metrics["step"] + 1, latest)
        self.say(
            f"step {self._num_done:>4}/{self._num_steps}  {self._latest}"
            f"  entropy {metrics['entropy']:.3f}"
            f"  length {metrics['response_tokens_mean']:.1f}"
            f"  {metrics['tokens_per_s']:.0f} tokens/s  {metrics['seconds_step']:.1f} s"
        )

    def advance(self, num_done: int, latest: str) -> None:
        """So many steps are over; `latest` is what is worth knowing of the last one."""
        self._num_done, self._latest = num_done, latest

    def _render(self) -> Table:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._num_steps, completed=self._num_done, width=30)
        line.add_row(self._spinner, f"{self._num_done}/{self._num_steps}", bar, self._phase, self._latest)
        return line
