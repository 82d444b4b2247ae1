"""``gradaccum plan``: a plan of `gradaccum.plan` as a page."""

from __future__ import annotations

from pathlib import Path

import gradaccum as ga
from gradaccum.cli.page import Page, show_page
from gradaccum.cli.target import load_job
from gradaccum.fit import plan_result as words
from gradaccum.fit.size_model import in_words
from gradaccum.report.terminal import Cell, Row, Table, Tone

_TITLE = "What fits"


def run_plan(target: str, *, memory: str | None, estimate: bool, device: str | None, html: Path | None) -> bool:
    """Plans a job and shows the plan; returns whether any micro-batch fits."""
    job = load_job(target)
    plan = ga.plan(
        job.model,
        job.loss_fn,
        job.batch,
        optimizer=job.optimizer,
        memory=memory,
        method="estimate" if estimate else "measure",
        forward=job.forward,
        batch_loss=job.batch_loss,
        device=device,
    )
    fits = plan.micro_batch_size is not None
    notes = (words.memory(plan), *(f"Note: {note}" for note in plan.notes))
    of_ways = [tuple(Cell(text=line.strip()) for line in words.ways(plan))] if words.ways(plan) else []
    page = Page(
        title=f"{_TITLE}: {target}",
        table=_table(plan),
        lead=Cell(text=plan.advice, tone=Tone.GOOD if fits else Tone.BAD),
        sections=(
            *of_ways,
            *_own_size(plan, job.micro_batch_size),
            tuple(Cell(text=note, tone=Tone.QUIET) for note in notes),
        ),
    )
    show_page(page, html)
    return fits


def _table(plan: ga.Plan) -> Table:
    most_bytes = max(max(row.peak_bytes for row in plan.rows), plan.memory or 0)
    fastest = max((row.samples_per_second or 0.0 for row in plan.rows), default=0.0)
    rows: list[Row] = []
    for row in plan.rows:
        tone, speed = Tone.PLAIN if row.fits else Tone.BAD, row.samples_per_second
        size, pieces, peak, fits, seconds, rate = words.cells(plan, row)
        cells = (
            Cell(text=pieces),
            Cell(text=peak, tone=tone, fraction=row.peak_bytes / most_bytes),
            Cell(text=fits, tone=tone),
            Cell(text=seconds),
            Cell(text=rate, fraction=None if speed is None else speed / fastest),
        )
        mark = Cell(text="take this" if row.micro_batch_size == plan.micro_batch_size else "", tone=Tone.GOOD)
        rows.append(Row(label=size, cells=cells if plan.micro_batch_size is None else (*cells, mark)))
    columns = (*words.HEADS[1:], *([] if plan.micro_batch_size is None else [""]))
    return Table(title=_TITLE, text=f"{words.title(plan)}.", columns=columns, rows=tuple(rows))


def _own_size(plan: ga.Plan, micro_batch_size: int | None) -> list[tuple[Cell]]:
    """A section about the size that the job has now, if it has one."""
    if micro_batch_size is None:
        return []
    fits = plan.largest_micro_batch_size is not None and micro_batch_size <= plan.largest_micro_batch_size
    peak, verdict = in_words(plan.peak_bytes(micro_batch_size)), "fits" if fits else "does not fit"
    return [(Cell(text=f"The job's own micro_batch_size={micro_batch_size} takes {peak} and {verdict}."),)]
