"""A batch into consecutive micro-batches, as equal as they can be: of samples, or of whole groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from gradaccum import tree
from gradaccum.errors import BatchError, WindowError
from gradaccum.types import GhostBatch, Rows, Split


def split_by_samples() -> Split:
    """Cuts a batch into consecutive pieces of at most the given number of rows, as equal as can be.

    13 rows at a size of 4 become 4 + 3 + 3 + 3, not 4 + 4 + 4 + 1: as many pieces, but none so small that a device
    idles in it, and at most two shapes for a compiler to see.

    Example:
        >>> split = ga.split_by_samples()
        >>> split.plan(torch.zeros(13, 2), 4)
        [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None), slice(10, 13, None)]
    """
    return _BySamples()


@dataclass(frozen=True, slots=True)
class _BySamples:
    def largest(self, batch: Any) -> int:
        return tree.rows(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        rows = rows_to_split(batch)
        size = size if max_rows is None else min(size, max_rows)
        if size < 1:
            raise WindowError(
                f"micro_batch_size={size}: a micro-batch has at least one sample. "
                "Pass the largest number of samples that fits in memory."
            )
        return _equal_pieces(range(rows + 1), size)

    def cut(self, batch: Any, rows: Rows) -> Any:
        return tree.take(batch, rows)


def split_by_groups(groups: GhostBatch) -> Split:
    """Cuts a batch between the groups that `GhostBatch` normalises; the size of a piece counts groups.

    Example:
        >>> from gradaccum.split.by_samples import split_by_groups
        >>> split_by_groups(ga.GhostBatch(4)).plan(torch.zeros(18, 2), 2)
        [slice(0, 8, None), slice(8, 16, None), slice(16, 18, None)]
    """
    return _ByGroups(groups)


@dataclass(frozen=True, slots=True)
class _ByGroups(_BySamples):
    groups: GhostBatch

    def largest(self, batch: Any) -> int:
        return len(self.groups.group_sizes(tree.rows(batch)))

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        if max_rows is not None:
            size = min(size, max_rows // self.groups.samples)
        if size < 1:
            raise WindowError(
                f"micro_batch_size={max_rows} holds no group of ga.GhostBatch({self.groups.samples}). BatchNorm's "
                f"statistics are those of whole groups: pass micro_batch_size={self.groups.samples} or more, or "
                "smaller groups."
            )
        sizes = self.groups.group_sizes(rows_to_split(batch))
        return _equal_pieces(list(accumulate(sizes, initial=0)), size)


def _equal_pieces(bounds: Sequence[int], size: int) -> list[slice]:
    """Cuts at some of ``bounds``, with at most ``size`` of the units between them in a piece."""
    num_units = len(bounds) - 1
    num_pieces = -(-num_units // size)
    units, longer = divmod(num_units, num_pieces)  # the first `longer` pieces have one unit more
    cuts = [bounds[i * units + min(i, longer)] for i in range(num_pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def rows_to_split(batch: Any) -> int:
    """The number of rows of a batch, which is at least one.

    Raises:
        BatchError: there is no tensor with rows, two disagree, or there are 0.
    """
    rows = tree.rows(batch)
    if rows == 0:
        raise BatchError(
            "The batch has 0 rows. A mean over no samples is 0 / 0, so there is no gradient to make an update "
            "from. Leave empty batches out."
        )
    return rows
