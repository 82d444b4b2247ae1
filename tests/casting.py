"""Weights under autocast: a small model, losses with and without torch's cache of casts, and what can be seen of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, FEATURES, MICRO_BATCHES = 16, 8, 4


class Casts(TorchDispatchMode):
    """Counts how often parameters of a model are cast to bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {id(parameter) for parameter in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self._own:
            self.count += 1
        return func(*args, **(kwargs or {}))


def make() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, FEATURES), nn.Linear(FEATURES, 2))


def autocast(*, cache_enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    with autocast():
        return model(x).float().square().mean()


def loss_without_cache(model: nn.Module, x: Tensor) -> Tensor:
    with autocast(cache_enabled=False):
        return model(x).float().square().mean()


def nesting() -> int:
    """Levels of autocast that are held in this thread."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def is_cache_empty(model: nn.Module) -> bool:
    """Whether weights are cast anew; looked at without leaving an outermost context, which would clear the cache."""
    torch.autocast_increment_nesting()
    try:
        with Casts(model) as casts, autocast(), torch.no_grad():
            model(torch.ones(1, FEATURES))
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
    return casts.count == len(list(model.parameters()))
