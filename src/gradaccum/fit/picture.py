"""A plan in a picture: memory and throughput over the micro-batch size.

It is drawn here and not in `gradaccum.report`, which draws for the command line and lies above the tools: a plan that
could only be drawn from there would have no ``plot``. Matplotlib is imported when a picture is asked for, without its
`pyplot`, which would hold on to state and want a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradaccum.errors import MissingExtraError
from gradaccum.fit import plan_text as words
from gradaccum.fit.units import in_words

if TYPE_CHECKING:
    from gradaccum.fit.plan import Plan

_INK, _PALE = "#24292f", "#d0d7de"
_FITS, _TOO_MUCH = "#0b57d0", "#e8590c"  # told apart by the colour-blind too
_DOTS_PER_INCH = 160
_CURVE_POINTS = 100


def draw(plan: Plan, path: Path) -> Path:
    """Draws into a file of the kind its name ends in.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"A picture needs {error.name!r}, which is not installed. Type: pip install 'gradaccum[plot]'"
        ) from error
    timed = any(row.samples_per_second is not None for row in plan.rows)
    with rc_context({"font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(9.0 if timed else 4.8, 3.6), layout="constrained", dpi=_DOTS_PER_INCH)
        axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
        _draw_memory(axes[0], plan)
        if timed:
            _draw_throughput(axes[1], plan)
        for one in axes:
            _finish(one, plan)
        figure.suptitle(words.title(plan), fontsize=11, color=_INK)
        figure.savefig(path, facecolor="white")
    return path


def _draw_memory(axes: Any, plan: Plan) -> None:
    largest = max(row.peak_bytes for row in plan.rows)
    unit, scale = next((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)) if largest >= s)
    first, last = plan.rows[0].micro_batch_size, plan.rows[-1].micro_batch_size
    # The whole batch in one piece is apart: it has no gradients waiting, so the curve ends right before it.
    end = min(last, plan.batch_size - 1) if last > first else last
    steps = [first * (max(end, first) / first) ** (i / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)]
    sizes = sorted({round(step) for step in steps})
    axes.plot(sizes, [plan.peak_bytes(size) / scale for size in sizes], color=_PALE, linewidth=3, zorder=1)
    for row in plan.rows:
        axes.plot(
            row.micro_batch_size,
            row.peak_bytes / scale,
            marker="o",
            color=_FITS if row.fits else _TOO_MUCH,
            markerfacecolor=None if row.is_measured or plan.method == "estimate" else "white",
            zorder=2,
        )
    if plan.memory is not None and plan.memory < 3 * largest:  # a budget far above would leave the curve on the ground
        axes.axhline(plan.memory / scale, color=_TOO_MUCH, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"budget {in_words(plan.memory)}",
            (0.02, plan.memory / scale),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=_TOO_MUCH,
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"peak memory ({unit})", color=_INK)


def _draw_throughput(axes: Any, plan: Plan) -> None:
    rows = [row for row in plan.rows if row.samples_per_second is not None]
    sizes = [row.micro_batch_size for row in rows]
    axes.plot(sizes, [row.samples_per_second for row in rows], color=_FITS, marker="o", linewidth=1.5)
    for row in rows:
        if row.micro_batch_size == plan.micro_batch_size:
            axes.plot(row.micro_batch_size, row.samples_per_second, marker="o", markersize=12, color=_FITS, alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("samples a second", color=_INK)


def _finish(axes: Any, plan: Plan) -> None:
    axes.set_xscale("log", base=2)
    sizes = [row.micro_batch_size for row in plan.rows]
    axes.set_xticks(sizes if len(sizes) <= 8 else sizes[len(sizes) % 2 :: 2])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("samples in a micro-batch", color=_INK)
    axes.grid(axis="y", color=_PALE, linewidth=0.6)
    axes.tick_params(color=_PALE, labelcolor=_INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_PALE)
