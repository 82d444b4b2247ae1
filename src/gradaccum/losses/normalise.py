"""Every division of the library: from the weights of a window's micro-batches to the seeds of their backwards.

The gradient wanted is that of the whole batch's mean,

    g = ( sum_b  w_b * grad mean_b ) / W        with  W = sum_b w_b,

and W may be known only when the last micro-batch has been seen. So each backward is seeded with ``w_b / E`` where E is
the total *expected* (a sum is seeded with ``1 / E``), and what has been added up is in the end corrected by ``E / W``:

* known ahead (the whole batch is in hand): E = W, and nothing is left to do at the end;
* guessed right (full windows of equal micro-batches, the usual case): the same;
* guessed wrong (token counts, a short last window): one multiplication, which `update` folds into work that is done
  anyway.

Seeding costs no graph node, where ``loss / accum_iter`` costs one in each direction. Dividing as the sum grows, instead
of at its end, keeps half-precision gradients from overflowing: what is added up never exceeds the mean gradient's size.
The rejected alternatives: dividing by the number of micro-batches (a mean of means, wrong once counts differ), and
adding all losses for one backward (keeps all graphs, so saves no memory).

Counts on the host are Python numbers here. Counts on a device stay there: no ``.item()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.seeds import Again, Seeds, Start
from gradaccum.losses.term_sum import Number, TermSum

SINGLE = ""
"""The name under which a loss that is not a dict of terms is kept."""


_HALF = (torch.float16, torch.bfloat16)
_ROUNDING = 1e-6  # of sums of fp32 class weights, taken in two orders


def host_number(weight: Weight) -> Number:
    """A count as a Python number where reading it waits for nothing; on a device it stays a tensor."""
    if isinstance(weight, Tensor) and weight.device.type == "cpu":
        return weight.item()
    return weight


def _exact(weight: Weight) -> Number:
    """The same, in fp64 where it stays on a device: torch divides whole numbers in fp32."""
    number = host_number(weight)
    if isinstance(number, Tensor):
        return number.to(torch.float32 if number.device.type == "mps" else torch.float64)
    return number


def weighs_nothing(totals: Mapping[str, Weight] | None) -> bool:
    """Whether it is known on the host, before a window begins, that all its terms have a total of 0."""
    numbers = None if totals is None else [host_number(total) for total in totals.values()]
    return numbers is not None and all(not isinstance(number, Tensor) and number == 0 for number in numbers)


class Normaliser:
    """The sums and weights of one window, and the seeds its backwards get.

    Args:
        seeds: kept by the caller from window to window.
        totals: each term's total weight where known ahead (one under `SINGLE` for a single loss); None if unknown.
        first_share: which part of an unknown total the first micro-batch is expected to be, as a fraction:
            ``(1, micro_batches)`` or ``(samples, batch_size)``.
        at_least: the total of the window before, if an unknown one is not expected to be smaller. Expecting too little
            would let fp16 gradients overflow.
        expected: what an unknown total is taken for, where several processes must take it for the same.
    """

    def __init__(
        self,
        *,
        seeds: Seeds | None = None,
        totals: Mapping[str, Weight] | None = None,
        first_share: tuple[int, int] = (1, 1),
        at_least: float = 0.0,
        expected: float | None = None,
    ) -> None:
        self._seeds = Seeds() if seeds is None else seeds
        self._totals = None if totals is None else {name: _exact(total) for name, total in totals.items()}
        self._first_share = first_share
        self._at_least = at_least
        self._expected: Number | None = expected
        self._is_fixed = expected is not None
        self._rescale: float | None = None
        self._terms: dict[str, TermSum] = {}
        # What another loss would have to be like, and the term it is added to: None before the window's first one.
        start = None if totals is not None or expected is not None else self._seeds.start
        if start is not None and (start.first_share != first_share or start.at_least != at_least):
            start = None
        self._start = start
        self._again: Again | None = None if start is None else start.again
        self._term: TermSum | None = None

    def seed(self, loss: Loss, name: str = SINGLE) -> tuple[Tensor, Tensor] | None:
        """Adds a micro-batch's loss to the window's sums.

        Returns:
            The root to run backward from and the gradient it starts with; None where it weighs nothing.
        """
        return self.seed_root(loss.root, loss.weight, is_mean=loss.is_mean, name=name)

    def seed_mean(self, root: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The same for a plain mean over samples, at least one, with a graph: of most losses, so the short way."""
        is_first = not self._terms
        one = self.seed_root(root, samples, is_mean=True)
        assert one is not None, "it weighs something and has a graph"
        if type(root) is Tensor:
            again = Again(samples, root.dtype, None if root.is_cpu else root.device, one[1:])
            self._again, self._term = again, self._terms[SINGLE]
            if is_first and self._totals is None and not self._is_fixed:
                assert self._expected is not None, "the loss has been divided by it"
                self._seeds.start = Start(self._first_share, self._at_least, self._expected, again)
        return one

    def seeds_again(self, root: Any, samples: int | None) -> tuple[Tensor] | None:
        """The same where the micro-batch is like the one before, so that nothing about it has to be asked again.

        The first of a window is compared with the first of the window before, if that began with the same expectation.

        Args:
            root: whatever the user returned.
            samples: rows of the micro-batch; None where unknown.

        Returns:
            The gradient its backward starts with; None where it is anything else, and nothing has been added.
        """
        again = self._again
        if (
            again is None
            or again.samples != samples
            or type(root) is not Tensor
            or root.dtype is not again.dtype
            or root.dim()
            or not root.requires_grad
        ):
            return None
        samples = again.samples
        is_on_host = root.is_cpu
        if again.device is not None if is_on_host else again.device != root.device:
            return None
        term = self._term
        if term is None:
            assert self._start is not None, "what is begun again has begun before"
            self._expected = self._start.expected
            term = self._term = self._terms[SINGLE] = TermSum(0, dtype=again.dtype)
        if is_on_host:
            term.on_host += root.item() * samples
        else:
            term.add(root, samples)
        term.weight = term.weight + samples  # type: ignore[operator]
        return again.seeds

    def seed_root(
        self, root: Tensor, weight: Weight | None, *, is_mean: bool, name: str = SINGLE
    ) -> tuple[Tensor, Tensor] | None:
        """The same for what a `Loss` is made of."""
        self._again = None
        if isinstance(weight, Tensor):
            weight = _exact(weight)
        self._add(name, root, weight, is_mean=is_mean)
        share: Number = 1.0
        if weight is not None:
            if (is_mean and _is_nothing(weight)) or not root.requires_grad:
                return None
            share = (weight if is_mean else 1.0) / self._expected_total(name, weight, in_half=root.dtype in _HALF)
        return root, self._seeds.of(share, root)

    def seeds(self, losses: Mapping[str, Loss]) -> list[tuple[Tensor, Tensor]]:
        """The same for several terms; what weighs nothing is left out."""
        if self._terms and SINGLE not in self._terms and losses.keys() != self._terms.keys():
            raise LossError(
                f"The loss has the terms {_names(losses)}, and earlier micro-batches of this window had "
                f"{_names(self._terms)}. A term's mean is over the whole window: return every term for every "
                "micro-batch, with weight 0 where it has nothing: ga.Loss.sum(zero, over=0)."
            )
        if len(losses) > 1 and self._totals is None:
            _require_one_weight(losses)
        found = [self.seed(loss, name) for name, loss in losses.items()]
        return [one for one in found if one is not None]

    @property
    def knows_totals(self) -> bool:
        """Whether what the gradient is divided by is known before the first backward."""
        return self._totals is not None

    def expect(self, total: float) -> None:
        """Takes a total that was not given to be this."""
        self._expected, self._is_fixed, self._again = total, True, None

    def expect_all_of(
        self,
        micro_losses: Sequence[Mapping[str, Loss]],
        *,
        added_up: Callable[[dict[str, Number]], dict[str, Number]] | None = None,
    ) -> None:
        """Takes the totals from all losses of the window, which are at hand before the first backward.

        Args:
            micro_losses: of this process.
            added_up: from its totals to those of all processes, where there are several.
        """
        totals: dict[str, Number] = {}
        for losses in micro_losses:
            for name, loss in losses.items():
                if loss.weight is not None:
                    totals[name] = totals.get(name, 0) + _exact(loss.weight)
        self._totals = totals if added_up is None else added_up(totals)
        self._again = None

    @property
    def correction(self) -> Number | None:
        """What the gradient has yet to be multiplied by; None where the expectation was right."""
        expected = self._expected
        if expected is None or not self._terms:
            return None
        total = next(iter(self._terms.values())).weight
        if total is None:  # a sum without a divisor is seeded with 1, and expects nothing
            return None
        if isinstance(total, Tensor) or isinstance(expected, Tensor):
            return expected / total
        return None if total == expected or total == 0 else expected / total

    @property
    def weight(self) -> Number | dict[str, Number] | None:
        """The window's total weight; by name where the terms have totals of their own; None for plain sums."""
        terms = self._terms
        if len(terms) == 1:
            return next(iter(terms.values())).weight
        weights = {name: term.weight for name, term in terms.items() if term.weight is not None}
        if not weights:
            return None
        return weights if self._totals is not None else next(iter(weights.values()))

    @property
    def is_empty(self) -> bool:
        """Whether it is known on the host that the window weighs nothing at all."""
        for term in self._terms.values():  # noqa: SIM110 - asked once an update, and a generator takes twice the time
            if isinstance(term.weight, Tensor) or term.weight != 0:
                return False
        return True

    def check_totals(self) -> None:
        """That the weights seen add up to the totals given ahead.

        Raises:
            LossError: they do not, so the gradient has been divided by the wrong number.
        """
        if self._totals is None:
            return
        for name, total in self._totals.items():
            seen = self._terms[name].weight if name in self._terms else None
            if isinstance(total, Tensor) or isinstance(seen, Tensor) or seen is None:
                continue  # not compared: that would wait for the device
            if abs(seen - total) > _ROUNDING * max(abs(total), abs(seen)):
                factor = f", so its gradient would be {seen / total:.4g} times what it should be" if total else ""
                raise LossError(
                    f"The total weight of {_term(name)} was given as {total:g}, and its micro-batches add up to "
                    f"{seen:g}"
                    f"{factor}. weights= must count over the whole batch what the loss counts over each micro-batch."
                )

    def share(self) -> dict[str, tuple[Tensor, Number | None]]:
        """Each term's sum and weight on this process, by name; what `settle` wants to have of all of them."""
        return {name: (term.mean(None), term.weight) for name, term in self._terms.items()}

    def settle(self, whole: Mapping[str, tuple[Tensor, Number | None]]) -> None:
        """From now on the sums and weights are those of all processes together."""
        whole = whole or {SINGLE: (torch.zeros(()), 0)}  # nobody had anything
        self._terms = {name: TermSum(weight) for name, (_, weight) in whole.items()}
        self._again = None
        for name, (total, _) in whole.items():
            self._terms[name].add(total, 1.0)

    def means(self) -> dict[str, Tensor]:
        """Each term's mean over the window, by name; sums where there is no divisor. Detached."""
        return {name: term.mean(term.weight) for name, term in self._terms.items()}

    def _add(self, name: str, root: Tensor, weight: Number | None, *, is_mean: bool) -> None:
        term = self._terms.get(name)
        if term is None:
            if self._terms and SINGLE in (name, *self._terms):
                raise LossError(
                    "One micro-batch of the window returned a single loss, another a dict of terms. Return the same "
                    "kind for every micro-batch, with weight 0 where a term has nothing: ga.Loss.sum(zero, over=0)."
                )
            term = self._terms[name] = TermSum(weight)
        elif term.weight is None or weight is None:
            if term.weight is not weight:
                raise LossError(
                    "One micro-batch returned a sum without `over`, another a loss that has a weight. The one is not "
                    "to be divided by anything, the other is; their gradients cannot be added up. Return the same "
                    "kind for every micro-batch: ga.Loss.sum(total, over=n)."
                )
        else:
            term.weight = term.weight + weight
        term.add(root, weight if is_mean and weight is not None else 1.0)

    def _expected_total(self, name: str, weight: Number, *, in_half: bool) -> Number:
        if self._totals is not None:
            if name not in self._totals:
                raise LossError(
                    f"weights= gave the total of {_names(self._totals)}, and the loss returned {_names(self._terms)}. "
                    f"Without a total {_term(name)} cannot be divided. Let weights= return it, by the same name."
                )
            total = self._totals[name]
            if not isinstance(total, Tensor) and total == 0:
                if not isinstance(weight, Tensor) and weight == 0:
                    return 1.0  # of a window that weighs nothing, and is not applied
                raise LossError(
                    f"weights= gave a total of 0 for {_term(name)}, and one of its micro-batches weighs "
                    f"{_shown(weight)}. Nothing can be divided by 0. weights= must count over the whole batch what the "
                    "loss counts over each micro-batch."
                )
            return total
        if self._expected is None:
            part, whole = self._first_share
            expected = weight * whole / part  # in this order, so that equal micro-batches give the very integer
            if isinstance(expected, Tensor):
                # A count on a device may turn out to be 0, which is not waited for: any other guess will do then.
                expected = torch.where(expected > 0, expected, 1.0)
            else:
                expected = max(expected, self._at_least) or 1.0
                if in_half:
                    # 7 / 37 in bf16 is off by 0.1%, for each micro-batch by another part of it; 7 / 64 is not off at
                    # all. What is left to correct is the same for all of them.
                    expected = 2.0 ** math.ceil(math.log2(expected))
            self._expected = expected
        elif self._is_fixed or isinstance(weight, Tensor) or isinstance(self._expected, Tensor):
            pass
        elif weight > self._expected:
            # One micro-batch weighs more than the whole was expected to: seeded with more than 1, it could overflow.
            larger = 2.0 ** math.ceil(math.log2(weight)) * self._first_share[1]
            self._rescale = self._expected / larger
            self._expected = larger
        return self._expected

    def take_rescale(self) -> float | None:
        """What the sum so far has to be multiplied by before the next backward, where it was expected too small."""
        rescale, self._rescale = self._rescale, None
        return rescale


