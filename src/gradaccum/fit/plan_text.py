"""A plan in words: a table in plain text, and what to do."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from gradaccum.fit.units import in_words

if TYPE_CHECKING:
    from gradaccum.fit.plan import Plan, Row

_WIDTH = 80
HEADS = ("micro-batch", "pieces", "peak", "fits", "seconds", "samples/s")


def text(plan: Plan) -> str:
    """All of a plan, for a terminal of 80 columns or more."""
    rows = [HEADS, *(cells(plan, row) for row in plan.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + _mark(plan, number)
        for number, row in enumerate(rows, start=-1)
    ]
    parts = [title(plan), "\n".join(lines), _wrapped(memory(plan)), _wrapped(advice(plan))]
    parts += [_wrapped(f"Note: {note}") for note in plan.notes]
    return "\n\n".join(parts)


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
    named = {
        "parameters": parts.parameters,
        "buffers": parts.buffers,
        "gradients": parts.gradients,
        "optimizer state": parts.optimizer_state,
        "temporaries": parts.temporaries,
    }
    fixed = ", ".join(f"{name} {in_words(size)}" for name, size in named.items() if size > 0)
    step = f" The optimizer's step needs {in_words(parts.optimizer_step)} for a moment." if parts.optimizer_step else ""
    return f"Memory: {fixed}; and {in_words(parts.activations_per_sample)} a sample.{step}"


def advice(plan: Plan) -> str:
    """What to do: nothing, take a size, or something else than accumulation."""
    if plan.micro_batch_size is None:
        return _nothing_fits(plan)
    if plan.whole_batch_fits:
        return _whole_fits(plan)
    chosen = plan.row(plan.micro_batch_size)
    timed = chosen.samples_per_second is not None
    speed = "" if chosen.samples_per_second is None else f", {_rate(chosen.samples_per_second)} samples a second"
    largest = plan.largest_micro_batch_size
    more = f" Up to {largest:,} samples fit." if largest is not None and largest > plan.micro_batch_size else ""
    whole = plan.peak_bytes(plan.batch_size)
    return (
        f"micro_batch_size={plan.micro_batch_size} is the {'fastest' if timed else 'largest'} that fits: "
        f"{_pieces(chosen)} an update, {_of_budget(plan, chosen.peak_bytes)}{speed}.{more} In one piece the batch "
        f"would take {in_words(whole)}."
    )


def _whole_fits(plan: Plan) -> str:
    peak = plan.row(plan.batch_size).peak_bytes if plan.rows[-1].micro_batch_size == plan.batch_size else 0
    takes = _of_budget(plan, peak or plan.peak_bytes(plan.batch_size))
    if plan.memory is None:
        start = f"No budget was given (memory='24GiB'). The whole batch of {plan.batch_size:,} takes {takes}"
    else:
        start = f"Accumulation is not needed: the whole batch of {plan.batch_size:,} fits, with {takes}"
    assert plan.micro_batch_size is not None
    chosen = plan.row(plan.micro_batch_size)
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


def _pieces(row: Row) -> str:
    return f"{row.micro_batches:,} micro-batch{'es' if row.micro_batches != 1 else ''}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _of_budget(plan: Plan, peak: int) -> str:
    return in_words(peak) if plan.memory is None else f"{in_words(peak)} of {in_words(plan.memory)}"


def _mark(plan: Plan, number: int) -> str:
    is_chosen = number >= 0 and plan.rows[number].micro_batch_size == plan.micro_batch_size
    return "  <" if is_chosen else ""


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH)
