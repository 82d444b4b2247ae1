"""What one window had in all, and the `Update` that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradaccum.losses.loss import Loss
from gradaccum.losses.normalise import SINGLE, Normaliser, Number
from gradaccum.types import Update


class Counted(NamedTuple):
    """A window's counts, over all processes where there are several.

    Attributes:
        micro_batches: in all.
        samples: in all; None where some could not be seen.
        largest: rows of the largest micro-batch; None where some could not be seen.
        correction: what the gradient has yet to be multiplied by; None for nothing.
        is_over: whether no process had a window to close any more.
        is_incomplete: whether some process had none.
    """

    micro_batches: int
    samples: int | None
    largest: int | None
    correction: Number | None = None
    is_over: bool = False
    is_incomplete: bool = False

    @staticmethod
    def of(sizes: Sequence[int | None], correction: Number | None) -> Counted:
        """The counts of a window of one process.

        Args:
            sizes: rows of each micro-batch; None where they could not be seen.
            correction: see the class.
        """
        number = len(sizes)
        if number and sizes.count(first := sizes[0]) == number:  # as nearly always
            return Counted(number, None if first is None else first * number, first, correction)
        if None in sizes:
            return Counted(number, None, None, correction)
        known = cast("Sequence[int]", sizes)
        return Counted(number, sum(known), max(known, default=0), correction)


def update_of(
    normaliser: Normaliser,
    counted: Counted,
    *,
    index: int,
    grad_norm: Tensor | None,
    skipped: bool | Tensor,
    seconds: float,
    peak_bytes: int | None,
) -> Update:
    """The update that was made; what waits for the device is computed when it is read."""
    means = _Means(normaliser)
    later: dict[str, Callable[[], Any]] = {"loss": means.loss, "losses": means.losses}
    values: dict[str, Any] = {
        "index": index,
        "weight": normaliser.weight,
        "grad_norm": grad_norm,
        "samples": counted.samples,
        "micro_batches": counted.micro_batches,
        "micro_batch_size": counted.largest,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "noise_scale": None,
        "_later": later,
    }
    if isinstance(skipped, Tensor):
        later["skipped"] = lambda: bool(skipped)
    else:
        values["skipped"] = skipped
    return Update.made(values)


class _Means:
    """A window's means, computed when they are first asked for."""

    __slots__ = ("_means", "_normaliser")

    def __init__(self, normaliser: Normaliser) -> None:
        self._normaliser = normaliser
        self._means: dict[str, Tensor] | None = None

    def loss(self) -> Tensor:
        return sum_of(self._computed())

    def losses(self) -> dict[str, Tensor]:
        return {name: mean for name, mean in self._computed().items() if name != SINGLE}

    def _computed(self) -> dict[str, Tensor]:
        if self._means is None:
            self._means = self._normaliser.means()
        return self._means


def sum_of(means: Mapping[str, Tensor]) -> Tensor:
    """The loss of several terms."""
    values = list(means.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def loss_of(normaliser: Normaliser) -> Loss:
    """The window's whole loss, detached: the mean and what it is over; for several terms their sum."""
    means, weight = normaliser.means(), normaliser.weight
    if len(means) > 1 or isinstance(weight, dict):
        return Loss(sum_of(means), None, is_mean=False)
    return Loss(sum_of(means), weight, is_mean=weight is not None)
