"""Every division of the library: from the weights of a window's micro-batches to the seeds of their backwards.

The gradient wanted is that of the whole batch's mean,

    g = ( sum_b  w_b * grad mean_b ) / W        with  W = sum_b w_b,

and W may be known only when the last micro-batch has been seen. So each backward is seeded with ``w_b / E``, where E is
the *expected* total (a sum is seeded with ``1 / E``), and at the end the sum of gradients is multiplied by ``E / W``:

* the totals are known ahead (the whole batch is in hand): E = W, and nothing is left to do at the end;
* the expectation was right (full windows of equal micro-batches, the usual case): the same;
* the expectation was wrong (token counts, a short last window): one multiplication, which `update` folds into the work
  that it does anyway.

A seed (``backward(gradient=...)``) costs no graph node, where ``loss / accum_iter`` costs one in each direction. Each
term of the sum is divided, instead of the sum at its end, so that half-precision gradients cannot overflow: the sum
never exceeds the mean gradient's size. Two alternatives were rejected: dividing by the number of micro-batches (a mean
of means, wrong once counts differ), and one backward over the sum of all losses (keeps all graphs, so saves no memory).

Counts on the host are Python numbers here. Counts on a device stay there: there is no ``.item()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.types import HALF_DTYPES

Number = float | Tensor
"""A Python number, or a 0-d tensor on a device that is not to be waited for."""

SINGLE = ""
"""The name under which a loss that is not a dict of terms is kept."""

_ROUNDING = 1e-6  # of sums of fp32 class weights, taken in two orders


def host_number(weight: Weight) -> Number:
    """A count as a Python number where reading it waits for nothing; on a device it stays a tensor."""
    if isinstance(weight, Tensor) and weight.device.type == "cpu":
        return weight.item()
    return weight


def _wide(number: Tensor) -> Tensor:
    """In fp64 where the device has it: torch divides whole numbers in fp32, where 1,000 added losses would show too."""
    return number.to(torch.float32 if number.device.type == "mps" else torch.float64)


def _exact(weight: Weight) -> Number:
    number = host_number(weight)
    return _wide(number) if isinstance(number, Tensor) else number


def weighs_nothing(totals: Mapping[str, Weight] | None) -> bool:
    """Whether the host knows, before a window begins, that each of its terms has a total of 0."""
    return totals is not None and _are_zero(host_number(total) for total in totals.values())


def _are_zero(weights: Iterable[Number | None]) -> bool:
    """Whether all are 0, as far as the host knows."""
    return all(not isinstance(weight, Tensor) and weight == 0 for weight in weights)


class _TermSum:
    """The roots of one term, each times its share, for the loss that is reported; and the term's weight so far.

    Roots on the host are read as they come: their backward has to have their value anyway, and a number keeps no graph.
    On a device they stay, detached, until somebody asks: reading one waits for all work before it, and adding them up
    would launch three kernels a micro-batch.
    """

    def __init__(self, weight: Number | None) -> None:
        self.weight = weight  # None for a plain sum, which is divided by nothing
        self._on_host = 0.0
        self._on_device: list[tuple[Tensor, Number]] = []
        self._dtype: torch.dtype | None = None

    def add(self, root: Tensor, share: Number) -> None:
        """Adds a root, 0-d, ``share`` times; not at all where that is 0, since a mean over nothing is NaN."""
        if self._dtype is None:
            self._dtype = torch.float32 if root.dtype in HALF_DTYPES else root.dtype
        if not root.is_cpu or type(root) is not Tensor or isinstance(share, Tensor):
            self._on_device.append((root.detach(), share))
        elif share:
            self._on_host += root.item() * share

    def mean(self, weight: Number | None) -> Tensor:
        """The sum over ``weight``, 0-d and detached; the sum itself where that is None."""
        dtype = torch.float32 if self._dtype is None else self._dtype
        if not self._on_device and not isinstance(weight, Tensor):
            mean = self._on_host if weight is None else _quotient(self._on_host, weight)
            return torch.scalar_tensor(mean, dtype=dtype)
        device = self._on_device[0][0].device if self._on_device else None
        total = _wide(torch.tensor(self._on_host, device=device))
        for root, share in self._on_device:
            if isinstance(share, Tensor):
                total = total + torch.where(share == 0, torch.zeros_like(root), root * share).to(total)
            elif share:
                total = total + root.to(total) * share
        return (total if weight is None else _quotient(total, weight)).to(dtype)

    def state_dict(self) -> dict[str, Any]:
        """The sum and the weight so far, on the host; waits for the device."""
        total = self._on_host
        for root, share in self._on_device:
            total += root.item() * float(share) if share != 0 else 0.0
        weight = self.weight.item() if isinstance(self.weight, Tensor) else self.weight
        return {"total": total, "weight": weight, "dtype": self._dtype}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._on_host, self._on_device = state["total"], []
        self.weight, self._dtype = state["weight"], state["dtype"]


def _quotient(total: Any, weight: Number) -> Any:
    """A mean; NaN over nothing, whatever the sum is."""
    return total / (math.nan if not isinstance(weight, Tensor) and weight == 0 else weight)


class Normaliser:
    """The sums and weights of one window, and the seeds its backwards get.

    Args:
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
        totals: Mapping[str, Weight] | None = None,
        first_share: tuple[int, int] = (1, 1),
        at_least: float = 0.0,
        expected: float | None = None,
    ) -> None:
        self._totals = None if totals is None else {name: _exact(total) for name, total in totals.items()}
        self._first_share: tuple[int, int] = first_share
        self._at_least: float = at_least
        self._expected: Number | None = expected
        self._is_fixed: bool = expected is not None
        self._rescale: float | None = None
        self._terms: dict[str, _TermSum] = {}
        self._last_seed: Tensor | None = None  # micro-batches of one size have the same
        self._last_share = 0.0

    def seeds(self, losses: Mapping[str, Loss]) -> list[tuple[Tensor, Tensor]]:
        """Adds a micro-batch's losses to the window's sums, and returns where its backward starts, and with what.

        That is, of each loss, the root and its 0-d gradient. A loss that weighs nothing is left out.

        Raises:
            LossError: the terms are not those of the micro-batches before, or their totals had to be known ahead.
        """
        self._check_names(losses)
        if len(losses) > 1 and self._totals is None:
            _check_one_weight(losses)
        seeds = [self._seed(name, loss) for name, loss in losses.items()]
        return [seed for seed in seeds if seed is not None]

    def _seed(self, name: str, loss: Loss) -> tuple[Tensor, Tensor] | None:
        root, is_mean = loss.root, loss.is_mean
        weight = None if loss.weight is None else _exact(loss.weight)
        self._add(name, root, weight, is_mean=is_mean)
        share: Number = 1.0
        if weight is not None:
            # A mean over nothing is 0 / 0: its backward makes NaN however it is seeded, so it must not run. For a count
            # on a device this is the one wait for the device. A sum over nothing does run: it is 0, or belongs to the
            # whole all the same (smoothed labels whose own classes have no weight).
            if (is_mean and not weight) or not root.requires_grad:
                return None
            share = (weight if is_mean else 1.0) / self._expected_total(name, weight, in_half=root.dtype in HALF_DTYPES)
        if isinstance(share, Tensor):
            return root, share.to(device=root.device, dtype=root.dtype)
        seed = self._last_seed
        if seed is None or seed.dtype != root.dtype or seed.device != root.device or self._last_share != share:
            seed = torch.scalar_tensor(share, dtype=root.dtype, device=root.device)
            self._last_seed, self._last_share = seed, share
        return root, seed

    def expect_all_of(
        self,
        micro_losses: Sequence[Mapping[str, Loss]],
        *,
        added_up: Callable[[dict[str, Number]], dict[str, Number]] | None = None,
    ) -> None:
        """Takes the totals from all losses of the window, which are at hand before the first backward.

        Where there are several processes, ``added_up`` makes the totals of all of them from those of this one.
        """
        totals: dict[str, Number] = {}
        for losses in micro_losses:
            for name, loss in losses.items():
                if loss.weight is not None:
                    totals[name] = totals.get(name, 0) + _exact(loss.weight)
        self._totals = totals if added_up is None else added_up(totals)

    @property
    def correction(self) -> Number | None:
        """What the gradient has yet to be multiplied by; None where the expectation was right."""
        expected = self._expected
        total = next((term.weight for term in self._terms.values()), None)
        if expected is None or total is None:  # a sum without a divisor is seeded with 1, and expects nothing
            return None
        if isinstance(total, Tensor) or isinstance(expected, Tensor):
            return expected / total
        return None if total == expected or total == 0 else expected / total

    @property
    def weight(self) -> Number | dict[str, Number] | None:
        """The window's total weight; by name where the terms have totals of their own; None for plain sums."""
        weights = {name: term.weight for name, term in self._terms.items() if term.weight is not None}
        has_own_totals = self._totals is not None and len(self._terms) > 1
        return (weights or None) if has_own_totals else next(iter(weights.values()), None)

    @property
    def is_empty(self) -> bool:
        """Whether it is known on the host that the window weighs nothing at all."""
        return _are_zero(term.weight for term in self._terms.values())

    @property
    def share_so_far(self) -> Number | None:
        """Which part of the expected total the micro-batches so far are; None for plain sums.

        NaN where terms have totals of their own, of which they are different parts.
        """
        if self._totals is not None and len(self._terms) > 1:
            return math.nan
        name, weight = next(((name, term.weight) for name, term in self._terms.items()), (SINGLE, None))
        if weight is None:
            return None
        total = self._expected if self._totals is None else self._totals.get(name)
        return weight / total if total is not None else math.nan

    def check_totals(self) -> None:
        """Checks that the weights seen add up to the totals given ahead.

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
                    f"{seen:g}{factor}. weights= must count over the whole batch what the loss counts over each "
                    "micro-batch."
                )

    def share(self) -> dict[str, tuple[Tensor, Number | None]]:
        """Each term's sum and weight on this process, by name; what `settle` wants to have of all of them."""
        return {name: (term.mean(None), term.weight) for name, term in self._terms.items()}

    def settle(self, whole: Mapping[str, tuple[Tensor, Number | None]]) -> None:
        """Replaces the sums and weights of this process by those of all processes together."""
        whole = whole or {SINGLE: (torch.zeros(()), 0)}  # nobody had anything
        self._terms = {}
        for name, (total, weight) in whole.items():
            self._terms[name] = _TermSum(weight)
            self._terms[name].add(total, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The sums and weights so far, and what the totals were taken for; waits for the device."""
        expected = self._expected.item() if isinstance(self._expected, Tensor) else self._expected
        options = {"first_share": self._first_share, "at_least": self._at_least, "is_fixed": self._is_fixed}
        return {"expected": expected, "terms": {n: term.state_dict() for n, term in self._terms.items()}, **options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the window of which ``state_dict()`` was taken, whose totals were not known ahead."""
        self._expected = state["expected"]
        self._is_fixed, self._at_least, self._first_share = state["is_fixed"], state["at_least"], state["first_share"]
        self._terms = {name: _TermSum(None) for name in state["terms"]}
        for name, term in self._terms.items():
            term.load_state_dict(state["terms"][name])

    def means(self) -> dict[str, Tensor]:
        """Each term's mean over the window, by name; sums where there is no divisor. Detached."""
        return {name: term.mean(term.weight) for name, term in self._terms.items()}

    def _check_names(self, losses: Mapping[str, Loss]) -> None:
        if not self._terms or losses.keys() == self._terms.keys():
            return
        if SINGLE in (*losses, *self._terms):
            raise LossError(
                "One micro-batch of the window returned a single loss, another a dict of terms. Return the same "
                "kind for every micro-batch, with weight 0 where a term has nothing: ga.Loss.sum(zero, over=0)."
            )
        raise LossError(
            f"The loss has the terms {_names(losses)}, and earlier micro-batches of this window had "
            f"{_names(self._terms)}. A term's mean is over the whole window: return every term for every "
            "micro-batch, with weight 0 where it has nothing: ga.Loss.sum(zero, over=0)."
        )

    def _add(self, name: str, root: Tensor, weight: Number | None, *, is_mean: bool) -> None:
        term = self._terms.get(name)
        if term is None:
            term = self._terms[name] = _TermSum(weight)
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


def _check_one_weight(losses: Mapping[str, Loss]) -> None:
    """Terms with totals of their own need these before the first backward; terms of one common weight do not."""
    weights = {name: None if loss.weight is None else host_number(loss.weight) for name, loss in losses.items()}
    # A tensor's hash is its identity: counts on a device are not compared, since that would wait for the device.
    if len(set(weights.values())) > 1:
        seen = ", ".join(f"{name!r} over {_shown(weight)}" for name, weight in weights.items())
        raise LossError(
            f"The terms of the loss are means over different things ({seen}), and one backward adds all of them to the "
            "same gradient, so each must be divided by its own total before that total has been seen. Give the totals "
            "ahead: weights=lambda batch: {" + ", ".join(f'"{name}": ...' for name in losses) + "}."
        )


def _names(terms: Mapping[str, object]) -> str:
    return ", ".join(repr(name) if name else "a single loss" for name in terms) or "nothing"


def _term(name: str) -> str:
    return f"the term {name!r}" if name else "the loss"


def _shown(weight: Number | None) -> str:
    if weight is None:
        return "nothing"
    return "a count on the device" if isinstance(weight, Tensor) else f"{weight:g}"
