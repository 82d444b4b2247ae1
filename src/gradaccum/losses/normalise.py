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

from collections.abc import Mapping

import torch
from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight

Number = float | Tensor
"""A Python number, or a 0-d tensor on a device that is not to be waited for."""

SINGLE = ""
"""The name under which a loss that is not a dict of terms is kept."""


def host_number(weight: Weight) -> Number:
    """A count as a Python number where reading it waits for nothing; on a device it stays a tensor."""
    if isinstance(weight, Tensor) and weight.device.type == "cpu":
        return weight.item()
    return weight


class Normaliser:
    """The sums and weights of one window, and the seeds its backwards get.

    Args:
        totals: each term's total weight where known ahead (one under `SINGLE` for a single loss); None if unknown.
        first_share: which part of an unknown total the first micro-batch is expected to be, as a fraction:
            ``(1, micro_batches)`` or ``(samples, batch_size)``.
        at_least: the total of the window before, if an unknown one is not expected to be smaller. Expecting too little
            would let fp16 gradients overflow.
    """

    def __init__(
        self,
        *,
        totals: Mapping[str, Weight] | None = None,
        first_share: tuple[int, int] = (1, 1),
        at_least: float = 0.0,
    ) -> None:
        self._totals = None if totals is None else {name: host_number(total) for name, total in totals.items()}
        self._first_share = first_share
        self._at_least = at_least
        self._expected: Number | None = None
        self._weights: dict[str, Number | None] = {}
        self._parts: dict[str, list[tuple[Tensor, Number | None]]] = {}
        self._seeds: dict[tuple[Number, torch.dtype, torch.device], Tensor] = {}

    def seeds(self, terms: Mapping[str, Loss]) -> tuple[list[Tensor], list[Tensor]]:
        """The roots to run backward from, and the gradient each starts with; empty where nothing weighs anything.

        Adds the micro-batch to the window's sums.
        """
        if self._parts and terms.keys() != self._parts.keys():
            raise LossError(
                f"The loss has the terms {_names(terms)}, and earlier micro-batches of this window had "
                f"{_names(self._parts)}. A term's mean is over the whole window: return every term for every "
                "micro-batch, with weight 0 where it has nothing: ga.Loss.sum(zero, over=0)."
            )
        weights = {name: None if loss.weight is None else host_number(loss.weight) for name, loss in terms.items()}
        if len(terms) > 1 and self._totals is None:
            _require_one_weight(terms, weights)
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        for name, loss in terms.items():
            weight = weights[name]
            self._add(name, loss, weight)
            if _is_nothing(weight, loss):
                continue
            root = loss.root
            if root.dtype in (torch.float16, torch.bfloat16):
                # A seed of 7 / 37 in bf16 would be off by 0.4%, and a loss scale of 65,536 overflows fp16.
                root = root.float()
            expected = self._expected_total(name, weight)
            roots.append(root)
            seeds.append(self._seed(root, weight if loss.is_mean else 1.0, expected))
        return roots, seeds

    @property
    def correction(self) -> Number | None:
        """What the gradient has yet to be multiplied by; None where the expectation was right."""
        if self._totals is not None or self._expected is None:
            return None
        name = next(iter(self._weights))
        total = self._weights[name]
        assert total is not None, "a sum without a divisor is seeded with 1, and expects nothing"
        if isinstance(total, float | int) and isinstance(self._expected, float | int):
            return None if total == self._expected or total == 0 else self._expected / total
        return self._expected / total

    @property
    def weight(self) -> Number | dict[str, Number] | None:
        """The window's total weight; by name where the terms have totals of their own; None for plain sums."""
        found = {name: weight for name, weight in self._weights.items() if weight is not None}
        if not found:
            return None
        if len(self._weights) == 1 or self._totals is None:
            return next(iter(found.values()))
        return found

    @property
    def is_empty(self) -> bool:
        """Whether it is known on the host that the window weighs nothing at all."""
        return bool(self._weights) and all(
            not isinstance(weight, Tensor) and weight == 0 for weight in self._weights.values()
        )

    def check_totals(self) -> None:
        """That the weights seen add up to the totals given ahead.

        Raises:
            LossError: they do not, so the gradient has been divided by the wrong number.
        """
        for name, total in (self._totals or {}).items():
            seen = self._weights.get(name)
            if isinstance(total, Tensor) or isinstance(seen, Tensor) or seen is None:
                continue  # not compared: that would wait for the device
            if abs(seen - total) > 1e-6 * max(abs(total), abs(seen)):  # room for fp32 sums of class weights
                term = f"term {name!r}" if name else "loss"
                factor = f", so its gradient would be {seen / total:.4g} times what it should be" if total else ""
                raise LossError(
                    f"The total weight of the {term} was given as {total:g}, and its micro-batches add up to {seen:g}"
                    f"{factor}. weights= must count over the whole batch what the loss counts over each micro-batch."
                )

    def means(self) -> dict[str, Tensor]:
        """Each term's mean over the window, by name; sums where there is no divisor. Detached."""
        return {name: _mean(parts, self._weights[name]) for name, parts in self._parts.items()}

    def _add(self, name: str, loss: Loss, weight: Number | None) -> None:
        if name in self._parts:
            so_far = self._weights[name]
            if (so_far is None) != (weight is None):
                raise LossError(
                    "One micro-batch returned a sum without `over`, another a loss that has a weight. The one is not "
                    "to be divided by anything, the other is; their gradients cannot be added up. Return the same "
                    "kind for every micro-batch: ga.Loss.sum(total, over=n)."
                )
            self._weights[name] = None if weight is None else so_far + weight  # type: ignore[operator]
            parts = self._parts[name]
        else:
            self._weights[name] = weight
            parts = self._parts[name] = []
        total = loss.root.detach()  # no graph is kept alive by what is only reported
        parts.append((total, weight if loss.is_mean else 1.0))

    def _expected_total(self, name: str, weight: Number | None) -> Number | None:
        if self._totals is not None:
            if name not in self._totals:
                raise LossError(
                    f"weights= gave totals for {_names(self._totals)}, and the loss has the terms "
                    f"{_names(self._parts)}. Without a total {name!r} cannot be divided; return it from weights= too."
                )
            return self._totals[name]
        if weight is None:
            return None
        if self._expected is None:
            part, whole = self._first_share
            expected = weight * whole / part  # in this order, so that equal micro-batches give the very integer
            # A device count may turn out to be 0, which is not to be waited for: any other guess will do then.
            self._expected = (
                torch.where(expected > 0, expected, 1.0)
                if isinstance(expected, Tensor)
                else max(expected, self._at_least)
            )
        return self._expected

    def _seed(self, root: Tensor, weight: Number | None, expected: Number | None) -> Tensor:
        if expected is None:
            share: Number = 1.0
        else:
            assert weight is not None, "a total is expected only of losses that have a weight"
            share = weight / expected
        if isinstance(share, Tensor):
            return share.to(device=root.device, dtype=root.dtype)
        key = (share, root.dtype, root.device)
        seed = self._seeds.get(key)
        if seed is None:
            seed = self._seeds[key] = torch.full((), share, dtype=root.dtype, device=root.device)
        return seed


