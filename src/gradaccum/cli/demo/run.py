"""What a training run leaves behind, for comparison with another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A training run, update by update.

    Attributes:
        losses: mean loss of each update's batch, float64 ``[updates]``.
        weights: units that each of those means was taken over, ``[updates]``.
        parameters: all parameters after each update, float64 ``[updates, parameters]``.
        gradients: what the optimizer was given at each update, float64 ``[updates, parameters]``.
    """

    losses: Tensor
    weights: Tensor
    parameters: Tensor
    gradients: Tensor

    def epoch_losses(self, updates_per_epoch: int) -> list[float]:
        """Mean over an epoch's units of what the loss on each was when the model saw it.

        Taken over units for every way of training alike, so that a difference in it is one of the models, not one of
        bookkeeping.
        """
        totals = (self.losses * self.weights).split(updates_per_epoch)
        weights = self.weights.split(updates_per_epoch)
        return [float(total.sum() / weight.sum()) for total, weight in zip(totals, weights, strict=True)]


class Recorder:
    """Writes a run down.

    It looks at the gradients from a hook of the optimizer, so a way of training need not know that it is watched.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, on_update: Callable[[], None]) -> None:
        self._parameters = list(model.parameters())
        self._on_update = on_update
        self._seen: list[tuple[float, float]] = []  # mean loss and units of all that was seen since the last update
        self._losses: list[float] = []
        self._weights: list[float] = []
        self._after: list[Tensor] = []
        self._gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: self._gradients.append(_flat(p.grad for p in self._parameters)))

    def saw(self, loss: float, units: float) -> None:
        """A forward and backward gave this mean loss over so many units."""
        self._seen.append((loss, units))

    def updated(self) -> None:
        """The optimizer has stepped; what was seen since the last time was its batch."""
        units = sum(units for _, units in self._seen)
        self._losses.append(sum(loss * units for loss, units in self._seen) / units)
        self._weights.append(units)
        self._seen.clear()
        self._after.append(_flat(self._parameters))
        self._on_update()

    def run(self) -> Run:
        """All that was written down."""
        return Run(
            losses=torch.tensor(self._losses, dtype=torch.float64),
            weights=torch.tensor(self._weights, dtype=torch.float64),
            parameters=torch.stack(self._after),
            gradients=torch.stack(self._gradients),
        )


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors if tensor is not None])
