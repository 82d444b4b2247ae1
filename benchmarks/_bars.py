"""Ratios in a picture: bars that begin at 1, to the left where time is saved and to the right where it is spent.

The axis is logarithmic, so that half the time and twice the time are bars of one length. Every bar has its name and its
number beside it, so that colours only repeat what is written.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradaccum.report.plots import BLUE, GREY, INK, ORANGE, finish_axes, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _INCHES_PER_LINE, _INCHES_BESIDES = 7.6, 0.235, 0.9
_TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
_ROOM_FOR_NUMBERS = 1.18  # beyond the longest bars, as a factor
_LEAST_REACH = 1.5  # what the axis shows on either side of 1 at least


class Role(enum.Enum):
    """Whose a bar is; the value is its colour."""

    OURS = BLUE
    PEER = ORANGE
    REFERENCE = GREY


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One thing that was timed, as a multiple of what all in its picture are compared with."""

    label: str
    ratio: float
    role: Role = Role.OURS


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Bars of one job, under its name."""

    title: str
    bars: tuple[Bar, ...]


def draw_ratios(groups: Sequence[Group], path: Path, *, title: str, base: str) -> None:
    """Draws groups of bars into a file, from top to bottom.

    Args:
        groups: one or more, each of one bar or more.
        path: ends in .png, .svg or .pdf.
        title: of the picture.
        base: what 1 is, in a word or two.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    lines = sum(len(group.bars) for group in groups) + 1.6 * len(groups)
    height = lines * _INCHES_PER_LINE + _INCHES_BESIDES
    with new_picture(path, width=_WIDTH, height=height, font_size=9) as figure:
        axes = figure.subplots()
        _draw_groups(axes, groups)
        _draw_axis(axes, [bar.ratio for group in groups for bar in group.bars], base)
        figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)


def _draw_groups(axes: Axes, groups: Sequence[Group]) -> None:
    line, places, names = 0.0, list[float](), list[str]()
    for group in groups:
        line += 0.6 if line else 0.0
        axes.text(
            0,
            line,
            group.title,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontweight="bold",
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # no line of the grid goes through it
        )
        for bar in group.bars:
            line += 1
            places.append(line)
            names.append(bar.label)
            axes.barh(line, bar.ratio - 1, left=1, height=0.68, color=bar.role.value, zorder=3)
            is_longer = bar.ratio >= 1
            axes.annotate(
                f"{bar.ratio:.2f}",
                (bar.ratio, line),
                xytext=(4 if is_longer else -4, 0),
                textcoords="offset points",
                ha="left" if is_longer else "right",
                va="center",
                color=INK,
            )
        line += 1
    axes.set_yticks(places, names, color=INK)
    axes.set_ylim(line - 0.4, -0.7)


def _draw_axis(axes: Axes, ratios: Sequence[float], base: str) -> None:
    low = min(*ratios, 1 / _LEAST_REACH) / _ROOM_FOR_NUMBERS
    high = max(*ratios, _LEAST_REACH) * _ROOM_FOR_NUMBERS
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    shown = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown], color=INK)
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1, zorder=4)
    axes.set_xlabel(f"time, as a multiple of the {base}'s (1.00): bars to the left save time", color=INK)
    finish_axes(axes, grid="x")
    axes.tick_params(length=0)
