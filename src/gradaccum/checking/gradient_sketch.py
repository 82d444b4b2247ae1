"""Gradients to compare, small enough to keep a dozen: large ones as a sketch that adds up as they do.

    sketch(g) = signs @ g.view(-1, SIZE)          signs: +1 or -1 at random, the same in every run

A linear map: if gradients add up their sketches do, and if they do not, the difference shows in all of SIZE sums of
random signs at once. Its squared norm is the gradient's in expectation, so relative errors keep their size (Alon,
Matias and Szegedy, "The space complexity of approximating the frequency moments", 1996). Elements picked from the
gradient instead would miss the few rows of a large embedding that a small batch reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradaccum.checking.compare import flat
from gradaccum.types import HALF_DTYPES

SIZE = 1 << 13  # numbers that are kept of a parameter's gradient: 64 KiB


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """The gradients of all parameters, one vector on the host in float64; as a sequence, one vector each or None.

    Attributes:
        vector: all of them, zeros for a parameter that has none.
        sizes: how many numbers of it belong to each parameter.
        is_there: which parameters have a gradient.
    """

    vector: Tensor
    sizes: tuple[int, ...]
    is_there: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor | None]:
        parts = self.vector.split(self.sizes)
        return (part if there else None for part, there in zip(parts, self.is_there, strict=True))

    def norms(self) -> Tensor:
        """Returns the norm of each parameter's gradient."""
        return norms_of(self.vector, self.sizes)


def norms_of(vector: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the norms of consecutive pieces of a vector."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.zeros(len(sizes), dtype=vector.dtype).index_add_(0, owner, vector.square()).sqrt()


def sketch_of(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradient:
    """Returns what is kept of gradients; those of parameters with at most SIZE numbers are kept whole."""
    kept = [
        torch.zeros(_size(parameter), dtype=torch.float64) if gradient is None else _sketch(gradient)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    sizes = tuple(one.numel() for one in kept)
    return Gradient(torch.cat(kept), sizes, tuple(gradient is not None for gradient in gradients))


def _size(parameter: Tensor) -> int:
    local = _local(parameter)
    return min(local.numel() * (2 if local.is_complex() else 1), SIZE)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor: shards add up as the whole does."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def _sketch(gradient: Tensor) -> Tensor:
    local = _local(gradient)
    if local.is_sparse or local.is_complex() or local.numel() <= SIZE:
        vector = flat(local)
    else:  # no copy of a large one; in half precision the sums would be rounded to it
        vector = local.reshape(-1).float() if local.dtype in HALF_DTYPES else local.reshape(-1)
    if len(vector) <= SIZE:
        return vector.double().cpu()
    rows, rest = divmod(len(vector), SIZE)
    made = torch.Generator().manual_seed(rows)
    signs = (torch.randint(0, 2, (rows,), generator=made) * 2 - 1).to(vector)
    with torch.autocast(vector.device.type, enabled=False):
        sketch = (signs @ vector[: rows * SIZE].view(rows, SIZE)).double().cpu()
    sketch[:rest] += vector[rows * SIZE :].double().cpu()
    return sketch