def _require_one_weight(losses: Mapping[str, Loss]) -> None:
    """Terms with totals of their own need these before the first backward; terms of one common weight do not."""
    weights = {name: None if loss.weight is None else host_number(loss.weight) for name, loss in losses.items()}
    values = list(weights.values())
    same = all(_is_same(value, values[0]) for value in values)
    if not same:
        seen = ", ".join(f"{name!r} over {_shown(weight)}" for name, weight in weights.items())
        raise LossError(
            f"The terms of the loss are means over different things ({seen}), and one backward adds all of them to the "
            "same gradient, so each must be divided by its own total before that total has been seen. Give the totals "
            "ahead: weights=lambda batch: {" + ", ".join(f'"{name}": ...' for name in losses) + "}."
        )


def _is_same(one: Number | None, other: Number | None) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False  # equal or not: comparing would wait for the device
    return one == other


def _is_nothing(weight: Number) -> bool:
    """Whether a mean is over nothing, and so adds nothing to its term.

    It is 0 / 0, and a backward of it makes NaN however it is seeded, so it must not be run. For a count on a device
    this is the one wait for the device. A sum over nothing is run: it is 0 by itself, or belongs to the whole all the
    same (smoothed labels whose own classes have no weight).
    """
    return not weight


def _names(terms: Mapping[str, object]) -> str:
    return ", ".join(repr(name) if name else "a single loss" for name in terms) or "nothing"


def _term(name: str) -> str:
    return f"the term {name!r}" if name else "the loss"


def _shown(weight: Number | None) -> str:
    if weight is None:
        return "nothing"
    return "a count on the device" if isinstance(weight, Tensor) else f"{weight:g}"
