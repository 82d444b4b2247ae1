"""What is audited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
