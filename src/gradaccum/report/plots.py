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
_MOST_TICKS = 8
_LIMITS = (1e-17, 1.0)  # of a logarithmic axis: from below float64's rounding to all wrong, the same in every panel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    color: str
    layer: int
    width: float = 0.0
    dashes: tuple[float, ...] = ()
    marker: str = ""
    marker_size: float = 6.0
    is_hollow: bool = False
    alpha: float = 1.0


class Mark(enum.Enum):
    """Whose a curve is. Widths fall in drawing order, so that curves on top of each other are all seen."""

    REFERENCE = _Style(color="#b6bec8", width=7.0, layer=2)
    BAD = _Style(color=ORANGE, width=3.6, layer=3)
    GOOD = _Style(color=BLUE, width=1.5, layer=4)
    BEST = _Style(color=BLUE, width=1.8, layer=4, dashes=(1, 1.2))
    TREND = _Style(color=PALE, width=3.0, layer=1)
    GOOD_POINT = _Style(color=BLUE, layer=5, marker="o")
    BAD_POINT = _Style(color=ORANGE, layer=5, marker="o")
    GOOD_GUESS = _Style(color=BLUE, layer=5, marker="o", is_hollow=True)
    BAD_GUESS = _Style(color=ORANGE, layer=5, marker="o", is_hollow=True)
    CHOSEN_POINT = _Style(color=BLUE, layer=4, marker="o", marker_size=12.0, alpha=0.3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve, or points; series of the same label share an entry in the legend, and those without have none."""

    mark: Mark
    values: tuple[float, ...]
    at: tuple[float, ...] = ()  # 1, 2, ... where it is left out
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn in it. A logarithmic one shows ``_LIMITS``, and what is less on its edge."""

    series: tuple[Series, ...]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    is_logarithmic: bool = False
    sizes: tuple[int, ...] = ()  # the ticks of a logarithmic x axis, above a y axis that begins at 0
    limit: tuple[float, str] | None = None  # a horizontal line, with its label


def draw(grid: Sequence[Sequence[Panel]], path: Path, *, title: str = "") -> None:
    """Draws rows of panels into a file of the kind its name ends in.

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
        place = "outside lower center" if title else "outside upper center"
        columns = max(1, len(entries))
        figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns, frameon=False, fontsize=11)
        if title:
            figure.suptitle(title, fontsize=11, color=INK)


def _draw_panel(axes: Axes, panel: Panel, *, with_y_label: bool) -> None:
    for series in panel.series:
        values = [max(value, _LIMITS[0]) for value in series.values] if panel.is_logarithmic else series.values
        style = series.mark.value
        axes.plot(
            series.at or range(1, len(values) + 1),
            values,
            label=series.label,
            color=style.color,
            linewidth=style.width,
            linestyle=(0, style.dashes) if style.dashes else "solid",
            solid_capstyle="round",
            zorder=style.layer,
            marker=style.marker,
            markersize=style.marker_size,
            markerfacecolor="white" if style.is_hollow else style.color,
            alpha=style.alpha,
        )
    if panel.limit is not None:
        value, label = panel.limit
        axes.axhline(value, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        at_left = axes.get_yaxis_transform()  # x in parts of the axes, y in data
        axes.text(0.02, value, label, transform=at_left, fontsize=8.5, color=ORANGE, verticalalignment="bottom")
    if panel.sizes:
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.sizes if len(panel.sizes) <= _MOST_TICKS else panel.sizes[len(panel.sizes) % 2 :: 2])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
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
