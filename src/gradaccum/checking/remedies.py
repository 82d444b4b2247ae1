r"""Why a loss does not add up, and what to return instead: lines that were tried on the rows at hand.

    whole  =  \sum_b  share_b * part_b         in gradient and value, for several ways to cut the same rows

Readings are tried from the cheapest to the dearest: the loss as it is with another count; its addends, or terms, with a
count each; samples that belong together kept in one piece. What is left couples samples: then the gradients of the
pieces tell whether it is a function of one sum over the batch, which is all that can be said without its code.

The runs are made by whoever looks. Nothing here touches a model; runs are asked for only after a loss failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradaccum.checking.adding_up import Cut, declared_difference, difference, solved_shares
from gradaccum.checking.batch_counts import BatchCount, id_columns, rows_code
from gradaccum.checking.readings import (
    A_SUM,
    CONSTANT,
    DECLARED,
    Part,
    Reading,
    expression,
    filled_in,
    is_declared_mean,
    readings_that_fit,
)
from gradaccum.checking.root_runs import PLAIN_SUM, Addend, Run, Term
from gradaccum.losses.normaliser import SINGLE

__all__ = ["Addend", "Diagnosis", "Run", "Term", "remedies"]

RunRows = Callable[[Tensor], Run]
"""Makes a run, with addends and counts, of some of the look's rows; it may raise what the user's code raises."""

_FEWEST_CUTS = 2  # one could fit by chance
_MOST_LINES = 6  # of those that fit alike; more would not be read
_ALTERNATIVES = 2  # for each addend of a sum
_CUTS_OF_GROUPS = 8
# What shares may leave of a gradient that they explain, in parts of the tolerance: three of them are solved for.
_SLACK = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a loss does not add up.

    Attributes:
        kind: "sum", "weight" (a mean over another count), "terms" (several means), "groups" (samples that belong
            together), "batch_loss" (a function of the whole batch), "state" (it adds up where every piece starts from
            what was there before the first one), or "unknown".
        what: what was seen, in one sentence; "" where nothing fits.
        instead: what to type, the best first: each was tried on these rows and was right. One entry may have several
            lines, all of them needed: ``return ...`` for the loss function, ``weights=...`` and ``split=...`` for
            `TrainStep`.
        untried: what else may help, and cannot be tried here.
    """

    kind: str
    what: str = ""
    instead: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()


def remedies(whole: Run, parts: Sequence[Run], run: RunRows, *, tolerance: float) -> Diagnosis:
    """Finds what a loss that does not add up is, and all that can be returned instead.

    Args:
        whole: all rows of the look together.
        parts: the same rows in unequal pieces; none where the loss cannot be computed for them.
        run: makes another run of any rows.
        tolerance: relative, for gradients and values.

    Returns:
        The diagnosis. Its lines are right on every cut of the rows that was tried: the given one and up to seven more.
    """
    look = _Look(whole, parts, run, tolerance)
    for explain in (_by_counts, _by_addends, _by_groups, _by_shares):
        found = explain(look)
        if found is not None:
            return found
    return Diagnosis(kind="unknown")


class _Look:
    """The rows at hand, and the cuts of them that were made so far."""

    def __init__(self, whole: Run, parts: Sequence[Run], run: RunRows, tolerance: float) -> None:
        self._run = run
        self.tolerance = tolerance
        self.whole = self.attempt(whole.rows) or whole
        pieces = [self.attempt(part.rows) for part in parts]
        in_full = [piece for piece in pieces if piece is not None]
        cut = Cut(whole=self.whole, parts=in_full if len(in_full) == len(parts) else parts)
        self.cuts = [cut] if len(parts) > 1 else []
        self._positions = _other_cuts(len(whole.rows))
        while len(self.cuts) < _FEWEST_CUTS and self.add_cut():
            pass
        self.parts = [Part(name=name) for name in self.whole.terms]

    def attempt(self, rows: Tensor) -> Run | None:
        """Returns a run of some rows; None where the user's code, or torch, cannot compute it."""
        try:
            return self._run(rows)
        except Exception:  # noqa: BLE001  # odd pairs, BatchNorm of one row, out of memory: the candidate is off
            return None

    def cut(self, pieces: Sequence[Tensor]) -> Cut | None:
        """Returns the whole in these pieces, by position in its rows; None where one cannot be computed."""
        runs = [self.attempt(self.whole.rows[piece]) for piece in pieces]
        present = [one for one in runs if one is not None]
        return Cut(whole=self.whole, parts=present) if len(present) == len(runs) else None

    def add_cut(self) -> bool:
        """Makes one more cut that is unlike those before it; False where there is none left."""
        for chosen in self._positions:
            rest = torch.tensor([i for i in range(len(self.whole.rows)) if i not in chosen.tolist()])
            cut = self.cut([chosen, rest])
            if cut is not None:
                self.cuts.append(cut)
                return True
        return False

    def readings(self, parts: Sequence[Part]) -> list[list[Reading]]:
        """The readings of each part that fit all cuts, which are more where some fit the first: counts are small."""
        found = self._fitting(parts)
        if all(found):
            while self.add_cut():
                pass
            found = self._fitting(parts)
        return found

    def _fitting(self, parts: Sequence[Part]) -> list[list[Reading]]:
        return [readings_that_fit(part, self.cuts, tolerance=self.tolerance) for part in parts]


