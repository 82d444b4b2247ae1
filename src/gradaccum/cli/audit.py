"""``gradaccum audit``: a report of `gradaccum.audit` as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

import gradaccum as ga
from gradaccum.auditing import audit_report
from gradaccum.auditing.culprits import Culprit
from gradaccum.cli.page import Page, Section, show_page
from gradaccum.cli.target import load_job
from gradaccum.report.code_words import code_in
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
        title=Cell(text=f"{_TITLE} {target}", code=(target,)),
        table=_table(report),
        lead=Cell(text=audit_report.answer(report), tone=Tone.GOOD if report.exact else Tone.BAD),
        sections=(*_culprits(report, job.model), *_remarks(report)),
    )
    show_page(page, html)
    return report.exact


def _table(report: ga.Report) -> Table:
    rows: list[Row] = []
    for verdict, *numbers, _ in audit_report.parameter_cells(report):
        tone = Tone.BAD if verdict in _BAD else Tone.PLAIN
        rows.append(Row(label=verdict, cells=tuple(Cell(text=text, tone=tone) for text in numbers)))
    head, *columns, _ = audit_report.HEADS
    text = audit_report.setting(report)
    return Table(title=_TITLE, text=text, head=head, columns=tuple(columns), rows=tuple(rows))


def _culprits(report: ga.Report, model: nn.Module | Sequence[nn.Module]) -> Iterator[Section]:
    largest = max((culprit.error for culprit in report.culprits if culprit.error != float("inf")), default=0.0)
    layers = _layers(model)
    for i, group in enumerate(audit_report.grouped(report.culprits), start=1):
        fraction = min(max(culprit.error for culprit in group) / largest, 1.0) if largest else None
        heading = Cell(text=f"{i}. {audit_report.title(group)}", tone=Tone.BAD, fraction=fraction)
        said = [Cell(text=text, head=head, code=code_in(text)) for head, text in audit_report.explanation(group[0])]
        yield Section(heading=heading, paragraphs=(_where(group, layers), *said))


def _where(group: Sequence[Culprit], layers: Mapping[str, str]) -> Cell:
    """Where culprits are; a module with its class, since its name may be no more than a number."""
    places = audit_report.places(group)
    modules = {place: f"{place} ({layers[place]})" for place in places if place in layers}
    named = [f"module {modules[place]}" if place in modules else place for place in places]
    return Cell(text=", ".join(named), head="Where:", code=tuple(modules.values()))


def _layers(model: nn.Module | Sequence[nn.Module]) -> dict[str, str]:
    """The class of each module below the models, by its qualified name in a report."""
    models = [model] if isinstance(model, nn.Module) else list(model)
    prefixes = [""] if len(models) == 1 else [f"{i}." for i in range(len(models))]
    return {
        prefix + name: type(module).__name__
        for prefix, one in zip(prefixes, models, strict=True)
        for name, module in one.named_modules()
        if name
    }


def _remarks(report: ga.Report) -> Iterator[Section]:
    for line in audit_report.remarks(report):
        yield Section(paragraphs=(Cell(text=line, tone=Tone.QUIET, code=code_in(line)),))
