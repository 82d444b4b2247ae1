"""Room for what the first update will allocate for good: the optimizer's state.

While the first batch is cut and tried, there is no state yet, so a size may fit that fails at the second update, with
Adam by twice the parameters' bytes. What the state will take is counted with fake tensors, and kept occupied meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from gradaccum.memory.out_of_memory import is_out_of_memory


@contextmanager
def state_reserved(optimizers: Sequence[Optimizer], device: torch.device) -> Iterator[None]:
    """Occupies the bytes of the optimizers' states to come, until it is left.

    Nothing is done where all have their states, or on a CPU whose memory ends in no error.
    """
    new = [optimizer for optimizer in optimizers if not optimizer.state]
    held = _occupied(new, device) if new and _ends_in_an_error(device) else None
    try:
        yield
    finally:
        del held


def _occupied(optimizers: Sequence[Optimizer], device: torch.device) -> torch.Tensor | None:
    from gradaccum.memory.optimizer_memory import optimizer_memory  # fake tensors take a while to import

    num_bytes = optimizer_memory(optimizers).state
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None  # there is no room for the state at all: the update itself will say so


def _ends_in_an_error(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
