"""What is a loss a mean over? Found by numbers, where its graph says nothing: compiled models, fused heads.

A micro-batch of two or more rows is run whole and in two halves. If the loss is a mean over n things of which the
halves have a and b, then

    loss(whole) = (a loss(first) + b loss(second)) / (a + b)

and of the counts that can be taken of a batch (rows, labels that count, elements) most fail this. Those that pass are
tried again on later micro-batches, of which they say different things. Where none passes the loss is no mean at all: it
couples samples (contrastive losses, rankings), and no weight makes micro-batches of it the whole batch.

Costs three forwards, in evaluation mode, of a micro-batch or two. Rows keep their padding. Not seen is what depends on
the padding itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import LossError

_IGNORED = -100
_TOLERANCE = 2e-5  # fp32 forwards in two shapes; a wrong count is off by a row's share of the loss
_LOW_PRECISION = 4e-3  # bf16 and fp16 autocast

Measure = Callable[[Any], float]
"""From some rows to their loss."""


class MeanByNumbers:
    """Finds the count that a trainer's loss is a mean over.

    Args:
        rows_of: counts a micro-batch's rows.
        halves_of: its two halves; None where it cannot be cut.
    """

    def __init__(self, rows_of: Callable[[Any], int], halves_of: Callable[[Any], Sequence[Any] | None]) -> None:
        self._rows_of = rows_of
        self._halves_of = halves_of
        self._possible: dict[str, float] | None = None  # with what each counted in the first that was measured
        self._unit = 1.0  # the first candidate's, by which earlier micro-batches were weighed

    def is_wanted(self, inputs: Any) -> bool:
        """Whether a micro-batch is to be measured: the first; and later ones that tell candidates apart."""
        if self._rows_of(inputs) < 2:
            return False
        if self._possible is None:
            return True
        counts = counts_of(inputs, self._rows_of(inputs))
        shares = {round(counts[name] / first, 9) for name, first in self._possible.items() if name in counts}
        return len(shares) > 1

    def measure(self, inputs: Any, measure: Measure) -> None:
        """Runs a micro-batch and its halves, and keeps the counts that fit.

        Raises:
            LossError: none does.
        """
        number, parts = self._rows_of(inputs), self._halves_of(inputs)
        if parts is None:
            return
        whole, *halves = (measure(one) for one in (inputs, *parts))
        if not math.isfinite(whole):
            return  # nothing counts in this one
        counts = [counts_of(part, self._rows_of(part)) for part in parts]
        names = [name for name in counts[0] if name in counts[1]]
        rounding = (
            _LOW_PRECISION if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") else _TOLERANCE
        )
        fitting = [name for name in names if _fits(whole, halves, [found[name] for found in counts], rounding)]
        before = self._possible
        if before is None:
            in_all = counts_of(inputs, number)
            possible = {name: in_all[name] for name in fitting}
        else:
            possible = {name: first for name, first in before.items() if name in fitting}
            if possible:
                self._unit *= next(iter(before.values())) / next(iter(possible.values()))
        self._possible = possible or before
        if not possible:
            values = ", ".join(f"{value:.6g}" for value in halves)
            raise LossError(
                f"The loss of a micro-batch of {number} rows is {whole:.6g}, and of its two halves {values}. It is the "
                f"mean of these over none of the counts that can be taken of a batch ({', '.join(names)}), so it is "
                "no mean over samples: it couples them (a contrastive loss, a ranking), or is a mean over something "
                "that only you know. Micro-batches of it do not add up to the whole batch's gradient. If you know "
                "what it is a mean over, return ga.Loss.mean(loss, over=n) from compute_loss, or pass weights=; for a "
                "loss that couples samples use ga.TrainStep with forward= and batch_loss=."
            )

    def count(self, inputs: Any) -> float:
        """What the loss of a micro-batch is a mean over, by the counts that fitted.

        Raises:
            LossError: no micro-batch could be measured.
        """
        found = self.count_or_none(inputs)
        if found is None:
            raise LossError(
                f"It cannot be seen what the loss is a mean over, and it could not be measured: the micro-batch has "
                f"{self._rows_of(inputs)} rows, and measuring takes two. Its share of the gradient would be a guess. "
                "Return ga.Loss.mean(loss, over=n) from compute_loss, or pass weights=lambda micro_batch: n."
            )
        return found

    def count_or_none(self, inputs: Any) -> float | None:
        """The same; None where no micro-batch has been measured."""
        counts = counts_of(inputs, self._rows_of(inputs))
        name = next((name for name in self._possible or () if name in counts), None)
        return None if name is None else counts[name] * self._unit


def counts_of(inputs: Any, rows: int) -> dict[str, float]:
    """Everything that a loss on a micro-batch is likely to be a mean over, by what it is called."""
    found: dict[str, float] = {"samples": rows}
    for key, value in inputs.items() if isinstance(inputs, Mapping) else ():
        if not isinstance(value, Tensor) or "label" not in str(key) or not value.dim():
            continue
        found[f"{key}, elements"] = value.numel()
        if not value.is_floating_point():
            found[f"{key}, not {_IGNORED}"] = int((value != _IGNORED).sum())
            if value.dim() > 1:
                found[f"{key} but the first of each row, not {_IGNORED}"] = int((value[..., 1:] != _IGNORED).sum())
    return found


def _fits(whole: float, halves: list[float], counts: list[float], rounding: float) -> bool:
    total = sum(counts)
    if not total:
        return False
    mean = sum(count * value for count, value in zip(counts, halves, strict=True) if count) / total
    return abs(mean - whole) <= rounding * abs(whole) + 1e-7
