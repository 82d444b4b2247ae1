"""The micro-batches of one update as the loader collated them, a list: how `TrainStep` cuts it.

A Trainer's micro-batches are padded each for itself, so they are not joined and cut again; one that is too large is cut
further. How many rows one has is what its labels or its input ids say: images of a vision-language model come as
patches, with rows of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError
from gradaccum.types import Rows, Split, num_rows

_SAY_ROWS = ("labels", "input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")


def rows_of(inputs: Any) -> int:
    """The rows of one collated micro-batch; 0 where it has no tensor."""
    if isinstance(inputs, Mapping):
        for key in _SAY_ROWS:
            if isinstance(inputs.get(key), Tensor) and inputs[key].dim():
                return len(inputs[key])
    return next((len(leaf) for leaf in tree.tensors(inputs) if leaf.dim()), 0)


def some_rows(inputs: Any, rows: Rows) -> Any:
    """Some rows of a collated micro-batch; what has no rows is shared.

    Raises:
        BatchError: a tensor has rows of its own, of which it is not known whose they are.
    """
    number = rows_of(inputs)

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if len(leaf) != number:
            raise BatchError(
                f"A micro-batch of {number} rows has a tensor of shape {tuple(leaf.shape)}, and it is not known which "
                "of its rows belong to which sample, so it cannot be cut further. Let the loader make smaller "
                "micro-batches (per_device_train_batch_size) and leave micro_batch_size= out, or pass split=."
            )
        return leaf[rows] if isinstance(rows, slice) else leaf[rows.to(leaf.device)]

    return tree.map_leaves(inputs, pick)


def no_rows(inputs: Any) -> Any:
    """A micro-batch of the same kind without rows."""
    return tree.map_leaves(inputs, lambda leaf: leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf)


@dataclasses.dataclass(frozen=True)
class AsCollated:
    """A `Split` of a list of micro-batches: each a piece, or cut further, which `split_as_given` never does.

    Args:
        further: how one that is larger than asked for is cut; in equal pieces of consecutive rows if None.
        keeps_pairs: whether row i and row i + n / 2 of n belong together (preferred and rejected answers).
    """

    further: Split | None = None
    keeps_pairs: bool = False
    unit = "samples of the loader's micro-batches"

    def rows(self, batch: Any) -> int:
        """Rows in all."""
        return sum(map(rows_of, parts_of(batch)))

    def largest(self, batch: Any) -> int:
        """The largest size that cuts nothing."""
        further = self.further
        return max((rows_of(one) if further is None else further.largest(one) for one in parts_of(batch)), default=0)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """See `Split`."""
        found: list[Rows] = []
        for start, one in _placed(batch):
            if self.further is not None:
                found += [_moved(rows, start) for rows in self.further.plan(one, size, max_rows=max_rows)]
                continue
            most = size if max_rows is None else min(size, max_rows)
            found += [_moved(rows, start) for rows in self._pieces(rows_of(one), max(most, 1))]
        return found

    def cut(self, batch: Any, rows: Rows) -> Any:
        """See `Split`; rows of one micro-batch."""
        first = rows.start if isinstance(rows, slice) else int(rows[0])
        start, one = next((start, one) for start, one in reversed(list(_placed(batch))) if start <= first)
        if num_rows(rows) == rows_of(one):
            return one
        own = _moved(rows, -start)
        return some_rows(one, own) if self.further is None else self.further.cut(one, own)

    def part_to_check(self, batch: Any) -> Any:
        """The largest micro-batch: rows of several are not joined, so a check looks at rows of one."""
        return [max(parts_of(batch), key=rows_of)]

    def _pieces(self, number: int, size: int) -> Iterator[Rows]:
        units = number // 2 if self.keeps_pairs else number
        size = max(size // 2, 1) if self.keeps_pairs else size
        count = -(-units // size)
        base, longer = divmod(units, count)
        bounds = list(accumulate((base + (i < longer) for i in range(count)), initial=0))
        for start, stop in pairwise(bounds):
            if self.keeps_pairs and count > 1:
                first = torch.arange(start, stop)
                yield torch.cat([first, first + units])
            else:
                yield slice(0, number) if count == 1 else slice(start, stop)


def parts_of(batch: Any) -> list[Any]:
    """The micro-batches that have rows, of a window or of a single one."""
    return [one for one in (batch if isinstance(batch, list) else [batch]) if rows_of(one)]


def _placed(batch: Any) -> Iterator[tuple[int, Any]]:
    """Each micro-batch with the number of rows before it."""
    parts = parts_of(batch)
    return zip(accumulate(map(rows_of, parts), initial=0), parts, strict=False)


def _moved(rows: Rows, by: int) -> Rows:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by
