"""A report in words: the answer first, then what is to blame and what to type, then the details."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradaccum.auditing.report import Culprit, Report
    from gradaccum.auditing.verdicts import ParameterVerdict

_WIDTH = 80
_MOST_NAMES = 5
_MOST_SIZES = 8
HEADS = ("gradient", "parameters", "worst error", "ratio", "the worst of them")


def text(report: Report) -> str:
    """All of a report, for a terminal of 80 columns or more; only qualified names may be longer."""
    parts = [_wrapped(answer(report)), _wrapped(setting(report))]
    parts += ["\n".join(_explained(i, group)) for i, group in enumerate(grouped(report.culprits), 1)]
    parts += [table([HEADS, *parameter_cells(report)])]
    parts += [_wrapped(line) for line in remarks(report)]
    return "\n\n".join(parts)


def answer(report: Report) -> str:
    """Yes or no, in a sentence."""
    if report.exact:
        return f"Exact: the accumulated gradient is the whole batch's, to {number(report.relative_error)}."
    if report.relative_error <= report.tolerance:
        kinds = sorted({culprit.kind for culprit in report.culprits})
        if kinds == ["precision"]:
            return f"Exact in {report.dtype}, and not in {report.own_dtype}, in which gradients are added up."
        return "Not exact: the gradient is the whole batch's, but what the update leaves in the model is not."
    return f"Not exact: the accumulated gradient is off by {percent(report.relative_error)} of the whole batch's."


def setting(report: Report) -> str:
    """What was compared."""
    count = len(report.micro_batch_sizes)
    shown = ", ".join(map(str, report.micro_batch_sizes[:_MOST_SIZES]))
    more = f", ... ({count} in all)" if count > _MOST_SIZES else ""
    return f"{report.samples} samples at once, against micro-batches of {shown}{more}; in {report.dtype}."


def parameter_cells(report: Report) -> list[tuple[str, ...]]:
    """A row for each verdict, with how many parameters it is of."""
    order = ["missing", "biased", "scaled", "rounding", "equal"]
    verdicts = sorted(report.parameters, key=lambda one: order.index(one.verdict))
    rows: list[tuple[str, ...]] = []
    for verdict, members in groupby(verdicts, key=lambda one: one.verdict):
        group = sorted(members, key=lambda one: -one.error)
        rows.append((verdict, str(len(group)), number(group[0].error), ratio(report, group), group[0].name))
    return rows


def ratio(report: Report, group: Sequence[ParameterVerdict]) -> str:
    """How many times as large, and which count of the run that is."""
    verdict = group[0].verdict
    if verdict not in ("scaled", "biased"):
        return "1" if verdict != "missing" else "-"
    low, high = min(one.ratio for one in group), max(one.ratio for one in group)
    if high - low > 1e-3 * abs(high):
        return f"{low:.3g} to {high:.3g}"
    return f"{high:.3f}{_named(report, high)}"


def grouped(culprits: Sequence[Culprit]) -> list[list[Culprit]]:
    """Culprits of one kind and one remedy together, in order."""
    found: dict[tuple[str, str], list[Culprit]] = {}
    for culprit in culprits:
        found.setdefault((culprit.kind, culprit.remedy), []).append(culprit)
    return list(found.values())


def remarks(report: Report) -> list[str]:
    """Precision, notes, and what was not checked."""
    lines: list[str] = []
    if report.own_error is not None and report.own_whole_error is not None:
        lines.append(
            f"In {report.own_dtype}, the model's own dtype: rounding moves the accumulated gradient by "
            f"{number(report.own_error)}, the whole batch's by {number(report.own_whole_error)}."
        )
    if not report.exact and report.equal_sizes_error <= report.tolerance < report.relative_error:
        lines.append("With micro-batches of equal size it would be exact: it is a short one that shows the difference.")
    lines += [f"Note: {note}" for note in report.notes]
    lines += [f"Not checked: {reason}" for reason in report.not_checked]
    return lines


def places(group: Sequence[Culprit]) -> list[str]:
    """Where they are, at most a few, and how many more."""
    which = [culprit.where for culprit in group]
    more = len(which) - _MOST_NAMES
    return [*which[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else [])]


def title(group: Sequence[Culprit]) -> str:
    """What it is, and what it does by itself."""
    worst = percent(max(culprit.error for culprit in group))
    return f"{group[0].kind}: {worst} by itself" + (", the worst of them" if len(group) > 1 else "")


def percent(error: float) -> str:
    """An error as a part of the whole."""
    if error == float("inf"):
        return "all of it"
    return f"{100 * error:.3g}%" if error >= 1e-4 else number(error)


def number(error: float) -> str:
    """A small number."""
    return "0" if error == 0 else f"{error:.1e}" if error < 0.01 else f"{error:.3g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        first, *numbers, last = row
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def _explained(position: int, group: Sequence[Culprit]) -> list[str]:
    first = group[0]
    where = "\n".join(f"   {'Where:' if i == 0 else '      '} {name}" for i, name in enumerate(places(group)))
    return [f"{position}. {title(group)}", where, _set_in("Why:   ", first.what), _set_in("Type:  ", first.remedy),
            _set_in("Price: ", first.price)]  # fmt: skip


def _set_in(head: str, paragraph: str) -> str:
    lines = textwrap.wrap(paragraph, _WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"   {head if i == 0 else ' ' * len(head)}{line}" for i, line in enumerate(lines))


def _named(report: Report, value: float) -> str:
    count, samples = len(report.micro_batch_sizes), report.samples
    known = {
        float(count): ", the number of micro-batches",
        1 / count: ", 1 / the number of micro-batches",
        float(samples): ", the number of samples",
        1 / samples: ", 1 / the number of samples",
    }
    return next((text for one, text in known.items() if abs(value - one) <= 1e-6 * one), "")


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH)
