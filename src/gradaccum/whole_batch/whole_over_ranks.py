"""What a loss or a layer over the whole batch sees of other processes: their outputs, their labels, their statistics.

Each process runs its own micro-batches, gets the outputs of all in the order of ranks, computes the loss from them,
and pushes its own rows' part of the gradient back into its own graphs. The loss is counted on one of them, and so are
the gradients of parameters that it owns.

Labels are gathered too, and everything else of the batch that takes up to 4 KiB a sample. Larger entries, images say,
stay those of this process; a loss that needs them of all returns them from forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError, RankError
from gradaccum.whole_batch.batch_norm.moments import Share
from gradaccum.whole_batch.outputs import Outputs, rebuilt
from gradaccum.window.over_ranks import OverRanks

_LARGE = 4096  # bytes of a row


def gathered_outputs(ranks: OverRanks, own: Outputs, rows: int) -> tuple[Outputs, slice]:
    """The outputs of all processes, and which rows of them are those of this one, which has so many rows of the batch.

    Raises:
        BatchError: no process has any.
    """
    start, counts = ranks.rows_before(rows)
    shared = ranks.ranks.exchange_objects(own.of_no_samples() if rows else None)
    of_no_samples = next((one for one in shared if one is not None), None)
    if of_no_samples is None:
        raise BatchError("No process has a sample of this batch, so there is nothing to learn from.")
    none = [torch.zeros_like(tensor, device=ranks.ranks.device) for tensor in tree.tensors(of_no_samples)]
    mine = own.whole() if rows else rebuilt(of_no_samples, none)
    gathered, own_rows = Outputs(own.combination, sum(counts)), slice(start, start + rows)
    gathered.put(own_rows, rows, mine)
    for tensor in gathered.tensors:  # zero but for each process's own rows, or its own sum
        ranks.ranks.add_up(tensor)
    return gathered, own_rows


def gathered_batch(ranks: OverRanks, batch: Any, rows: int) -> Any:
    """The batch with the rows of all processes, where a row takes little; the rest as it is here."""
    start, counts = ranks.rows_before(rows)

    def gathered(leaf: Any) -> Any:
        if (
            not isinstance(leaf, Tensor)
            or not leaf.dim()
            or len(leaf) != rows
            or leaf[:1].numel() * leaf.element_size() > _LARGE
        ):
            return leaf
        table = torch.zeros((sum(counts), *leaf.shape[1:]), dtype=leaf.dtype, device=ranks.ranks.device)
        table[start : start + rows] = leaf
        ranks.ranks.add_up(table)
        return table

    return tree.map_leaves(batch, gathered)


def shares_of_all(ranks: OverRanks) -> Callable[[Share], Sequence[Share]]:
    """What exchanges a layer's statistics between processes, with gradient, in the order of ranks; see `Exact`."""
    numbers = itertools.count(1)

    def exchange(share: Share) -> Sequence[Share]:
        _, counts = ranks.rows_before(share.count)
        table = _Gathered.apply(torch.stack([share.mean, share.var]), ranks, next(numbers))
        return [Share(count=count, mean=table[i][0], var=table[i][1]) for i, count in enumerate(counts) if count]

    return exchange


class _Gathered(torch.autograd.Function):
    """One tensor of each process in one, ``[processes, ...]``; each gets back what all have for its own."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: OverRanks, call: int) -> Tensor:
        ctx.ranks, ctx.call = ranks, call
        table = mine.new_zeros(ranks.ranks.size, *mine.shape)
        table[ranks.ranks.rank] = mine
        ranks.ranks.add_up(table)
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
        ctx.ranks.ranks.add_up(total)
        return total[ctx.ranks.ranks.rank], None, None
