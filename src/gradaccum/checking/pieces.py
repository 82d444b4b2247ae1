"""How the audit cuts a batch: ragged, since equal pieces hide every mean that was taken over something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.types import Rows, Split


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of the batch: consecutive ones, from ``start`` up to ``stop``, or those that ``order`` lists."""

    index: int  # 1 for the first micro-batch; 0 for the whole batch
    start: int
    stop: int
    order: Tensor | None = None  # of a split that packs rows; ``start`` is then its first row

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start if self.order is None else len(self.order)

    @property
    def where(self) -> Rows:
        """The rows, to index a tensor with."""
        return slice(self.start, self.stop) if self.order is None else self.order


def whole(rows: int) -> Piece:
    """Returns the piece that holds all rows."""
    return Piece(0, 0, rows)


def pieces(sizes: Sequence[int]) -> list[Piece]:
    """Returns consecutive pieces of the given sizes."""
    return [Piece(i, *ends) for i, ends in enumerate(pairwise(accumulate(sizes, initial=0)), start=1)]


def planned_pieces(plan: Sequence[Rows]) -> list[Piece]:
    """Returns the pieces of a split's plan.

    Example:
        >>> [piece.rows for piece in planned_pieces([slice(0, 2), torch.tensor([4, 2, 3])])]
        [2, 3]
    """
    return [
        Piece(i, rows.start, rows.stop)
        if isinstance(rows, slice)
        else Piece(i, int(rows[0]), int(rows[0]) + 1, order=rows.cpu())
        for i, rows in enumerate(plan, start=1)
    ]


def equal_sizes(rows: int, micro_batch_size: int) -> list[int]:
    """Returns sizes as in training: at most so many rows each, as equal as can be, and two pieces or more."""
    return _balanced(rows, max(-(-rows // micro_batch_size), 2))


def ragged_sizes(rows: int, micro_batch_size: int) -> list[int]:
    """Returns sizes of at most so many rows that are not all alike; single rows only where there is no other way.

    Example:
        >>> ragged_sizes(16, 8), ragged_sizes(12, 6), ragged_sizes(13, 4)
        ([6, 5, 5], [5, 4, 3], [4, 3, 3, 3])
    """
    sizes = equal_sizes(rows, micro_batch_size)
    if sizes[0] == sizes[-1] == micro_batch_size and micro_batch_size > 1:  # full: one piece more leaves room
        sizes = _balanced(rows, len(sizes) + 1)
    if sizes[0] == sizes[-1] and 2 < sizes[0] < micro_batch_size:
        sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
    return sizes


def _balanced(rows: int, count: int) -> list[int]:
    size, longer = divmod(rows, count)
    return [size + (i < longer) for i in range(count)]


@dataclass(frozen=True, slots=True)
class FixedSplit:
    """A split into given pieces of batches that come with the numbers of their rows: ``(batch, numbers)``.

    By its numbers a micro-batch is known again. Each is a copy, since a loss function may write into it.
    """

    pieces: Sequence[Piece]
    cut_by: Split

    def rows(self, batch: Any) -> int:
        """See `Split`."""
        return len(batch[1])

    def largest(self, batch: Any) -> int:
        """See `Split`."""
        return max(piece.rows for piece in self.pieces)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """See `Split`; the pieces are the same whatever size is asked for."""
        return [piece.where for piece in self.pieces]

    def cut(self, batch: Any, rows: Rows) -> Any:
        """See `Split`."""
        return copied(self.cut_by.cut(batch[0], rows)), batch[1][rows]


def numbered(batch: Any, rows: int) -> Any:
    """Returns a batch with the numbers of its rows, as `FixedSplit` cuts it."""
    return batch, torch.arange(rows)


def copied(batch: Any) -> Any:
    """Returns the same batch with copies of its tensors."""
    return tree.map_leaves(batch, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
