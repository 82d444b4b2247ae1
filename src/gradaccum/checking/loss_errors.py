"""The error for a loss that does not add up: the numbers of whole and pieces, what the loss is, and what to type."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradaccum.checking.adding_up import Cut, Difference, as_value, declared_difference, declared_shares, made_value
from gradaccum.checking.remedies import Diagnosis
from gradaccum.checking.root_runs import MEAN, PLAIN, PLAIN_SUM, SUM, Run
from gradaccum.errors import LossError, MeanError

_TAKEN = {
    PLAIN: "a mean over samples",
    MEAN: "a mean over the count that it was returned with",
    SUM: "a sum over the count that it was returned with",
    PLAIN_SUM: "a sum",
}
_OF_MEANS = ("sum", "weight", "terms")


def loss_error(whole: Run, parts: Sequence[Run], diagnosis: Diagnosis) -> LossError:
    """Returns the error for a loss that does not add up; `MeanError` where it is a sum or a mean over something else.

    Args:
        whole: the rows together.
        parts: the same rows in pieces; none where the loss cannot be computed for them.
        diagnosis: what `remedies` found.
    """
    kind = MeanError if diagnosis.kind in _OF_MEANS else LossError
    return kind("\n".join([f"{_seen(whole, parts)} {_explained(diagnosis)}", *_lines(diagnosis)]))


def _seen(whole: Run, parts: Sequence[Run]) -> str:
    rows = len(whole.rows)
    if not parts:
        return f"The loss of {rows} samples cannot be computed for a piece of them, and so not in micro-batches."
    cut = Cut(whole=whole, parts=parts)
    name, off = max(((name, declared_difference(cut, name)) for name in whole.terms), key=lambda one: _size(one[1]))
    each = [part.terms[name] for part in parts]
    made = made_value([as_value(term) for term in each], declared_shares(each))
    together = as_value(whole.terms[name]).value
    sizes, values = _listed([len(part.rows) for part in parts]), _listed([as_value(term).value for term in each])
    term = f"The term {name!r}" if name else "The loss"
    return (
        f"{term} does not add up: it is {_number(together)} for {rows} samples together and {values} for pieces of "
        f"{sizes} of them, which make {_number(made)}, taken as {_TAKEN[each[0].kind]}. The gradient of a parameter "
        f"would be off by {_percent(off.gradient)}."
    )


def _explained(diagnosis: Diagnosis) -> str:
    if diagnosis.instead:
        return f"{diagnosis.what}. On these samples this was tried and is right{_one_of(diagnosis.instead)}:"
    if diagnosis.untried:
        return f"{diagnosis.what}. Nothing that could be tried here is right. What remains{_one_of(diagnosis.untried)}:"
    what = f"{diagnosis.what}. " if diagnosis.what else ""
    return f"{what}Nothing that was tried here is right. ga.audit looks further, and names layers and states."


def _one_of(lines: Sequence[str]) -> str:
    return ", any one of" if len(lines) > 1 else ""


def _lines(diagnosis: Diagnosis) -> list[str]:
    return ["    " + entry.replace("\n", ", with ") for entry in diagnosis.instead or diagnosis.untried]


def _size(difference: Difference) -> float:
    return max(difference.gradient, difference.value)


def _listed(numbers: Sequence[float | None]) -> str:
    words = [_number(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.4g}"


def _percent(part: float) -> str:
    return f"{part:.2g} times its size" if part >= 2 or not math.isfinite(part) else f"{part:.2%}"