def _other_cuts(rows: int) -> Iterator[Tensor]:
    """Positions of the smaller pieces of more cuts; the first part neighbours (0, 1) and halves (0, rows / 2)."""
    seen: set[tuple[int, ...]] = set()
    pairs = ((0, 2), (1, 3)) if rows == 6 else ((0, 3), (1, rows - 2))
    for chosen in (pairs[0], tuple(range(1, rows, 3)), pairs[1], (rows - 1,), (0,), (2, 4), (2, 3, 5)):
        if min(chosen, default=-1) >= 0 and max(chosen) < rows and len(chosen) < rows and chosen not in seen:
            seen.add(chosen)
            yield torch.tensor(chosen)


def _by_counts(look: _Look) -> Diagnosis | None:
    """A sum or a mean over something else; or several terms, each with a count of its own."""
    found = look.readings(look.parts)
    if not all(found):
        return None
    if all(readings[0].kind == DECLARED for readings in found):
        return Diagnosis(kind="state", what=_NOT_TWICE)
    if len(look.parts) > 1:
        return _terms(look, found)
    [part], [readings] = look.parts, found
    first = readings[0]
    lines = [f"return {filled_in(one, part, look.whole)}" for one in readings if one.line][:_MOST_LINES]
    if first.kind == A_SUM:
        return Diagnosis(kind="sum", what="The loss is a sum over samples, no mean", instead=tuple(lines))
    what = f"The loss is a mean over {first.words}"
    if not lines:
        count = f"return ga.Loss.mean({expression(part, look.whole)}, over=count)"
        return Diagnosis(kind="weight", what=f"{what}, which nothing in the batch gives", untried=(count,))
    return Diagnosis(kind="weight", what=what, instead=tuple(lines))


_NOT_TWICE = "Run from the same state each time, the pieces add up as they were returned"


def _terms(look: _Look, found: Sequence[Sequence[Reading]]) -> Diagnosis:
    """Terms by name that each have a reading: those that were declared right stay as they are."""
    entries: list[str] = []
    for chosen in _combinations(found):
        changed: list[str] = []
        counts: list[str] = []
        for part, reading in zip(look.parts, chosen, strict=True):
            kind = look.whole.terms[part.name].kind
            is_sum = reading.kind == A_SUM or (reading.kind == DECLARED and kind == PLAIN_SUM)
            if reading.kind != DECLARED and (is_sum or not reading.code or is_declared_mean(part, look.whole)):
                changed.append(f"{part.name!r}: {filled_in(reading, part, look.whole)}")
            if not is_sum and reading.code:
                counts.append(f"{part.name!r}: {reading.code}")
        lines = [f"return {{**losses, {', '.join(changed)}}}"] if changed else []
        if not all(one.code for one in chosen if one.kind != A_SUM):
            continue  # a count that has no name here
        # Terms over different things, or over something and nothing, need their totals ahead.
        if len({"" if one.kind == A_SUM else one.code for one in chosen}) > 1:
            lines.append(f"weights=lambda batch: {{{', '.join(counts)}}}")
        entries.append("\n".join(lines))
    words = [_words(part.name, readings[0], look.whole) for part, readings in zip(look.parts, found, strict=True)]
    return Diagnosis(kind="terms", what="; ".join(words), instead=_unique(entries))


