"""Pictures of benches. Importing this needs matplotlib, which is in the extra `bench`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_dist.bench.curves import Curve

NUM_COLUMNS = 3
PANEL_INCHES = (3.2, 2.3)
DOTS_PER_INCH = 110
OWN, OTHERS = "#0072B2", "0.8"
"""One colour beside grey: told apart by everyone, and in print."""


def plot_curves(curves: Mapping[str, Sequence[Curve]], path: Path, *, reward: float) -> None:
    """Write a panel an algorithm: mean over seeds, band from worst to best seed; the others' means in grey.

    Args:
        curves: by algorithm, one a seed, all of the same steps; those without curves have an empty panel.
        reward: where a dotted line is drawn.
    """
    num_columns = min(NUM_COLUMNS, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for name, panel in zip(curves, panels, strict=False):
        panel.set_title(name)
        panel.axhline(reward, color="black", linewidth=0.8, linestyle=":")
        for other, of_other in curves.items():
            if other != name:
                _draw_mean(panel, of_other, color=OTHERS, linewidth=0.8)
        _draw_band(panel, curves[name])
        _draw_mean(panel, curves[name], color=OWN, linewidth=1.8)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(curves) - num_columns) : len(curves)]:
        panel.tick_params(labelbottom=True)
    figure.supxlabel("samples trained on")
    figure.supylabel("mean reward of a step")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_mean(panel: Axes, curves: Sequence[Curve], *, color: str, linewidth: float) -> None:
    if curves:
        panel.plot(
            curves[0].samples,
            [statistics.fmean(step) for step in _by_step(curves)],
            color=color,
            linewidth=linewidth,
        )


def _draw_band(panel: Axes, curves: Sequence[Curve]) -> None:
    if curves:
        steps = _by_step(curves)
        low, high = [min(step) for step in steps], [max(step) for step in steps]
        panel.fill_between(curves[0].samples, low, high, color=OWN, alpha=0.25, linewidth=0)


def _by_step(curves: Sequence[Curve]) -> list[tuple[float, ...]]:
    return list(zip(*(curve.rewards for curve in curves), strict=True))
