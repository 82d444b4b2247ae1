"""How the audit cuts a batch: ragged, since equal pieces hide every mean that was taken over something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from gradaccum import tree
from gradaccum.types import Rows


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of the batch: consecutive ones, from ``start`` up to ``stop``, or those that ``order`` lists."""

    index: int  # 1 for the first micro-batch; 0 for the whole batch
    start: int
    stop: int
    order: Tensor | None = field(
        default=None, compare=False
    )  # of a split that packs rows; ``start`` is then its first row

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


def planned_pieces(plan: Sequence[Rows], *, first: int = 1) -> list[Piece]:
    """Returns the pieces of a split's plan, numbered from ``first``.

    Example:
        >>> [piece.rows for piece in planned_pieces([slice(0, 2), torch.tensor([4, 2, 3])])]
        [2, 3]
    """
    return [
        Piece(i, rows.start, rows.stop)
        if isinstance(rows, slice)
        else Piece(i, int(rows[0]), int(rows[0]) + 1, order=rows.cpu())
        for i, rows in enumerate(plan, start=first)
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
    """A split into given pieces. A step that is handed the numbers of the rows, ``torch.arange(rows)``, so runs them.

    Who knows the batch cuts it: a micro-batch's piece is known by its first number.
    """

    pieces: Sequence[Piece]

    def rows(self, batch: Tensor) -> int:
        """See `Split`."""
        return len(batch)

    def largest(self, batch: Tensor) -> int:
        """See `Split`."""
        return max(piece.rows for piece in self.pieces)

    def plan(self, batch: Tensor, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """See `Split`; the pieces are the same whatever size is asked for."""
        return [piece.where for piece in self.pieces]

    def cut(self, batch: Tensor, rows: Rows) -> Tensor:
        """See `Split`."""
        return batch[rows]


def copied(batch: Any) -> Any:
    """Returns the same batch with copies of its tensors."""
    return tree.map_leaves(batch, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
