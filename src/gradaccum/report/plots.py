"""Curves in a picture, by matplotlib without its `pyplot`: that would keep global state, and may want a display."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradaccum.report.extras import extra_needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES_PER_PANEL = (4.2, 2.9)
_DOTS_PER_INCH = 160
_LIMITS = (1e-17, 1.0)  # of a logarithmic axis: from below float64's rounding to all wrong, the same in every panel
_INK = "#24292f"
_PALE = "#d0d7de"


class Mark(enum.Enum):
    """How a curve is drawn; its colour means the same in every panel, and survives colour blindness."""

    REFERENCE = enum.auto()
    BAD = enum.auto()
    GOOD = enum.auto()
    BEST = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    color: str
    width: float
    layer: int
    dashes: tuple[float, ...] = ()


_STYLES = {  # widths fall in drawing order, so that curves on top of each other are all seen
    Mark.REFERENCE: _Style(color="#b6bec8", width=7.0, layer=2),
    Mark.BAD: _Style(color="#e8590c", width=3.6, layer=3),
    Mark.GOOD: _Style(color="#0b57d0", width=1.5, layer=4),
    Mark.BEST: _Style(color="#0b57d0", width=1.8, layer=4, dashes=(1, 1.2)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: a value for each of 1, 2, ...; series of the same label share an entry in the legend."""

    label: str
    mark: Mark
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn in it. A logarithmic one shows ``_LIMITS``, and what is less on its edge."""

    series: tuple[Series, ...]
    title: str = ""
    subtitle: str = ""
    x_label: str = ""
    y_label: str = ""
    is_logarithmic: bool = False


def supported_suffixes() -> tuple[str, ...]:
    """How the name of a picture may end."""
    importlib.import_module("matplotlib")  # a picture that cannot be drawn is to be refused before the work
    return (".png", ".svg", ".pdf")


def draw(grid: Sequence[Sequence[Panel]], path: Path) -> None:
    """Draws rows of panels into a file.

    Panels in a row that share their unit show its name once; one legend serves all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with extra_needed("plot", "A picture"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    rows, columns = len(grid), len(grid[0])
    width, height = _INCHES_PER_PANEL
    with rc_context({"font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained", dpi=_DOTS_PER_INCH)
        all_axes = figure.subplots(rows, columns, squeeze=False)
        for row, panels in enumerate(grid):
            for column, panel in enumerate(panels):
                left = panels[column - 1].y_label if column else ""
                _draw_panel(all_axes[row, column], panel, with_y_label=panel.y_label != left)
        entries = {
            label: handle
            for axes in all_axes.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), frameon=False, fontsize=11
        )
        figure.savefig(path, facecolor="white")


def _draw_panel(axes: Axes, panel: Panel, *, with_y_label: bool) -> None:
    for series in panel.series:
        values = [max(value, _LIMITS[0]) for value in series.values] if panel.is_logarithmic else series.values
        style = _STYLES[series.mark]
        axes.plot(
            range(1, len(values) + 1),
            values,
            label=series.label,
            color=style.color,
            linewidth=style.width,
            linestyle=(0, style.dashes) if style.dashes else "solid",
            solid_capstyle="round",
            zorder=style.layer,
        )
    if panel.is_logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(*_LIMITS)
    axes.set_title(panel.title, fontsize=12, fontweight="bold", color=_INK, pad=22 if panel.subtitle else None)
    if panel.subtitle:
        axes.text(0.5, 1.04, panel.subtitle, transform=axes.transAxes, ha="center", fontsize=9.5, color=_INK)
    axes.set_xlabel(panel.x_label, color=_INK)
    if with_y_label:
        axes.set_ylabel(panel.y_label, color=_INK)
    axes.grid(axis="y", color=_PALE, linewidth=0.6)
    axes.tick_params(color=_PALE, labelcolor=_INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_PALE)
