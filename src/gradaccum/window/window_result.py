"""What one window had in all, and the `Update` and the `Loss` that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradaccum.losses.loss import Loss
from gradaccum.losses.normaliser import SINGLE, Normaliser, Number
from gradaccum.sync.messages import Message
from gradaccum.types import Update
from gradaccum.window.seconds import Spent


class WindowResult(NamedTuple):
    """A window's counts, over all processes where there are several.

    Attributes:
        micro_batches: in all.
        samples: in all; None where some could not be seen.
        largest: rows of the largest micro-batch; None where some could not be seen.
        correction: what the gradient has yet to be multiplied by; None for nothing.
        is_over: whether no process had a window to close any more.
        is_incomplete: whether some process had none.
        stops: whether some process has been told to save and to leave.
    """

    micro_batches: int
    samples: int | None
    largest: int | None
    correction: Number | None = None
    is_over: bool = False
    is_incomplete: bool = False
    stops: bool = False

    @staticmethod
    def of(sizes: Sequence[int | None], correction: Number | None) -> WindowResult:
        """The counts of a window of one process, from the rows of each micro-batch; None where they are unknown."""
        if None in sizes:
            return WindowResult(len(sizes), None, None, correction)
        known = cast("Sequence[int]", sizes)
        return WindowResult(len(sizes), sum(known), max(known, default=0), correction)

    @staticmethod
    def over_ranks(messages: Sequence[Message], correction: Number | None) -> WindowResult:
        """The counts of a window of all processes, from the messages at its end."""
        is_known = not any(message.has_unknown_sizes for message in messages)
        return WindowResult(
            micro_batches=sum(message.micro_batches for message in messages),
            samples=sum(message.samples for message in messages) if is_known else None,
            largest=max(message.largest for message in messages) if is_known else None,
            correction=correction,
            is_over=all(message.is_done for message in messages),
            is_incomplete=any(message.is_done for message in messages),
            stops=any(message.wants_to_stop for message in messages),
        )


def update_of(
    normaliser: Normaliser,
    result: WindowResult,
    *,
    index: int,
    grad_norm: Tensor | None,
    skipped: bool | Tensor,
    spent: Spent,
    peak_bytes: int | None,
    noise_scale: Callable[[], float | None],
) -> Update:
    """The update that was made; what waits for the device is computed when it is read."""
    later: dict[str, Callable[[], Any]] = {
        "loss": lambda: sum_of(normaliser.means()),
        "losses": lambda: {name: mean for name, mean in normaliser.means().items() if name != SINGLE},
        "skipped": lambda: bool(skipped),
        "noise_scale": noise_scale,
    }
    return Update(
        index=index,
        weight=normaliser.weight,
        grad_norm=grad_norm,
        samples=result.samples,
        micro_batches=result.micro_batches,
        micro_batch_size=result.largest,
        **spent._asdict(),
        peak_bytes=peak_bytes,
        _later=later,
    )


def sum_of(means: Mapping[str, Tensor]) -> Tensor:
    """The loss of several terms: the sum of their means, 0-d."""
    values = list(means.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def loss_of(normaliser: Normaliser) -> Loss:
    """The window's whole loss, detached: the mean and what it is over; for several terms the sum of their means."""
    means, weight = normaliser.means(), normaliser.weight
    if len(means) > 1 or isinstance(weight, dict):
        return Loss(sum_of(means), None, is_mean=False)
    return Loss(sum_of(means), weight, is_mean=weight is not None)
