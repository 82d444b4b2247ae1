"""Curves in a picture, by matplotlib without its `pyplot`: that would keep global state, and may want a display."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradaccum.report import extra_needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE = "#24292f", "#d0d7de"
BLUE, ORANGE, GREY = "#0b57d0", "#e8590c", "#8b949e"  # told apart by the colour-blind too

SUFFIXES = (".png", ".svg", ".pdf")  # how the name of a picture may end
_INCHES_PER_PANEL = (4.2, 2.9)
_DOTS_PER_INCH = 160
_LIMITS = (1e-17, 1.0)  # of a logarithmic axis: from below float64's rounding to all wrong, the same in every panel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    color: str
    width: float
    layer: int
    dashes: tuple[float, ...] = ()


class Mark(enum.Enum):
    """Whose a curve is. Widths fall in drawing order, so that curves on top of each other are all seen."""

    REFERENCE = _Style(color="#b6bec8", width=7.0, layer=2)
    BAD = _Style(color=ORANGE, width=3.6, layer=3)
    GOOD = _Style(color=BLUE, width=1.5, layer=4)
    BEST = _Style(color=BLUE, width=1.8, layer=4, dashes=(1, 1.2))


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
    x_label: str = ""
    y_label: str = ""
    is_logarithmic: bool = False


def draw(grid: Sequence[Sequence[Panel]], path: Path) -> None:
    """Draws rows of panels into a file.

    Panels in a row that share their unit show its name once; one legend serves all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows, columns = len(grid), len(grid[0])
    width, height = _INCHES_PER_PANEL
    with new_picture(path, width=width * columns, height=height * rows + 0.4) as figure:
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


def _draw_panel(axes: Axes, panel: Panel, *, with_y_label: bool) -> None:
    for series in panel.series:
        values = [max(value, _LIMITS[0]) for value in series.values] if panel.is_logarithmic else series.values
        style = series.mark.value
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
    axes.set_title(panel.title, fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(panel.x_label, color=INK)
    if with_y_label:
        axes.set_ylabel(panel.y_label, color=INK)
    finish_axes(axes, grid="y")


@contextmanager
def new_picture(path: Path, *, width: float, height: float, font_size: float = 10) -> Iterator[Figure]:
    """Context manager that yields an empty figure of that many inches, and at the end writes it into ``path``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with extra_needed("plot", "A picture"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    with rc_context({"font.size": font_size, "svg.fonttype": "path"}):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=_DOTS_PER_INCH)
        yield figure
        figure.savefig(path, facecolor="white")


def finish_axes(axes: Axes, *, grid: str) -> None:
    """Leaves of the frame only the bottom, and draws pale lines across the axis ``grid``, ``"x"`` or ``"y"``."""
    axes.grid(axis=grid, color=PALE, linewidth=0.6)  # type: ignore[arg-type]
    axes.tick_params(color=PALE, labelcolor=INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
