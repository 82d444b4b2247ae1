"""The random state of every process: saved in types that are loaded without running code, and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradaccum.checkpoint.plain_data import as_plain_data
from gradaccum.window.snapshot import RandomState


def random_state() -> dict[str, Any]:
    """The state of this process's generators, in types that are loaded without running code."""
    version, numbers, gauss = random.getstate()
    state = RandomState.now()
    found: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "cpu": state.cpu,
        "cuda": list(state.cuda.values()),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = as_plain_data(numpy.random.get_state(), "numpy's random state")
    return found


def restore_random_state(by_rank: Sequence[Mapping[str, Any]], *, rank: int, world_size: int) -> None:
    """Goes on with the state that this process saved; on another number of processes with streams of their own."""
    is_another_size = len(by_rank) != world_size
    state = by_rank[0 if is_another_size else rank]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    RandomState(state["cpu"], dict(enumerate(state["cuda"][: torch.cuda.device_count()]))).restore()
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(state["numpy"])
    if is_another_size and rank > 0:  # a stream of its own, or it would draw what rank 0 draws
        seed = int(torch.randint(0, 1 << 62, ())) + rank
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % (1 << 32))
