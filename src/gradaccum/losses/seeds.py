"""What backwards start with, kept where it is needed again: most windows, and most micro-batches of one, are alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradaccum.losses.term_sum import Number

_MAX_SEEDS = 256


class Again(NamedTuple):
    """A plain mean over samples, for others like it.

    Attributes:
        samples: that it was a mean over.
        dtype: its own.
        device: its own; None for the host.
        seeds: what its backward started with.
    """

    samples: int
    dtype: torch.dtype
    device: torch.device | None
    seeds: tuple[Tensor]


class Start(NamedTuple):
    """How a window began, for others that begin like it.

    Attributes:
        first_share: see `Normaliser`.
        at_least: see `Normaliser`.
        expected: its total, as it was expected then.
        again: its first loss.
    """

    first_share: tuple[int, int]
    at_least: float
    expected: Number
    again: Again


class Seeds:
    """0-d tensors to start backwards with, made once for each value: most windows need the same few.

    Attributes:
        start: of the last window that began with a plain mean, and whose total was not known then; None for none.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self.start: Start | None = None

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
