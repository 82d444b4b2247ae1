"""The command: audit, show, judge."""

from __future__ import annotations

from pathlib import Path

import gradaccum as ga
from gradaccum.auditing import audit_report
from gradaccum.cli.target import load_job
from gradaccum.report.html import Bar, Bars, Page, write_page
from gradaccum.report.tables import Cell, Row, Table, Tone, print_table, print_text
from gradaccum.report.terminal import console

_TITLE = "Is it exact?"
_DEFAULT_SIZE = 8
_BAD = ("missing", "biased", "scaled")


def run_audit(target: str, *, micro_batch_size: int | None, html: Path | None) -> bool:
    """Audits a job, prints the report, and writes the page if asked to.

    Returns:
        Whether it is exact.
    """
    job = load_job(target)
    report = ga.audit(
        job.model,
        job.loss_fn,
        job.batch,
        micro_batch_size or job.micro_batch_size or _DEFAULT_SIZE,
        forward=job.forward,
        batch_loss=job.batch_loss,
    )
    terminal = console()
    print_table(terminal, _table(report))
    print_text(terminal, audit_report.answer(report), _tone(report))
    for i, group in enumerate(audit_report.grouped(report.culprits), start=1):
        terminal.print()
        print_text(terminal, f"{i}. {audit_report.title(group)}", Tone.BAD)
        for line in _explanation(group):
            print_text(terminal, line)
    for line in audit_report.remarks(report):
        terminal.print()
        print_text(terminal, line, Tone.QUIET)
    if html is not None:
        write_page(_page(report, target), html)
        print_text(terminal, f"Page: {html}", Tone.QUIET)
    return report.exact


def _tone(report: ga.Report) -> Tone:
    return Tone.GOOD if report.exact else Tone.BAD


def _explanation(group: list[ga.Culprit]) -> list[str]:
    first = group[0]
    return [
        f"Where: {', '.join(audit_report.places(group))}",
        f"Why: {first.what}",
        f"Type: {first.remedy}",
        f"Price: {first.price}",
    ]


def _table(report: ga.Report) -> Table:
    rows: list[Row] = []
    for verdict, *numbers, _ in audit_report.parameter_cells(report):
        tone = Tone.BAD if verdict in _BAD else Tone.PLAIN
        rows.append(Row(label=verdict, cells=tuple(Cell(text=text, tone=tone) for text in numbers)))
    return Table(title=_TITLE, text=audit_report.setting(report), columns=audit_report.HEADS[1:-1], rows=tuple(rows))


def _page(report: ga.Report, target: str) -> Page:
    groups = audit_report.grouped(report.culprits)
    largest = max((culprit.error for culprit in report.culprits if culprit.error != float("inf")), default=0.0)
    charts: tuple[Bars, ...] = ()
    if largest:
        bars = tuple(
            Bar(
                label=f"{culprit.kind}, {culprit.where}",
                text=audit_report.percent(culprit.error),
                fraction=min(culprit.error / largest, 1.0),
                tone=Tone.BAD,
            )
            for culprit in report.culprits
        )
        charts = (Bars(title="What each does to the gradient by itself", bars=bars),)
    paragraphs: list[str] = []
    for i, group in enumerate(groups, start=1):
        paragraphs += [f"{i}. {audit_report.title(group)}", *_explanation(group)]
    return Page(
        title=f"{_TITLE} {target}",
        lead=Cell(text=audit_report.answer(report), tone=_tone(report)),
        table=_table(report),
        bars=charts,
        paragraphs=(*paragraphs, *audit_report.remarks(report)),
        made_by=f"gradaccum {ga.__version__}",
    )
