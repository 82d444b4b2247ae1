"""Models as they are wrapped for several processes, and one that does not use all of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tasks import Batch


class Branches(nn.Module):
    """Uses a layer only where a row asks for it, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 3)
        self.sometimes = nn.Linear(4, 3)
        self.never = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        asks = batch["x"][:, 0, 0] > 1.0
        output = self.always(batch["x"])
        if bool(asks.any()):
            output = output + asks[:, None, None] * self.sometimes(batch["x"])
        return output


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "plain":
        return model
    options: dict[str, Any] = {
        "DDP": {},
        "DDP, unused": {"find_unused_parameters": True},
        "DDP, static": {"static_graph": True},
        "DDP, views": {"gradient_as_bucket_view": True},
    }[how]
    return DistributedDataParallel(model, **options)
