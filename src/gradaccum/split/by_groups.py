"""A batch into micro-batches of whole groups, for layers that see fixed groups of samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradaccum import tree
from gradaccum.errors import WindowError
from gradaccum.split.by_samples import rows_to_split
from gradaccum.types import GhostBatch, Rows, Split


def split_by_groups(groups: GhostBatch) -> Split:
    """Cuts a batch between groups, into pieces of as many as can be; sizes count groups.

    Example:
        >>> from gradaccum.split.by_groups import split_by_groups
        >>> split_by_groups(ga.GhostBatch(4)).plan(torch.zeros(18, 2), 2)
        [slice(0, 8, None), slice(8, 16, None), slice(16, 18, None)]
    """
    return _ByGroups(groups)


@dataclass(frozen=True, slots=True)
class _ByGroups:
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
        starts = list(itertools.accumulate(sizes, initial=0))
        num_pieces = -(-len(sizes) // size)
        each, longer = divmod(len(sizes), num_pieces)
        bounds = [starts[i * each + min(i, longer)] for i in range(num_pieces + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def cut(self, batch: Any, rows: Rows) -> Any:
        return tree.take(batch, rows)
