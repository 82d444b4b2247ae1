"""The answer: exact or not, and how it reads: first the answer, then who is to blame and what to type, then details."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from gradaccum.auditing.culprits import Culprit
from gradaccum.checking.compare import BIASED, EQUAL, MISSING, ROUNDING, SCALED, ParameterVerdict
from gradaccum.errors import InexactError

_WIDTH = 80
_MOST_NAMES = 5
_MOST_SIZES = 8
_WORST_FIRST = (MISSING, BIASED, SCALED, ROUNDING, EQUAL)
HEADS = ("gradient", "parameters", "worst error", "ratio", "the worst of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Whether accumulation makes the whole batch's update; made by `audit`. ``print(report)`` is meant to be read.

    Attributes:
        exact: the gradient, and what forwards leave in the buffers, are the whole batch's up to rounding.
        relative_error: norm of the difference between the gradients over the norm of the whole batch's, in float64
            where that was possible.
        tolerance: what counts as rounding.
        culprits: what makes the difference, the worst first; empty if exact.
        parameters: a verdict for each parameter that is trained.
        samples: rows of the batch.
        micro_batch_sizes: how it was cut: ragged, since equal pieces hide what unequal ones show.
        equal_sizes_error: the relative error in micro-batches that are as equal as can be.
        dtype: what the comparison ran in.
        own_dtype: the model's own.
        own_error: in the model's own dtype, how far the accumulated gradient is off its exact value.
        own_whole_error: the same for the whole batch in one piece: what the dtype costs anyway.
        autocast: to which dtype the call of the audit stood under autocast, if it did; float64 is not cast.
        not_checked: what could not be looked at, and why.
        notes: what else there is to know.
    """

    exact: bool
    relative_error: float
    tolerance: float
    culprits: tuple[Culprit, ...]
    parameters: tuple[ParameterVerdict, ...]
    samples: int
    micro_batch_sizes: tuple[int, ...]
    equal_sizes_error: float
    dtype: str
    own_dtype: str
    own_error: float | None = None
    own_whole_error: float | None = None
    autocast: str | None = None
    not_checked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def raise_if_inexact(self) -> None:
        """Nothing if the accumulated update is the whole batch's; for tests, and before a long run.

        Raises:
            InexactError: it is not; the message is the report.
        """
        if not self.exact:
            raise InexactError(str(self))

    def __str__(self) -> str:
        # For a terminal of 80 columns or more; only qualified names may be longer.
        parts = [textwrap.fill(line, _WIDTH) for line in (answer(self), setting(self))]
        parts += [_explained(i, group) for i, group in enumerate(grouped(self.culprits), 1)]
        parts += [_table([HEADS, *parameter_cells(self)])]
        parts += [textwrap.fill(line, _WIDTH) for line in remarks(self)]
        return "\n\n".join(parts)


def answer(report: Report) -> str:
    """Returns the answer in a sentence."""
    if report.exact:
        return f"Exact: the accumulated gradient is the whole batch's, to {number(report.relative_error)}."
    if report.relative_error <= report.tolerance:
        if {culprit.kind for culprit in report.culprits} == {"precision"}:
            return f"Exact in {report.dtype}, and not in {report.own_dtype}, in which gradients are added up."
        return "Not exact: the gradient is the whole batch's, but what the update leaves in the model is not."
    return f"Not exact: the accumulated gradient is off by {percent(report.relative_error)} of the whole batch's."


def setting(report: Report) -> str:
    """Returns a sentence about what was compared."""
    count = len(report.micro_batch_sizes)
    shown = ", ".join(map(str, report.micro_batch_sizes[:_MOST_SIZES]))
    more = f", ... ({count} in all)" if count > _MOST_SIZES else ""
    why = " (uneven, since equal ones hide errors)" if len(set(report.micro_batch_sizes)) > 1 else ""
    return f"{report.samples} samples at once, against micro-batches of {shown}{more}{why}; in {report.dtype}."


