"""A batch into consecutive micro-batches, as equal as they can be: of samples, or of whole groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from gradaccum import tree
from gradaccum.errors import WindowError
from gradaccum.split.reading import Groups, Reading, as_rows, next_fit
from gradaccum.types import GhostBatch, Rows, Split


def split_by_samples(axes: tree.Axes | None = None, groups: Groups | None = None) -> Split:
    """Cuts a batch into consecutive pieces of at most the given number of rows, as equal as can be.

    13 rows at a size of 4 become 4 + 3 + 3 + 3, not 4 + 4 + 4 + 1: as many pieces, but none so small that a device
    idles in it, and at most two shapes for a compiler to see.

    A sample is index 0 of every tensor, one entry of a list of dicts, dataclasses or objects, a component of a nested
    tensor, an entry of a list of numbers or strings that is as long as the batch, and of a list of tensors, where these
    are not columns that have as many rows. What is otherwise, ``axes`` says.

    Args:
        axes: by entry ("position_ids", nested "vision.pixel_values" and "0.boxes"), the dimension that holds the
            samples; None for what all samples share; or ``counts(batch)``, which returns a LongTensor ``[rows]``: how
            many rows of dimension 0 belong to each sample, in order (image patches, boxes, nodes). A list's dimension 0
            are its entries.
        groups: ``groups(batch)`` returns a LongTensor ``[rows]``. Samples with the same number stay in one micro-batch,
            in the order they have: pairs, the completions of a prompt. A group larger than a micro-batch is one.

    Raises:
        WindowError: ``axes`` or ``groups`` are not that.

    Example:
        >>> split = ga.split_by_samples()
        >>> split.plan(torch.zeros(13, 2), 4)
        [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None), slice(10, 13, None)]

        Two images, of 4 and of 2 patches; and the layout of preference data, [chosen; rejected]:

        >>> split = ga.split_by_samples(axes={"patches": lambda batch: batch["num_patches"]})
        >>> batch = {"num_patches": torch.tensor([4, 2]), "patches": torch.arange(6)}
        >>> split.cut(batch, slice(1, 2))["patches"]
        tensor([4, 5])
        >>> split = ga.split_by_samples(groups=lambda batch: torch.arange(len(batch) // 2).repeat(2))
        >>> split.plan(torch.zeros(6, 2), 4)
        [tensor([0, 1, 3, 4]), tensor([2, 5])]
    """
    return _BySamples(Reading(axes=axes, groups=groups))


def cuts_anywhere(split: Split) -> bool:
    """Whether a split cuts between any two samples, so that sizes may be tried as they come."""
    return type(split) is _BySamples and split.reading.groups is None


@dataclass(frozen=True, slots=True)
class _BySamples:
    reading: Reading = field(default_factory=Reading)
    unit = "samples"

    def rows(self, batch: Any) -> int:
        return self.reading.rows(batch)

    def largest(self, batch: Any) -> int:
        return self.rows(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        rows = self.reading.rows_to_plan(batch)
        size = size if max_rows is None else min(size, max_rows)
        if size < 1:
            raise WindowError(
                f"micro_batch_size={size}: a micro-batch has at least one sample. "
                "Pass the largest number of samples that fits in memory."
            )
        groups = self.reading.members(batch, rows)
        if groups is None:
            return equal_pieces(range(rows + 1), size)
        if len(set(map(len, groups))) > 1:
            return [as_rows(piece) for piece in next_fit(groups, lambda held, group: held + len(group) <= size)]
        cuts = equal_pieces(range(len(groups) + 1), max(1, size // len(groups[0])))
        return [as_rows(sorted(row for group in groups[cut] for row in group)) for cut in cuts]

    def cut(self, batch: Any, rows: Rows) -> Any:
        return self.reading.take(batch, rows)


def split_by_groups(groups: GhostBatch, split: Split | None = None) -> Split:
    """Cuts a batch between the groups that `GhostBatch` normalises; the size of a piece counts groups.

    ``split`` is one by samples, whose ``axes`` are kept.

    Example:
        >>> from gradaccum.split.by_samples import split_by_groups
        >>> split_by_groups(ga.GhostBatch(4)).plan(torch.zeros(18, 2), 2)
        [slice(0, 8, None), slice(8, 16, None), slice(16, 18, None)]
    """
    return _ByGroups(split.reading if isinstance(split, _BySamples) else Reading(), groups=groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ByGroups(_BySamples):
    groups: GhostBatch
    unit = "groups"

    def largest(self, batch: Any) -> int:
        return len(self.groups.group_sizes(self.rows(batch)))

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        if max_rows is not None:
            size = min(size, max_rows // self.groups.samples)
        if size < 1:
            raise WindowError(
                f"micro_batch_size={max_rows} holds no group of ga.GhostBatch({self.groups.samples}). BatchNorm's "
                f"statistics are those of whole groups: pass micro_batch_size={self.groups.samples} or more, or "
                "smaller groups."
            )
        sizes = self.groups.group_sizes(self.reading.rows_to_plan(batch))
        return equal_pieces(list(accumulate(sizes, initial=0)), size)


def equal_pieces(bounds: Sequence[int], size: int) -> list[slice]:
    """Cuts at some of ``bounds``, with at most ``size`` of the units between them in a piece."""
    num_units = len(bounds) - 1
    num_pieces = -(-num_units // size)
    units, longer = divmod(num_units, num_pieces)  # the first `longer` pieces have one unit more
    cuts = [bounds[i * units + min(i, longer)] for i in range(num_pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