def _words(name: str, reading: Reading, run: Run) -> str:
    if reading.kind == A_SUM:
        return f"{name!r} is a sum"
    if reading.kind == DECLARED:
        return f"{name!r} is what it was returned as ({run.terms[name].kind})"
    return f"{name!r} is a mean over {reading.words}"


def _combinations(found: Sequence[Sequence[Reading]]) -> Iterator[tuple[Reading, ...]]:
    """One reading of each part, the best first; alternatives only where lines can be typed for them."""
    each = [readings[:1] if readings[0].kind == DECLARED else readings[:_ALTERNATIVES] for readings in found]
    return itertools.islice(itertools.product(*each), _MOST_LINES)


def _unique(entries: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for entry in entries if entry))


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def _by_addends(look: _Look) -> Diagnosis | None:
    """One loss that is a sum of scalars, each a mean over something else: ``lm + 0.01 * aux``."""
    runs = [look.whole, *(part for cut in look.cuts for part in cut.parts)]
    if len(look.parts) != 1 or look.whole.terms.keys() != {SINGLE}:
        return None
    number = len(look.whole.terms[SINGLE].addends)
    if number < 2 or any(len(run.terms[SINGLE].addends) != number for run in runs):
        return None
    parts = [Part(name=SINGLE, addend=i) for i in range(number)]
    found = look.readings(parts)
    if not all(found):
        return None
    names = _ORDINALS[:number]
    entries: list[str] = []
    for chosen in _combinations(found):
        if not all(one.code for one in chosen if one.kind != A_SUM):
            continue  # a count that has no name here
        returned, counts = [], []
        for name, reading in zip(names, chosen, strict=True):
            returned.append(f"{name!r}: " + (f"ga.Loss.sum({name})" if reading.kind == A_SUM else name))
            counts += [] if reading.kind == A_SUM else [f"{name!r}: {reading.code}"]
        lines = [f"return {{{', '.join(returned)}}}"]
        if any(one.kind != CONSTANT and one.words != "samples" for one in chosen):
            lines.append(f"weights=lambda batch: {{{', '.join(counts)}}}")
        entries.append("\n".join(lines))
    words = {A_SUM: "a sum", CONSTANT: "the same for every micro-batch"}
    described = [
        f"the {name} is {words.get(readings[0].kind, f'a mean over {readings[0].words}')}"
        for name, readings in zip(names, found, strict=True)
    ]
    what = f"The loss adds up {number} scalars (in this order, with their factors): {', '.join(described)}"
    return Diagnosis(kind="terms", what=what, instead=_unique(entries))


def _by_groups(look: _Look) -> Diagnosis | None:
    """Samples that belong together: pairs in halves, neighbours, the completions of one prompt."""
    fitting: list[tuple[int, str]] = []
    for code, ids in _groupings(look.whole):
        groups = len(ids.unique())
        if fitting and groups < fitting[0][0]:
            break  # groups of groups fit as well
        found = _readings_in_groups(look, code, ids)
        if all(any(one.line or one.kind == DECLARED for one in readings) for readings in found):
            entry = [f"split=ga.split_by_samples(groups=lambda batch: {code})"]
            if not all(readings[0].kind == DECLARED for readings in found):
                entry[:0] = _returned(look, found)
            fitting.append((groups, "\n".join(entry)))
    if not fitting:
        return None
    size = len(look.whole.rows) / fitting[0][0]
    what = f"The loss couples samples within groups, of {size:g} here, and adds up where these stay together"
    return Diagnosis(kind="groups", what=what, instead=_unique([entry for _, entry in fitting]))


def _returned(look: _Look, found: Sequence[Sequence[Reading]]) -> list[str]:
    if len(look.parts) == 1:
        typed = next(one for one in found[0] if one.line)
        return [f"return {filled_in(typed, look.parts[0], look.whole)}"]
    return _terms(look, found).instead[0].split("\n")


