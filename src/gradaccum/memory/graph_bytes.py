"""How much memory an autograd graph holds: what its nodes have saved for the backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class GraphBytes:
    """A count of saved bytes.

    Attributes:
        count: bytes of the storages saved so far, each counted once.
    """

    def __init__(self, not_counted: Iterable[Tensor]) -> None:
        self.count = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in not_counted if _has_storage(tensor)}

    def add(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that is saved, and returns it."""
        if _has_storage(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:  # all of them are alive, so no address is used twice
                self._seen.add(storage.data_ptr())
                self.count += storage.nbytes()
        return tensor


@contextmanager
def graph_bytes(not_counted: Iterable[Tensor]) -> Iterator[GraphBytes]:
    """Counts what the forwards inside save for their backward, less storages that are there anyway.

    The same on every device, and it costs about a microsecond a saved tensor. What checkpoints save is counted, what
    they will recompute is not.

    Args:
        not_counted: parameters, buffers and inputs.

    Example:
        >>> from gradaccum.memory.graph_bytes import graph_bytes
        >>> layer, x = nn.Linear(5, 7), torch.randn(3, 5)
        >>> with graph_bytes([*layer.parameters(), x]) as saved:
        ...     y = layer(x).sigmoid()
        >>> saved.count  # the sigmoid keeps its output, 3 x 7 numbers; the layer its input, which is there anyway
        84
    """
    counted = GraphBytes(not_counted)
    with torch.autograd.graph.saved_tensors_hooks(counted.add, _unchanged):
        yield counted


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
