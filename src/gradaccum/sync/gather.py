"""Tensors of all processes in one, with gradient: for losses and statistics over the whole batch.

Each process has its own rows, as many as it likes or none, and gets the rows of all of them in the order of ranks. The
backward is the transpose: a row's gradient is the sum of what every process has for it, so it goes back to the process
that the row came from. Each process must run the backward, or none.

`torch.distributed.nn.functional` has the same for equal counts only; its all-gather with unequal ones raises or, with
some backends, returns what lay in memory.

What the sum means: where every process computes the *same* loss from all rows and runs its backward, rows get W times
the gradient, once from each. Divide by the number of processes, or have each one compute its own rows' part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum.sync.ranks import Ranks


def gather_with_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all processes.

    Args:
        tensor: ``[rows, ...]``; rows may differ from process to process, and be 0; the rest may not.
        ranks: the processes, all of which call this.

    Returns:
        ``[sum of rows, ...]``, the same on every process.
    """
    counts = [said[0] for said in ranks.exchange([len(tensor)])]
    return _Gather.apply(tensor, ranks, counts)  # type: ignore[no-any-return]


def sum_with_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all processes; its gradient is the sum of theirs."""
    return _Sum.apply(tensor, ranks)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, counts: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.start, ctx.rows = ranks, sum(counts[: ranks.rank]), len(tensor)
        # Every process writes its rows of one table, whose other rows are zero in it: one collective, of any backend,
        # whatever the counts. It moves twice the bytes of an all-gather of equal parts.
        table = tensor.new_zeros(sum(counts), *tensor.shape[1:])
        table[ctx.start : ctx.start + ctx.rows] = tensor
        ranks.add_up(table)
        return table

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].contiguous().clone()
        ctx.ranks.add_up(total)
        return total[ctx.start : ctx.start + ctx.rows], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = tensor.detach().contiguous().clone()
        ranks.add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].contiguous().clone()
        ctx.ranks.add_up(total)
        return total, None
