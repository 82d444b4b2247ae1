"""The micro-batches of one update as the loader collated them: a batch for `TrainStep`, which cuts it where it was cut.

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


@dataclasses.dataclass
class TrainerBatch:
    """Micro-batches one after another; for gradaccum, a tensor with as many rows as they have, and nothing to move."""

    rows: Tensor

    @staticmethod
    def of(micro_batches: Sequence[Any]) -> TrainerBatch:
        """Those that have rows."""
        found = TrainerBatch(torch.zeros(sum(map(rows_of, micro_batches))))
        # No field, which gradaccum's `tree` would look through, move and count the rows of.
        found.__dict__["_parts"] = [one for one in micro_batches if rows_of(one)]
        return found

    @property
    def parts(self) -> list[Any]:
        """The micro-batches."""
        return self.__dict__["_parts"]

    @property
    def inputs(self) -> Any:
        """Of a single micro-batch."""
        return self.parts[0]


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
    """A `Split` of a `TrainerBatch`: each micro-batch a piece, or cut further.

    Args:
        further: how one that is larger than asked for is cut; in equal pieces of consecutive rows if None.
        keeps_pairs: whether row i and row i + n / 2 of n belong together (preferred and rejected answers).
    """

    further: Split | None = None
    keeps_pairs: bool = False

    def rows(self, batch: TrainerBatch) -> int:
        """Rows in all."""
        return len(batch.rows)

    def largest(self, batch: TrainerBatch) -> int:
        """The largest size that cuts nothing."""
        further = self.further
        return max((rows_of(one) if further is None else further.largest(one) for one in batch.parts), default=0)

    def plan(self, batch: TrainerBatch, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """See `Split`."""
        found: list[Rows] = []
        for start, one in _placed(batch):
            if self.further is not None:
                found += [_moved(rows, start) for rows in self.further.plan(one, size, max_rows=max_rows)]
                continue
            most = size if max_rows is None else min(size, max_rows)
            found += [_moved(rows, start) for rows in self._pieces(rows_of(one), max(most, 1))]
        return found

    def cut(self, batch: TrainerBatch, rows: Rows) -> TrainerBatch:
        """See `Split`."""
        first = rows.start if isinstance(rows, slice) else int(rows[0])
        start, one = next((start, one) for start, one in reversed(list(_placed(batch))) if start <= first)
        if num_rows(rows) < rows_of(one):
            own = _moved(rows, -start)
            one = some_rows(one, own) if self.further is None else self.further.cut(one, own)
        return TrainerBatch.of([one])

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


def _placed(batch: TrainerBatch) -> Iterator[tuple[int, Any]]:
    """Each micro-batch with the number of rows before it."""
    return zip(accumulate(map(rows_of, batch.parts), initial=0), batch.parts, strict=False)


def _moved(rows: Rows, by: int) -> Rows:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by
