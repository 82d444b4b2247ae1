"""``gradaccum plan``: a plan of `gradaccum.plan` as a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gradaccum as ga
from gradaccum.cli.page import Page, Section, show_page
from gradaccum.cli.target import load_job
from gradaccum.fit import plan_result as words
from gradaccum.fit.size_model import in_words
from gradaccum.report.code_words import code_in
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
    page = Page(
        title=Cell(text=f"{_TITLE}: {target}", code=(target,)),
        table=_table(plan),
        lead=Cell(text=plan.advice, tone=Tone.GOOD if fits else Tone.BAD, code=code_in(plan.advice)),
        sections=(*_ways(plan), *_own_size(plan, job.micro_batch_size), _notes(plan)),
    )
    show_page(page, html)
    return fits


def _table(plan: ga.Plan) -> Table:
    most_bytes = max(max(row.peak_bytes for row in plan.rows), plan.memory or 0)
    fastest = max((row.samples_per_second or 0.0 for row in plan.rows), default=0.0)
    is_timed = any(row.seconds is not None for row in plan.rows)
    shown = None if is_timed else -2  # without empty columns of seconds and rates
    rows: list[Row] = []
    for row in plan.rows:
        tone, speed = Tone.PLAIN if row.fits else Tone.BAD, row.samples_per_second
        size, pieces, peak, fits, seconds, rate = words.cells(plan, row)
        is_chosen = row.micro_batch_size == plan.micro_batch_size
        cells = (
            Cell(text=pieces),
            Cell(text=peak, tone=tone, fraction=row.peak_bytes / most_bytes),
            Cell(text=f"{fits}, take this", tone=Tone.GOOD) if is_chosen else Cell(text=fits, tone=tone),
            Cell(text=seconds),
            Cell(text=rate, fraction=None if speed is None else speed / fastest),
        )
        rows.append(Row(label=size, cells=cells[:shown]))
    head, *columns = words.HEADS
    text = f"{words.title(plan)}."
    return Table(title=_TITLE, text=text, head=head, columns=tuple(columns[:shown]), rows=tuple(rows))


def _ways(plan: ga.Plan) -> Iterator[Section]:
    """Lines of what each way costs, by turns with what to type for it."""
    lines = [line.strip() for line in words.ways(plan)]
    if lines:
        heading, *pairs = lines
        paragraphs = (Cell(text=line, code=(line,) if i % 2 else ()) for i, line in enumerate(pairs))
        yield Section(heading=Cell(text=heading), paragraphs=tuple(paragraphs))


def _notes(plan: ga.Plan) -> Section:
    lines = (words.memory(plan), *(f"Note: {note}" for note in plan.notes))
    return Section(paragraphs=tuple(Cell(text=line, tone=Tone.QUIET, code=code_in(line)) for line in lines))


def _own_size(plan: ga.Plan, micro_batch_size: int | None) -> Iterator[Section]:
    """A section about the size that the job has now, if it has one."""
    if micro_batch_size is not None:
        fits = plan.largest_micro_batch_size is not None and micro_batch_size <= plan.largest_micro_batch_size
        peak, verdict = in_words(plan.peak_bytes(micro_batch_size)), "fits" if fits else "does not fit"
        text = f"The job's own micro_batch_size={micro_batch_size} takes {peak} and {verdict}."
        yield Section(paragraphs=(Cell(text=text, code=code_in(text)),))
