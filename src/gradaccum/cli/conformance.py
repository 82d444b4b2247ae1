"""``gradaccum conformance``: trainers against the whole batch, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradaccum.cli.page import Page, Section, show_page
from gradaccum.cli.target import load_function
from gradaccum.conformance.verdicts import (
    KNOWN,
    Trainer,
    Verdict,
    figure,
    installed,
    judge_all,
    known,
    package_versions,
)
from gradaccum.report import extra_needed
from gradaccum.report.code_words import code_in
from gradaccum.report.terminal import Cell, Row, Table, Tone

_TITLE = "Does it train as the whole batch does?"
_TONES = {"exact": Tone.GOOD, "off": Tone.BAD, "error": Tone.BAD, "not offered": Tone.QUIET}


def run_conformance(adapter: str | None, *, html: Path | None) -> bool:
    """Runs one adapter, or all that are installed, and shows the verdicts; whether the one is exact."""
    trainers = installed() if adapter is None else [trainer_of(adapter)]
    verdicts = list(judge_all(trainers))
    show_page(_page(trainers, verdicts, is_one=adapter is not None, has_file=html is not None), html)
    return adapter is None or not _bad(verdicts)


def trainer_of(adapter: str) -> Trainer:
    """The trainer of a known name, or of a function that is named as targets are."""
    if adapter in KNOWN:
        with extra_needed("bench", f"The adapter {adapter}"):
            package = KNOWN[adapter].package
            if package is not None:
                __import__(package)
        return known(adapter)
    function = load_function(
        adapter,
        is_to=f"is train(model, optimizer, loss, batches, *, micro_batches, epochs). Known names: {', '.join(KNOWN)}",
    )
    place, _, name = adapter.rpartition(":")
    imports: tuple[str, ...] = (f"from {place} import {name} as train",)
    if place.endswith(".py"):
        imports = ("import runpy", f"train = runpy.run_path({place!r})[{name!r}]")
    return Trainer(title=name, function=function, imports=imports)


def _bad(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome in ("off", "error")]


def _page(trainers: Sequence[Trainer], verdicts: Sequence[Verdict], *, is_one: bool, has_file: bool) -> Page:
    by_scenario: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_scenario.setdefault(verdict.scenario, []).append(verdict)
    rows = tuple(
        Row(label=name, cells=tuple(Cell(text=figure(one), tone=_TONES[one.outcome]) for one in row))
        for name, row in by_scenario.items()
    )
    table = Table(
        title=_TITLE,
        text="How far trained parameters are from those of the whole batch in float64, relative to the way that these "
        "go; up to 1e-6 is rounding. '-': not offered; 'error': it raised one.",
        head="scenario",
        columns=tuple(trainer.title for trainer in trainers),
        rows=rows,
    )
    errors = tuple(_section(verdict) for verdict in _bad(verdicts))
    shown = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    installed_versions = Section(paragraphs=(Cell(text=f"Versions: {shown}.", tone=Tone.QUIET),))
    return Page(
        title=Cell(text=_TITLE),
        table=table,
        lead=_lead(trainers, verdicts, has_details=is_one or has_file),
        sections=(*(errors if is_one else ()), installed_versions),
        details=() if is_one else errors,
    )


def _section(verdict: Verdict) -> Section:
    text = str(verdict).removeprefix(f"{verdict.scenario}: ")
    return Section(
        heading=Cell(text=f"{verdict.trainer}: {verdict.scenario}", tone=Tone.BAD),
        paragraphs=(
            Cell(text=text, code=code_in(text)),
            Cell(text="\n".join(verdict.reproduction), tone=Tone.CODE),
        ),
    )


def _lead(trainers: Sequence[Trainer], verdicts: Sequence[Verdict], *, has_details: bool) -> Cell:
    counts: list[str] = []
    for trainer in trainers:
        own = [verdict for verdict in verdicts if verdict.trainer == trainer.title]
        tried = [verdict for verdict in own if verdict.outcome != "not offered"]
        exact = sum(verdict.outcome == "exact" for verdict in own)
        counts.append(f"{trainer.title} is exact in {exact} of {len(tried)}")
    more = "" if has_details else " Each error and its reproduction: --html FILE, or name one adapter."
    tone = Tone.PLAIN if len(trainers) > 1 else Tone.BAD if _bad(verdicts) else Tone.GOOD
    return Cell(text=f"{'; '.join(counts)}.{more}", tone=tone)
