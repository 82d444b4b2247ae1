"""What a loss could be: a sum, or a mean over one count or another. A reading is right if its shares fit every cut.

Every reading is tried, not only the first that fits: on a few rows two counts may be the same, and only the user knows
which is meant. A count of the batch is tried as the code that is printed for it, a count that the graph holds as a
number: it has a line only where the loss is a criterion of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradaccum.checking.adding_up import Cut, Measured, as_value, declared_shares, difference, solved_shares
from gradaccum.checking.batch_counts import BatchCount, counts_of, rows_code
from gradaccum.checking.graph_counts import GraphCount
from gradaccum.checking.root_runs import MEAN, PLAIN, SUM, Run

DECLARED, A_SUM, OVER, CONSTANT = "declared", "sum", "over", "constant"
_HOPELESS = 1e3  # in parts of the tolerance: what no shares explain, no reading does


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One way to read a loss.

    Attributes:
        kind: "declared" (as it was returned), "sum", "over" (a mean over a count), or "constant" (the same for every
            piece: a penalty on the parameters, exact as a mean over anything).
        words: what it is a mean over; "" for others.
        code: of the count of a ``batch``; "" where there is none.
        line: the expression to return, with ``{loss}`` in place of the loss; "" where nothing is to change, or where
            the count is one of the graph that nothing in the batch gives.
    """

    kind: str
    words: str = ""
    code: str = ""
    line: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a loss that is read by itself: a term by its name, or one addend of it."""

    name: str
    addend: int | None = None

    def of(self, run: Run) -> Measured:
        """Returns value and gradient of this part."""
        term = run.terms[self.name]
        if self.addend is None:
            return as_value(term)
        return Measured(value=None, gradient=term.addends[self.addend].gradient)

    def root(self, run: Run) -> Measured:
        """Returns value and gradient of the term's root, as it was before anything is divided."""
        term = run.terms[self.name]
        return Measured(value=term.value, gradient=term.gradient)

    def counts(self, run: Run) -> Sequence[GraphCount]:
        """Returns what the graph of this part divides by."""
        term = run.terms[self.name]
        return term.counts if self.addend is None else term.addends[self.addend].counts


def readings_that_fit(part: Part, cuts: Sequence[Cut], *, tolerance: float) -> list[Reading]:
    """Returns every reading of a part of the loss whose shares fit all cuts, the best first."""
    if not cuts:
        return []

    def fits(shares_of: Callable[[Cut], list[float] | None]) -> bool:
        return all(
            (shares := shares_of(cut)) is not None
            and difference(part.of(cut.whole), [part.of(one) for one in cut.parts], shares).within(tolerance)
            for cut in cuts
        )

    for cut in cuts:
        _, left = solved_shares(part.of(cut.whole), [part.of(one) for one in cut.parts])
        if left > _HOPELESS * tolerance:
            return []
    whole = cuts[0].whole
    kind = whole.terms[part.name].kind
    if part.addend is not None and _is_constant(part, cuts, tolerance):
        return [Reading(kind=CONSTANT, code=rows_code(whole.batch) or "")]
    found: list[Reading] = []
    if fits(lambda cut: [1.0] * len(cut.parts)):
        found.append(Reading(kind=A_SUM, line="ga.Loss.sum({loss})"))
    weighted = next((count for count in part.counts(whole) if count.ignore_index is not None), None)
    options = (None, None) if weighted is None else (weighted.class_weights, weighted.ignore_index)
    of_batch = counts_of(whole.batch, *options)
    for count in of_batch:
        if not count.is_likely and found:
            break  # the rest is no likelier
        if fits(lambda cut, count=count: _shares_of(cut, lambda run: count.of(run.batch))):
            is_plain_mean = kind == PLAIN and part.addend is None and count.words == "samples"
            line = "{loss}" if is_plain_mean else f"ga.Loss.mean({{loss}}, over={count.code})"
            found.append(Reading(kind=OVER, words=count.words, code=count.code, line=line))
    if kind == SUM and part.addend is None:
        found += _sums_over(part, cuts, of_batch, tolerance)
    of_graph = list(_of_graph(part, cuts, fits))
    named = [one for one in of_graph if one.line]
    found += named[:1] if named or any(one.kind == OVER for one in found) else of_graph[:1]
    if part.addend is None and fits(lambda cut: declared_shares([one.terms[part.name] for one in cut.parts])):
        code = next((one.code for one in found if one.code), "")
        found.insert(0, Reading(kind=DECLARED, code=code))
    return found


def _shares_of(cut: Cut, count: Callable[[Run], float | None]) -> list[float] | None:
    counts = [count(part) for part in cut.parts]
    present = [one for one in counts if one is not None]
    total = sum(present)
    return [one / total for one in present] if len(present) == len(counts) and total > 0 else None


def _is_constant(part: Part, cuts: Sequence[Cut], tolerance: float) -> bool:
    return all(
        difference(part.of(cut.whole), [part.of(one)], [1.0]).within(tolerance) for cut in cuts for one in cut.parts
    )


def _sums_over(part: Part, cuts: Sequence[Cut], counts: Sequence[BatchCount], tolerance: float) -> Iterator[Reading]:
    r"""A sum that was returned with a wrong count: whole / declared  =  (\sum_b part_b) / (\sum_b count_b)."""
    for count in counts:
        is_right = True
        for cut in cuts:
            each = [count.of(one.batch) for one in cut.parts]
            total = sum(one or 0.0 for one in each)
            if None in each or not total > 0:
                is_right = False
                break
            roots = [part.root(one) for one in cut.parts]
            is_right &= difference(part.of(cut.whole), roots, [1 / total] * len(roots)).within(tolerance)
        if is_right:
            yield Reading(
                kind=OVER, words=count.words, code=count.code, line=f"ga.Loss.sum({{root}}, over={count.code})"
            )


def _of_graph(
    part: Part, cuts: Sequence[Cut], fits: Callable[[Callable[[Cut], list[float] | None]], bool]
) -> Iterator[Reading]:
    """Readings by the counts of the graph: a criterion by its name, and else a number that has none."""
    runs = [run for cut in cuts for run in (cut.whole, *cut.parts)]
    counts = part.counts(cuts[0].whole)
    if any(len(part.counts(run)) != len(counts) for run in runs):
        return
    criterion = cuts[0].whole.terms[part.name].criterion if part.addend is None else ""
    for i, count in enumerate(counts):
        if fits(lambda cut, i=i: _shares_of(cut, lambda run: part.counts(run)[i].value)):
            yield Reading(kind=OVER, words=count.words, line=criterion if count.ignore_index is not None else "")


def expression(part: Part, run: Run) -> str:
    """Returns what the user calls a part of the loss: ``loss``, or ``losses['name']``."""
    name = "loss" if part.name == "" else f"losses[{part.name!r}]"
    return f"{name}.value" if run.terms[part.name].kind == SUM else name


def filled_in(reading: Reading, part: Part, run: Run) -> str:
    """Returns the line of a reading in the user's terms; a ``loss`` in it is the 0-d tensor that the user has made."""
    name = expression(part, run)
    return reading.line.replace("{loss}", name).replace("{root}", name.replace(".value", ".root"))


def is_declared_mean(part: Part, run: Run) -> bool:
    """Whether a term was returned with a count of its own, which ``weights=`` would not replace."""
    return run.terms[part.name].kind in (MEAN, SUM)