def parameter_cells(report: Report) -> list[tuple[str, ...]]:
    """Returns a row for each verdict, with how many parameters it is of; see `HEADS`."""
    rows: list[tuple[str, ...]] = []
    for verdict in _WORST_FIRST:
        group = sorted((one for one in report.parameters if one.verdict == verdict), key=lambda one: -one.error)
        if group:
            rows.append((verdict, str(len(group)), number(group[0].error), _ratio(report, group), group[0].name))
    return rows


def _ratio(report: Report, group: Sequence[ParameterVerdict]) -> str:
    """How many times as large, and which count of the run that is."""
    if group[0].verdict not in (SCALED, BIASED):
        return "1" if group[0].verdict != MISSING else "-"
    low, high = min(one.ratio for one in group), max(one.ratio for one in group)
    if high - low > 1e-3 * abs(high):
        return f"{low:.3g} to {high:.3g}"
    count, samples = len(report.micro_batch_sizes), report.samples
    for number_of, words in ((count, "the number of micro-batches"), (samples, "the number of samples")):
        if abs(high - number_of) <= 1e-6 * number_of:
            return f"{high:.3f}, {words}"
        if abs(high * number_of - 1) <= 1e-6:
            return f"{high:.3f}, 1 / {words}"
    return f"{high:.3f}"


def grouped(culprits: Sequence[Culprit]) -> list[list[Culprit]]:
    """Returns groups of culprits of one kind and one remedy, in order."""
    found: dict[tuple[str, str], list[Culprit]] = {}
    for culprit in culprits:
        found.setdefault((culprit.kind, culprit.remedy), []).append(culprit)
    return list(found.values())


def remarks(report: Report) -> list[str]:
    """Returns lines about precision, notes, and what was not checked."""
    lines: list[str] = []
    if report.own_error is not None and report.own_whole_error is not None:
        under = f" under autocast to {report.autocast}" if report.autocast else ""
        lines.append(
            f"In {report.own_dtype}, the model's own dtype{under}: rounding moves the accumulated gradient by "
            f"{number(report.own_error)}, the whole batch's by {number(report.own_whole_error)}."
        )
    if not report.exact and report.equal_sizes_error <= report.tolerance < report.relative_error:
        lines.append("With micro-batches of equal size it would be exact: it is a short one that shows the difference.")
    lines += [f"Note: {note}" for note in report.notes]
    lines += [f"Not checked: {reason}" for reason in report.not_checked]
    return lines


def places(group: Sequence[Culprit]) -> list[str]:
    """Returns where the culprits of a group are, at most a few, and how many more."""
    which = [culprit.where for culprit in group]
    more = len(which) - _MOST_NAMES
    return [*which[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else [])]


def title(group: Sequence[Culprit]) -> str:
    """Returns the kind of a group of culprits, and how much the worst of them does alone."""
    worst = percent(max(culprit.error for culprit in group))
    return f"{group[0].kind}: {worst} by itself" + (", the worst of them" if len(group) > 1 else "")


def explanation(culprit: Culprit) -> list[tuple[str, str]]:
    """Returns what there is to say about a culprit, each with its head."""
    said = (("Why:", culprit.what), ("Type:", culprit.remedy), ("Tried:", culprit.tried), ("Price:", culprit.price))
    return [(head, text) for head, text in said if text]


def percent(error: float) -> str:
    """Formats a relative error as a percentage; very small ones as they are."""
    if error == float("inf"):
        return "all of it"
    return f"{100 * error:.3g}%" if error >= 1e-4 else number(error)


def number(error: float) -> str:
    """Formats an error."""
    return "0" if error == 0 else f"{error:.1e}" if error < 0.01 else f"{error:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    first, *others, last = zip(*rows, strict=True)
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    return "\n".join("  ".join(row) for row in zip(*columns, last, strict=True))


def _explained(position: int, group: Sequence[Culprit]) -> str:
    wrapper = textwrap.TextWrapper(_WIDTH, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
    lines = [f"{position}. {title(group)}"]
    lines += [f"   {'Where:' if i == 0 else '':6} {name}" for i, name in enumerate(places(group))]
    for head, text in explanation(group[0]):
        wrapper.initial_indent = f"   {head:6} "
        lines.append(wrapper.fill(text))
    return "\n".join(lines)
