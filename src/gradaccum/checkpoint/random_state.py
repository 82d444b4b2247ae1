"""The random state of Python and torch, in types that can be loaded without running code."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The present state of Python's generator, the CPU's, and every CUDA device's in use."""
    version, numbers, gauss = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "python": [version, list(numbers), gauss],
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(index) for index in devices],
    }


def restore(state: Mapping[str, Any]) -> None:
    """Makes it the present state, on as many devices as there are."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["cpu"])
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)


def restore_for_another_rank(state: Mapping[str, Any], rank: int) -> None:
    """A stream of its own, for a process that was not there when the state was saved."""
    restore(state)
    seed = int(torch.randint(0, 1 << 62, ())) + rank
    torch.manual_seed(seed)
    random.seed(seed)
