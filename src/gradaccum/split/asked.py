"""What a split is asked for besides its plan, and what stands in where one of a user's own does not say it."""

from __future__ import annotations

from typing import Any

from gradaccum import tree
from gradaccum.types import Rows, Split, num_rows


def rows_in(split: Split, batch: Any) -> int:
    """The number of samples in a batch, which may be 0; by its plan where a split does not count them.

    Raises:
        BatchError: the batch cannot be read.
    """
    count = getattr(split, "rows", None)
    if count is not None:
        return count(batch)
    return sum(map(num_rows, split.plan(batch, split.largest(batch)))) if tree.rows_or_none(batch) != 0 else 0


def samples_in(split: Split, batch: Any, piece: Rows) -> int | None:
    """The number of samples in a piece of a batch, a weight of its plain mean.

    None where the split does not know: one of ready micro-batches that cannot be counted, whose losses must say what
    they are means over.
    """
    count = getattr(split, "samples", None)
    return num_rows(piece) if count is None else count(batch, piece)


def unit_of(split: Split) -> str:
    """What its sizes are counted in, for messages."""
    return getattr(split, "unit", "the split's own unit")


def smallest_pieces(split: Split, batch: Any) -> list[Rows]:
    """The pieces of a batch that cannot be cut any further: samples, or groups that stay together."""
    return list(split.plan(batch, 1))


def part_to_check(split: Split, batch: Any) -> Any:
    """What of a batch a check picks its rows from: all of it, unless the split cannot join them."""
    pick = getattr(split, "part_to_check", None)
    return batch if pick is None else pick(batch)


def joins_rows(split: Split) -> bool:
    """Whether a split can put any of its rows into one piece."""
    return getattr(split, "joins_rows", True)
