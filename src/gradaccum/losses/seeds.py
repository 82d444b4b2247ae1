"""What backwards start with, kept where it is needed again: most windows, and most micro-batches of one, are alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradaccum.losses.term_sum import Number, TermSum

_MAX_SEEDS = 256


class Seeds:
    """0-d tensors to start backwards with, made once for each value: most windows need the same few."""

    def __init__(self) -> None:
        self._made: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def of(self, share: Number, root: Tensor) -> Tensor:
        """``share`` as a tensor like ``root``."""
        if isinstance(share, Tensor):
            return share.to(device=root.device, dtype=root.dtype)
        key = (share, root.dtype, root.device)
        seed = self._made.get(key)
        if seed is None:
            if len(self._made) >= _MAX_SEEDS:  # token counts give a new value each time
                self._made.clear()
            seed = self._made[key] = torch.full((), share, dtype=root.dtype, device=root.device)
        return seed


class Again(NamedTuple):
    """A plain mean over samples, for others like it in its window.

    Attributes:
        samples: that it was a mean over.
        dtype: its own.
        device: its own; None for the host.
        term: that it was added to.
        seeds: what its backward started with.
    """

    samples: int
    dtype: torch.dtype
    device: torch.device | None
    term: TermSum
    seeds: tuple[Tensor]