def _require_one_weight(terms: Mapping[str, Loss], weights: Mapping[str, Number | None]) -> None:
    """Terms with totals of their own need these before the first backward; terms of one common weight do not."""
    values = list(weights.values())
    same = all(_is_same(value, values[0]) for value in values)
    if not same:
        seen = ", ".join(f"{name!r} over {_shown(weight)}" for name, weight in weights.items())
        raise LossError(
            f"The terms of the loss are means over different things ({seen}), and one backward adds all of them to the "
            "same gradient, so each must be divided by its own total before that total has been seen. Give the totals "
            "ahead: weights=lambda batch: {" + ", ".join(f'"{name}": ...' for name in terms) + "}."
        )


def _is_same(one: Number | None, other: Number | None) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False  # equal or not: comparing would wait for the device
    return one == other


def _is_nothing(weight: Number | None, loss: Loss) -> bool:
    """Whether the micro-batch adds nothing to this term.

    A mean over nothing is 0 / 0, and a backward of it makes NaN however it is seeded, so it must not be run. For a
    count on a device that is one wait for the device; a sum needs none, since its gradient is 0 by itself.
    """
    if weight is None:
        return False
    if isinstance(weight, Tensor):
        return loss.is_mean and not bool(weight)  # the one synchronisation: Loss.mean over a device count
    return weight == 0


def _mean(parts: list[tuple[Tensor, Number | None]], weight: Number | None) -> Tensor:
    roots = [root for root, _ in parts]
    # fp64 where the device has it: at 1,000 micro-batches an fp32 sum would show in the seventh digit.
    wide = torch.float32 if roots[0].device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=roots[0].device)
    for root, share in parts:
        part = root.to(wide)
        if isinstance(share, Tensor):
            part = torch.where(share == 0, torch.zeros_like(part), part * share)
        elif share == 0:
            continue  # the NaN of a mean over nothing
        elif share is not None:
            part = part * share
        total = total + part.to(total.device)
    if weight is not None:
        total = total / weight
    narrow = roots[0].dtype
    return total.to(torch.float32 if narrow in (torch.float16, torch.bfloat16) else narrow)


def _names(terms: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in terms) or "none"


def _shown(weight: Number | None) -> str:
    if weight is None:
        return "nothing"
    return "a count on the device" if isinstance(weight, Tensor) else f"{weight:g}"
