"""Values over the micro-batch size, in pictures beside each other; the size is on a logarithmic axis.

By matplotlib without its `pyplot`: that would keep global state, and may want a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradaccum.report import extra_needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE = "#24292f", "#d0d7de"
_GOOD, _BAD = "#0b57d0", "#e8590c"  # told apart by the colour-blind too
_DOTS_PER_INCH = 160
_MOST_TICKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The value at one size. Its marker is hollow where nothing was measured, and has a halo where it is chosen."""

    size: int
    value: float
    is_good: bool = True
    is_hollow: bool = False
    is_chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SizePlot:
    """One pair of axes.

    Attributes:
        y_label: what the values are, and their unit.
        points: small sizes first.
        curve: sizes and values of the line; through the points, where there is none.
        limit: a horizontal line, with its label.
    """

    y_label: str
    points: tuple[Point, ...]
    curve: tuple[tuple[float, float], ...] = ()
    limit: tuple[float, str] | None = None


def draw_size_plots(plots: Sequence[SizePlot], path: Path, *, title: str) -> None:
    """Draws plots into a file of the kind its name ends in.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with extra_needed("plot", "A picture"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(0.6 + 4.2 * len(plots), 3.6), layout="constrained", dpi=_DOTS_PER_INCH)
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            _draw(axes, plot)
            _finish(axes, plot)
        figure.suptitle(title, fontsize=11, color=_INK)
        figure.savefig(path, facecolor="white")


def _draw(axes: Axes, plot: SizePlot) -> None:
    if plot.curve:
        axes.plot(*zip(*plot.curve, strict=True), color=_PALE, linewidth=3, zorder=1)
    else:
        axes.plot([p.size for p in plot.points], [p.value for p in plot.points], color=_GOOD, linewidth=1.5, zorder=1)
    for point in plot.points:
        color = _GOOD if point.is_good else _BAD
        face = "white" if point.is_hollow else color
        axes.plot(point.size, point.value, marker="o", color=color, markerfacecolor=face, zorder=2)
        if point.is_chosen:
            axes.plot(point.size, point.value, marker="o", markersize=12, color=color, alpha=0.3)
    if plot.limit is not None:
        value, label = plot.limit
        axes.axhline(value, color=_BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            label,
            (0.02, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=_BAD,
        )


def _finish(axes: Axes, plot: SizePlot) -> None:
    axes.set_ylim(bottom=0)
    axes.set_ylabel(plot.y_label, color=_INK)
    axes.set_xscale("log", base=2)
    sizes = [point.size for point in plot.points]
    axes.set_xticks(sizes if len(sizes) <= _MOST_TICKS else sizes[len(sizes) % 2 :: 2])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("samples in a micro-batch", color=_INK)
    axes.grid(axis="y", color=_PALE, linewidth=0.6)
    axes.tick_params(color=_PALE, labelcolor=_INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_PALE)
