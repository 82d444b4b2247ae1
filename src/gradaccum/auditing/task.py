"""What is audited, and what may be taken out of it to see what difference that makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.whole_batch.runners import Combine
from gradaccum.window.weights import WeightsFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is audited.

    Attributes:
        models: all modules.
        model: what the user's functions are called with: a module, or a sequence of them.
        loss_fn: ``loss_fn(model, micro_batch)``; None where there is a ``batch_loss``.
        forward: ``forward(model, micro_batch)``, for a loss over the whole batch's outputs.
        batch_loss: ``batch_loss(outputs, batch)``.
        combine: how outputs become the whole batch's.
        weights: counts what plain means of the loss are taken over; None where the user did not say.
        batch: at least two rows.
        rows: of the batch.
        device: where the models are.
    """

    models: Sequence[nn.Module]
    model: Any
    loss_fn: Callable[[Any, Any], Any] | None
    forward: Callable[[Any, Any], Any] | None
    batch_loss: Callable[[Any, Any], Any] | None
    combine: Combine = "concat"
    weights: WeightsFunction | None
    batch: Any
    rows: int
    device: torch.device

    def modules(self) -> dict[str, nn.Module]:
        """Every module by its qualified name, a model itself by its class's."""
        found: dict[str, nn.Module] = {}
        for i, model in enumerate(self.models):
            prefix = f"{i}." if len(self.models) > 1 else ""
            for name, module in model.named_modules():
                found[prefix + (name or type(module).__name__)] = module
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Without:
    """Faults that are taken out of a run, on both sides.

    Attributes:
        layers: names of modules that are made to see one sample at a time (BatchNorm: its running statistics).
        draws: what is drawn once for each forward is drawn alike in all of them.
        states: buffers start every forward as they started the first.
        shares: of the micro-batches' losses in the whole, in place of those that the library gives them.
        pull: the gradient on the model's outputs that the whole batch's loss has, in place of each micro-batch's own.
        nudge: no fault: by what part every parameter is moved, up or down, to see how far rounding may go.
    """

    layers: frozenset[str] = frozenset()
    draws: bool = False
    states: bool = False
    shares: tuple[float, ...] | None = None
    pull: tuple[Tensor, ...] | None = None
    nudge: float = 0.0


NOTHING = Without()
