"""The command: plan, show, judge."""

from __future__ import annotations

from pathlib import Path

import gradaccum as ga
from gradaccum.cli.target import load_job
from gradaccum.fit import plan_result as words
from gradaccum.fit.units import in_words
from gradaccum.report.html import Bar, Bars, Page, write_page
from gradaccum.report.tables import Cell, Row, Table, Tone, print_table, print_text
from gradaccum.report.terminal import console

_TITLE = "What fits"


def run_plan(target: str, *, memory: str | None, estimate: bool, device: str | None, html: Path | None) -> bool:
    """Plans a job, prints the plan, and writes the page if asked to.

    Returns:
        Whether any micro-batch fits.
    """
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
    own = _own_size(plan, job.micro_batch_size)
    terminal = console()
    print_table(terminal, _table(plan))
    print_text(terminal, words.memory(plan), Tone.QUIET)
    for note in plan.notes:
        print_text(terminal, f"Note: {note}", Tone.QUIET)
    terminal.print()
    print_text(terminal, plan.advice, _tone(plan))
    if own:
        print_text(terminal, own)
    if html is not None:
        write_page(_page(plan, target, own), html)
        print_text(terminal, f"Page: {html}", Tone.QUIET)
    return plan.micro_batch_size is not None


def _own_size(plan: ga.Plan, micro_batch_size: int | None) -> str:
    """What the size takes that the job has now."""
    if micro_batch_size is None:
        return ""
    peak = plan.peak_bytes(micro_batch_size)
    fits = plan.largest_micro_batch_size is not None and micro_batch_size <= plan.largest_micro_batch_size
    verdict = "fits" if fits else "does not fit"
    return f"The job's own micro_batch_size={micro_batch_size} takes {in_words(peak)} and {verdict}."


def _tone(plan: ga.Plan) -> Tone:
    return Tone.BAD if plan.micro_batch_size is None else Tone.GOOD


def _table(plan: ga.Plan) -> Table:
    rows: list[Row] = []
    for row in plan.rows:
        size, *rest = words.cells(plan, row)
        is_chosen = row.micro_batch_size == plan.micro_batch_size
        cells = [Cell(text=text) for text in rest]
        fits = words.HEADS.index("fits") - 1
        cells[fits] = Cell(text=rest[fits], tone=Tone.PLAIN if row.fits else Tone.BAD)
        if plan.micro_batch_size is not None:
            cells.append(Cell(text="take this" if is_chosen else "", tone=Tone.GOOD))
        rows.append(Row(label=size, cells=tuple(cells)))
    columns = (*words.HEADS[1:], *([] if plan.micro_batch_size is None else [""]))
    return Table(title=_TITLE, text=f"{words.title(plan)}.", columns=columns, rows=tuple(rows))


def _page(plan: ga.Plan, target: str, own: str) -> Page:
    largest = max(max(row.peak_bytes for row in plan.rows), plan.memory or 0)
    memory = Bars(
        title="Peak memory by samples in a micro-batch",
        bars=tuple(
            Bar(
                label=f"{row.micro_batch_size:,}",
                text=in_words(row.peak_bytes),
                fraction=row.peak_bytes / largest,
                tone=Tone.GOOD if row.fits else Tone.BAD,
            )
            for row in plan.rows
        ),
        limit=None if plan.memory is None else plan.memory / largest,
        limit_label="" if plan.memory is None else f"budget {in_words(plan.memory)}",
    )
    return Page(
        title=f"{_TITLE}: {target}",
        lead=Cell(text=plan.advice, tone=_tone(plan)),
        table=_table(plan),
        bars=(memory, *_throughput(plan)),
        paragraphs=(words.memory(plan), *([own] if own else []), *(f"Note: {note}" for note in plan.notes)),
        made_by=f"gradaccum {ga.__version__}",
    )


def _throughput(plan: ga.Plan) -> list[Bars]:
    rates = {row.micro_batch_size: row.samples_per_second for row in plan.rows if row.samples_per_second is not None}
    if not rates:
        return []
    bars = tuple(
        Bar(
            label=f"{size:,}",
            text=f"{rate:,.0f}",
            fraction=rate / max(rates.values()),
            tone=Tone.GOOD if size == plan.micro_batch_size else Tone.QUIET,
        )
        for size, rate in rates.items()
    )
    return [Bars(title="Samples a second", bars=bars)]