def _groupings(whole: Run) -> Iterator[tuple[str, Tensor]]:
    """Code for the number of each sample's group, with these numbers; the finest groups first."""
    rows, code = len(whole.rows), rows_code(whole.batch)
    made: list[tuple[str, Tensor]] = [
        (path, ids) for path, ids in id_columns(whole.batch) if 1 < len(ids.unique()) < rows and len(ids) == rows
    ]
    if code is not None and BatchCount(code, "").of(whole.batch) == rows:
        for size in (2, 3, 4):
            if rows % size == 0 and rows > size:
                index = torch.arange(rows)
                made.append((f"torch.arange({code}) % ({code} // {size})", index % (rows // size)))
                made.append((f"torch.arange({code}) // {size}", index // size))
    return iter(sorted(made, key=lambda one: -len(one[1].unique())))


def _readings_in_groups(look: _Look, code: str, ids: Tensor) -> list[list[Reading]]:
    """The readings of each term that fit where groups stay together, on as many cuts as leave nothing to chance.

    Where the place of a sample says which group it is in, any order of the rows makes new groups. Where a column says
    it, the rows keep their groups, and some of them are left out instead. A loss of the hardest half of the samples
    adds up for one cut in two of those into groups, so several are made; the first that does not fit ends it.
    """
    made = torch.Generator().manual_seed(0)
    is_by_place = "torch.arange" in code
    cuts: list[Cut] = []
    found: list[list[Reading]] = []
    for _ in range(_CUTS_OF_GROUPS):
        order = torch.randperm(len(ids), generator=made)
        kept = order if is_by_place else order[: len(ids) - len(cuts) % 2].sort().values
        own = ids if is_by_place else ids[kept]
        chosen = own == own[int(torch.randint(len(own), (), generator=made))]
        runs = [look.attempt(look.whole.rows[kept[which]]) for which in (chosen | True, chosen, ~chosen)]
        present = [one for one in runs if one is not None]
        if len(present) < len(runs):
            return [[]]
        cuts.append(Cut(whole=present[0], parts=present[1:]))
        found = [readings_that_fit(part, cuts[-1:], tolerance=look.tolerance) for part in look.parts]
        if not all(found):
            return [[]]
    return [readings_that_fit(part, cuts, tolerance=look.tolerance) for part in look.parts]


def _by_shares(look: _Look) -> Diagnosis | None:
    """What the gradients of the pieces say where no reading fits."""
    is_mean, is_one_sum = bool(look.cuts), bool(look.cuts)
    shares: list[float] = []
    for cut in look.cuts:
        for part in look.parts:
            whole, parts = part.of(cut.whole), [part.of(one) for one in cut.parts]
            solved, left = solved_shares(whole, parts)
            is_one_sum &= left <= _SLACK * look.tolerance
            # A logarithm of a mean, or a maximum, has such gradients too, but not such a value, or no share of some.
            is_mean &= is_one_sum and abs(sum(solved) - 1) <= _SLACK * look.tolerance and min(solved) > look.tolerance
            is_mean &= difference(whole, parts, solved).value <= _SLACK * look.tolerance
            shares = shares or solved
    if is_mean:
        samples = [len(one.rows) for one in look.cuts[0].parts]
        what = (
            "The loss is a mean over something that was not found in the batch: pieces of "
            f"{_listed(samples)} samples have {_listed(shares)} of it"
        )
        name = expression(look.parts[0], look.whole)
        return Diagnosis(kind="weight", what=what, untried=(f"return ga.Loss.mean({name}, over=count)",))
    if look.cuts and _only_gradients_differ(look):
        what = (
            "The values add up and the gradients do not: a detached coefficient is another one for each piece, "
            "or something in the backward does not know its share"
        )
        return Diagnosis(kind="unknown", what=what)
    if is_one_sum:
        what = "The loss is a function of a sum over all samples (a root or a ratio of it, say)"
        return Diagnosis(kind="batch_loss", what=what, untried=(_OF_SUMS, _OF_OUTPUTS))
    what = "The loss couples samples: no weights of the pieces' gradients give the whole's"
    return Diagnosis(kind="batch_loss", what=what, untried=(_OF_OUTPUTS, _OF_SUMS))


_OF_OUTPUTS = (
    "ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss), where forward returns the outputs and "
    "batch_loss makes the loss of those of the whole batch"
)
_OF_SUMS = (
    'ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss, combine="sum"), where forward returns sums '
    "over samples and batch_loss makes the loss of them"
)


def _only_gradients_differ(look: _Look) -> bool:
    differences = [declared_difference(cut, part.name) for cut in look.cuts for part in look.parts]
    return all(one.value <= look.tolerance for one in differences)


def _listed(numbers: Sequence[float]) -> str:
    return " and ".join(f"{number:.3g}" for number in numbers)
