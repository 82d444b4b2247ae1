"""A batch into micro-batches of as many samples each as can be."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gradaccum import tree
from gradaccum.errors import BatchError, WindowError
from gradaccum.types import Rows, Split


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
        micro_batch_size = size if max_rows is None else min(size, max_rows)
        if micro_batch_size < 1:
            raise WindowError(
                f"micro_batch_size={micro_batch_size}: a micro-batch has at least one sample. "
                "Pass the largest number of samples that fits in memory."
            )
        return list(_pieces(rows, micro_batch_size))

    def cut(self, batch: Any, rows: Rows) -> Any:
        return tree.take(batch, rows)


@functools.lru_cache(maxsize=4)  # nearly all batches of a run have the same number of rows
def _pieces(rows: int, micro_batch_size: int) -> tuple[slice, ...]:
    pieces = -(-rows // micro_batch_size)
    size, longer = divmod(rows, pieces)
    starts = [i * size + min(i, longer) for i in range(pieces + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(starts))


def rows_to_split(batch: Any) -> int:
    """The number of rows of a batch that is to be cut, at least one.

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
