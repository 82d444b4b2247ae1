"""What a loss or a layer over the whole batch sees of other processes: their outputs, their labels, their statistics.

Of a batch that is spread over processes, each runs its own micro-batches and gets the outputs of all, in the order of
ranks. All of them compute the same loss from the same outputs, and each pushes its own rows' part of the gradient back
into its own graphs. The loss is counted on one of them, and so are the gradients of parameters that it owns.

The labels that go with the outputs are gathered too, and everything else of the batch that takes little: up to 4 KiB a
sample. Larger entries, images say, stay those of this process; a loss that needs them of all returns them from forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError, RankError
from gradaccum.whole_batch.batch_norm.exact import Share
from gradaccum.whole_batch.outputs import Outputs
from gradaccum.window.over_ranks import OverRanks

_LARGE = 4096  # bytes of a row


class GatheredOutputs:
    """The outputs of all processes, as leaves.

    Args:
        ranks: all of them call this at the same time.
        own: the outputs of this process.
        rows: that they are of.
        sums: whether they are statistics, to be added up.

    Attributes:
        rows: of all processes.
    """

    def __init__(self, ranks: OverRanks, own: Outputs, rows: int, *, sums: bool) -> None:
        self._start, counts = ranks.rows_before(rows)
        self._rows, self.rows = rows, sum(counts)
        shared = ranks.ranks.exchange_objects(own.described() if rows else None)
        described = next((one for one in shared if one is not None), None)
        if described is None:
            raise BatchError("No process has a sample of this batch, so there is nothing to learn from.")
        structure, shapes = described
        tensors = own.tensors() if rows else []
        self._structure, self._sums = structure, sums
        self._tensors: list[Tensor] = []
        for place, (shape, dtype) in enumerate(shapes):
            if sums:
                table = tensors[place].detach().clone() if rows else _zeros(ranks, shape, dtype)
            else:
                table = _zeros(ranks, (sum(counts), *shape), dtype)
                if rows:
                    table[self._start : self._start + rows] = tensors[place].detach()
            ranks.add_up(table)
            self._tensors.append(table)

    def leaves(self) -> list[Tensor]:
        """Those that can have a gradient; from now on they want one."""
        for tensor in self._tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.requires_grad_()
        return [tensor for tensor in self._tensors if tensor.requires_grad]

    def whole(self) -> Any:
        """In the structure of a micro-batch's."""
        following = iter(self._tensors)
        return tree.map_leaves(self._structure, lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf)

    def own_gradients(self) -> list[Tensor | None]:
        """For each tensor this process's part of the gradient."""
        return [
            None
            if tensor.grad is None
            else tensor.grad
            if self._sums
            else tensor.grad[self._start : self._start + self._rows]
            for tensor in self._tensors
        ]


def gathered_batch(ranks: OverRanks, batch: Any, rows: int) -> Any:
    """The batch with the rows of all processes, where a row takes little; the rest as it is here."""
    start, counts = ranks.rows_before(rows)

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf[:1].numel() * leaf.element_size() > _LARGE:
            return leaf
        table = _zeros(ranks, (sum(counts), *leaf.shape[1:]), leaf.dtype)
        table[start : start + rows] = leaf
        ranks.add_up(table)
        return table

    return tree.map_leaves(batch, gathered)


class SharesOfAll:
    """From this process's statistics of a layer to those of all, with gradient; see `Exact`."""

    def __init__(self, ranks: OverRanks) -> None:
        self._ranks = ranks
        self._calls = 0

    def __call__(self, share: Share) -> Sequence[Share]:
        """All of them, in the order of ranks; every process calls this for the same layers in the same order."""
        self._calls += 1
        _, counts = self._ranks.rows_before(share.count)
        mine = torch.stack([share.mean, share.var])
        table = _Gathered.apply(mine, self._ranks, self._calls)
        return [Share(count=count, mean=table[i][0], var=table[i][1]) for i, count in enumerate(counts) if count]


class _Gathered(torch.autograd.Function):
    """One tensor of each process in one, ``[processes, ...]``; each gets back what all have for its own."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: OverRanks, call: int) -> Tensor:
        ctx.ranks, ctx.call = ranks, call
        table = mine.new_zeros(ranks.ranks.size, *mine.shape)
        table[ranks.ranks.rank] = mine
        ranks.add_up(table)
        return table

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _, calls = ctx.ranks.rows_before(ctx.call)
        if len(set(calls)) > 1:
            raise RankError(
                f"The processes are at different layers in their backward (numbers {calls}), and would add up each "
                "other's statistics. Parallel branches with BatchNorm may run in any order; let them follow each other."
            )
        total = gradients[0].contiguous().clone()
        ctx.ranks.add_up(total)
        return total[ctx.ranks.ranks.rank], None, None


def _zeros(ranks: OverRanks, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(tuple(shape), dtype=dtype, device=ranks.ranks.device)
