"""The answer of `plan`: rows of sizes, what memory is made of, which size to take, and all that in words."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from gradaccum.errors import WindowError
from gradaccum.fit.size_model import Curve, in_words
from gradaccum.fit.ways import FittingWay
from gradaccum.report.plots import Mark, Panel, Series, draw

_WIDTH = 80
_CURVE_POINTS = 100
_MOST_WAYS = 3
_X_LABEL = "samples in a micro-batch"
HEADS = ("micro-batch", "pieces", "peak", "fits", "seconds", "samples/s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One micro-batch size. Seconds and rates are None where nothing was timed."""

    micro_batch_size: int  # samples that one forward sees, at most
    micro_batches: int  # of an update
    peak_bytes: int  # the largest memory of an update: parameters, gradients and optimizer included
    is_measured: bool  # whether the peak was measured at this size; otherwise it is predicted from other sizes
    seconds: float | None  # median wall time of one micro-batch's forward and backward
    samples_per_second: float | None  # through forward and backward
    fits: bool  # whether the peak is within the budget, and the size did not run out of memory
    updates_per_epoch: int | None  # None where the size of the dataset is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What the peak is made of, in bytes.

    The first five do not depend on the size. Gradients and optimizer state are there all the time while a batch is
    accumulated, so they count in full.
    """

    parameters: int  # of models and optimizers
    buffers: int
    gradients: int  # of all parameters that get one
    optimizer_state: int  # after the first update
    optimizer_step: int  # what a step needs besides, while no activations are there
    activations_per_sample: int  # what one more sample adds, its inputs included
    temporaries: int  # at size 0: what backward needs for a moment, libraries, inputs that stay on the device

    @property
    def resident(self) -> int:
        """What is there at any size: parameters, buffers, gradients and optimizer state."""
        return self.parameters + self.buffers + self.gradients + self.optimizer_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an update takes at each micro-batch size; made by `plan`. ``print(plan)`` is meant to be read.

    Attributes:
        method: "measure" or "estimate": how it was found out.
        device: where, or for what.
        batch_size: rows of the batch.
        memory: the budget in bytes; None where there is none.
        micro_batch_size: the fastest that fits; where nothing was timed the largest; None where none fits.
        largest_micro_batch_size: the largest that fits; None where none does.
        rows: one for each size looked at, small ones first.
        breakdown: what the peak is made of.
        ways: every way that fits, those that cost least first: micro-batches alone, and with chunks of the head,
            recomputed blocks, activations on the host. Empty where the batch fits in one piece, or there is no budget.
        notes: what to know of how this came about.
    """

    method: str
    device: str
    batch_size: int
    memory: int | None
    micro_batch_size: int | None
    largest_micro_batch_size: int | None
    rows: tuple[Row, ...]
    breakdown: Breakdown
    ways: tuple[FittingWay, ...] = ()
    notes: tuple[str, ...] = ()
    _curve: Curve = field(repr=False)

    @property
    def whole_batch_fits(self) -> bool:
        """Whether the batch could run in one piece, so that nothing has to be accumulated."""
        return self.largest_micro_batch_size == self.batch_size

    @property
    def accumulation_helps(self) -> bool:
        """Whether the batch does not fit in one piece and does in several."""
        return self.micro_batch_size is not None and not self.whole_batch_fits

    @property
    def advice(self) -> str:
        """What to do, in a few sentences: nothing, take a size, or something else than accumulation."""
        if self.micro_batch_size is None:
            return f"{_nothing_fits(self)}{_first_way(self)}"
        return (_whole_fits if self.whole_batch_fits else _a_size_fits)(self, self.row(self.micro_batch_size))

    def peak_bytes(self, micro_batch_size: int) -> int:
        """The peak at any size, looked at or not: predicted from those that were.

        Below the batch's size gradients of other micro-batches wait meanwhile; from there on all is one piece.

        Raises:
            WindowError: the size is below 1.
        """
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise WindowError(
                f"peak_bytes({micro_batch_size!r}): a micro-batch has at least one sample. Pass its number of samples."
            )
        return self._curve.at(micro_batch_size)

    def row(self, micro_batch_size: int) -> Row:
        """The row of a size.

        Raises:
            KeyError: the size was not looked at.
        """
        for row in self.rows:
            if row.micro_batch_size == micro_batch_size:
                return row
        sizes = ", ".join(str(row.micro_batch_size) for row in self.rows)
        raise KeyError(f"no row of {micro_batch_size} samples; there are {sizes}. peak_bytes(n) predicts any size")

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws memory and throughput over the size, with the budget, into a file: .png, .svg or .pdf.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        draw([_panels(self)], Path(path), title=title(self))
        return Path(path)

    def __str__(self) -> str:
        rows = [HEADS, *(cells(self, row) for row in self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
        marks = ["", *("  <" if row.micro_batch_size == self.micro_batch_size else "" for row in self.rows)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + mark
            for row, mark in zip(rows, marks, strict=True)
        ]
        above, below = [memory(self), self.advice], [f"Note: {note}" for note in self.notes]
        filled = [[textwrap.fill(one, _WIDTH) for one in paragraphs] for paragraphs in (above, below)]
        found = ["\n".join(ways(self))] if ways(self) else []
        return "\n\n".join([title(self), "\n".join(lines), *filled[0], *found, *filled[1]])


def title(plan: Plan) -> str:
    """What was planned, where and how."""
    how = "measured on" if plan.method == "measure" else "estimated for"
    budget = "no budget" if plan.memory is None else f"budget {in_words(plan.memory)}"
    epoch = plan.rows[0].updates_per_epoch
    updates = "" if epoch is None else f", {epoch:,} update{'s' if epoch != 1 else ''} an epoch"
    return f"A batch of {plan.batch_size:,} samples, {how} {plan.device}, {budget}{updates}"


def cells(plan: Plan, row: Row) -> tuple[str, ...]:
    """A row of the table; a peak that is predicted where others are measured is marked with a tilde."""
    is_guess = plan.method == "measure" and not row.is_measured
    return (
        f"{row.micro_batch_size:,}",
        f"{row.micro_batches:,}",
        f"{'~' if is_guess else ''}{in_words(row.peak_bytes)}",
        "yes" if row.fits else "no",
        "-" if row.seconds is None else f"{row.seconds:.3g}",
        "-" if row.samples_per_second is None else _rate(row.samples_per_second),
    )


def memory(plan: Plan) -> str:
    """What the peak is made of."""
    parts = plan.breakdown
    names = ("parameters", "buffers", "gradients", "optimizer_state", "temporaries")
    sizes = {name.replace("_", " "): getattr(parts, name) for name in names}
    fixed = ", ".join(f"{name} {in_words(size)}" for name, size in sizes.items() if size > 0)
    step = f" The optimizer's step needs {in_words(parts.optimizer_step)} for a moment." if parts.optimizer_step else ""
    return f"Memory: {fixed}; and {in_words(parts.activations_per_sample)} a sample.{step}"


def ways(plan: Plan) -> list[str]:
    """The cheapest ways that fit, two lines each: what it costs, what to type; none where there is no choice."""
    best = list(plan.ways[:_MOST_WAYS])
    if len(best) < (1 if plan.micro_batch_size is None else 2):
        return []
    lines = [line for way in best for line in (_way(way, best[0]), f"    {way.line}")]
    return ["Ways that fit, the cheapest first:", *lines]


def _way(way: FittingWay, best: FittingWay) -> str:
    if way.seconds is not None:
        cost = f"{way.seconds:.3g} s an update, measured"
        if best.seconds and way is not best:
            cost += f", {way.seconds / best.seconds:.2f} of the first"
    elif way.work is not None:
        cost = f"estimated {way.work:.2f} of the time, by products"
    else:
        cost = "not timed"
    copies = ", and copies" if way.copies and way.seconds is None else ""
    return f"  {way.words}: {in_words(way.peak_bytes)}, {cost}{copies}"


def _first_way(plan: Plan) -> str:
    if not plan.ways:
        return ""
    way = next(iter(plan.ways))
    return f" The first way that fits is {way.words}, with {_of_budget(plan, way.peak_bytes)}: {way.line}"


def _a_size_fits(plan: Plan, chosen: Row) -> str:
    rate, largest = chosen.samples_per_second, plan.largest_micro_batch_size
    best, speed = ("largest", "") if rate is None else ("fastest", f", {_rate(rate)} samples a second")
    more = f" Up to {largest:,} samples fit." if largest is not None and largest > chosen.micro_batch_size else ""
    return (
        f"micro_batch_size={chosen.micro_batch_size} is the {best} that fits: {chosen.micro_batches:,} micro-batches "
        f"an update, {_of_budget(plan, chosen.peak_bytes)}{speed}.{more} In one piece the batch would take "
        f"{in_words(plan.peak_bytes(plan.batch_size))}."
    )


def _whole_fits(plan: Plan, chosen: Row) -> str:
    takes = _of_budget(plan, plan.peak_bytes(plan.batch_size))
    if plan.memory is None:
        start = f"No budget was given (memory='24GiB'). The whole batch of {plan.batch_size:,} takes {takes}"
    else:
        start = f"Accumulation is not needed: the whole batch of {plan.batch_size:,} fits, with {takes}"
    whole = next((row for row in plan.rows if row.micro_batch_size == plan.batch_size), chosen)
    if chosen is whole or not chosen.samples_per_second or not whole.samples_per_second:
        return f"{start}."
    gain = chosen.samples_per_second / whole.samples_per_second
    return (
        f"{start}. In micro-batches of {chosen.micro_batch_size:,} it is {gain:.2f} times as fast all the same, and "
        f"takes {in_words(chosen.peak_bytes)}."
    )


def _nothing_fits(plan: Plan) -> str:
    parts = plan.breakdown
    if plan.memory is not None and parts.resident > plan.memory:
        return (
            "Accumulation cannot help: parameters, gradients and optimizer state alone take "
            f"{in_words(parts.resident)} of {in_words(plan.memory)}, whatever the micro-batch size. What can: bf16 "
            "parameters (about half), LoRA (frozen weights have no gradient and no state), an optimizer with less "
            "state (SGD, Adafactor, 8-bit Adam), offloading the state to the host, sharding over devices."
        )
    if plan.memory is not None and parts.resident + parts.optimizer_step > plan.memory:
        return (
            f"Accumulation cannot help: the optimizer's step takes {in_words(parts.optimizer_step)} besides "
            f"{in_words(parts.resident)} of parameters, gradients and state, and the budget is "
            f"{in_words(plan.memory)}. Make the optimizer with fused=True or foreach=False, which need less at a time."
        )
    smallest = plan.rows[0]
    return (
        f"No size that was looked at fits: {smallest.micro_batch_size:,} "
        f"{'sample takes' if smallest.micro_batch_size == 1 else 'samples take'} "
        f"{_of_budget(plan, smallest.peak_bytes)}, {in_words(parts.resident)} of it parameters, gradients and "
        "optimizer state. Accumulation does not cut samples. What makes one smaller: activation checkpointing, bf16 "
        "autocast, shorter sequences, smaller images."
    )


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _of_budget(plan: Plan, peak: int) -> str:
    return in_words(peak) if plan.memory is None else f"{in_words(peak)} of {in_words(plan.memory)}"


def _panels(plan: Plan) -> list[Panel]:
    """Memory over the size, and throughput where it was timed."""
    most = max(row.peak_bytes for row in plan.rows)
    unit, scale = next((u, n) for u, n in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)) if most >= n)
    # The whole batch in one piece is apart: it has no gradients waiting, so the curve ends right before it.
    first, last = plan.rows[0].micro_batch_size, plan.rows[-1].micro_batch_size
    last = max(first, min(last, plan.batch_size - 1))
    curve = sorted({round(first * (last / first) ** (i / _CURVE_POINTS)) for i in range(_CURVE_POINTS + 1)})
    peaks = [Series(mark=Mark.TREND, at=tuple(curve), values=tuple(plan.peak_bytes(n) / scale for n in curve))]
    for row in plan.rows:
        is_guess = plan.method == "measure" and not row.is_measured
        good, bad = (Mark.GOOD_GUESS, Mark.BAD_GUESS) if is_guess else (Mark.GOOD_POINT, Mark.BAD_POINT)
        label = f"{'fits' if row.fits else 'does not fit'}{', predicted' if is_guess else ''}"
        mark, peak = good if row.fits else bad, row.peak_bytes / scale
        peaks.append(Series(mark=mark, at=(row.micro_batch_size,), values=(peak,), label=label))
    # A budget far above would leave the curve on the ground.
    limit = plan.memory if plan.memory is not None and plan.memory < 3 * most else None
    memory_panel = Panel(
        series=tuple(peaks),
        x_label=_X_LABEL,
        y_label=f"peak memory ({unit})",
        sizes=tuple(row.micro_batch_size for row in plan.rows),
        limit=None if limit is None else (limit / scale, f"budget {in_words(limit)}"),
    )
    rates = {row.micro_batch_size: row.samples_per_second for row in plan.rows if row.samples_per_second is not None}
    if not rates:
        return [memory_panel]
    sizes, values = tuple(rates), tuple(rates.values())
    speeds = [Series(mark=mark, at=sizes, values=values) for mark in (Mark.GOOD, Mark.GOOD_POINT)]
    if plan.micro_batch_size is not None:
        chosen = (plan.micro_batch_size,), (rates[plan.micro_batch_size],)
        speeds.append(Series(mark=Mark.CHOSEN_POINT, at=chosen[0], values=chosen[1], label="chosen"))
    return [memory_panel, Panel(series=tuple(speeds), x_label=_X_LABEL, y_label="samples a second", sizes=sizes)]
