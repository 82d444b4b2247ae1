"""``gradaccum audit``: a report of `gradaccum.audit` as a page."""

from __future__ import annotations

from pathlib import Path

import gradaccum as ga
from gradaccum.auditing import audit_report
from gradaccum.cli.page import Page, show_page
from gradaccum.cli.target import load_job
from gradaccum.report.terminal import Cell, Row, Table, Tone

_TITLE = "Is it exact?"
_DEFAULT_SIZE = 8
_BAD = ("missing", "biased", "scaled")


def run_audit(target: str, *, micro_batch_size: int | None, html: Path | None) -> bool:
    """Audits a job and shows the report; returns whether accumulation is exact."""
    job = load_job(target)
    report = ga.audit(
        job.model,
        job.loss_fn,
        job.batch,
        micro_batch_size or job.micro_batch_size or _DEFAULT_SIZE,
        forward=job.forward,
        batch_loss=job.batch_loss,
        split=job.split,
        batch_norm=job.batch_norm,
    )
    page = Page(
        title=f"{_TITLE} {target}",
        table=_table(report),
        lead=Cell(text=audit_report.answer(report), tone=Tone.GOOD if report.exact else Tone.BAD),
        sections=_sections(report),
    )
    show_page(page, html)
    return report.exact


def _table(report: ga.Report) -> Table:
    rows: list[Row] = []
    for verdict, *numbers, _ in audit_report.parameter_cells(report):
        tone = Tone.BAD if verdict in _BAD else Tone.PLAIN
        rows.append(Row(label=verdict, cells=tuple(Cell(text=text, tone=tone) for text in numbers)))
    return Table(title=_TITLE, text=audit_report.setting(report), columns=audit_report.HEADS[1:-1], rows=tuple(rows))


def _sections(report: ga.Report) -> tuple[tuple[Cell, ...], ...]:
    largest = max((culprit.error for culprit in report.culprits if culprit.error != float("inf")), default=0.0)
    sections: list[tuple[Cell, ...]] = []
    for i, group in enumerate(audit_report.grouped(report.culprits), start=1):
        first = group[0]
        fraction = min(max(culprit.error for culprit in group) / largest, 1.0) if largest else None
        heading = Cell(text=f"{i}. {audit_report.title(group)}", tone=Tone.BAD, fraction=fraction)
        where = f"Where: {', '.join(audit_report.places(group))}"
        texts = (where, *(f"{head} {text}" for head, text in audit_report.explanation(first)))
        sections.append((heading, *(Cell(text=text) for text in texts)))
    return (*sections, *((Cell(text=line, tone=Tone.QUIET),) for line in audit_report.remarks(report)))
