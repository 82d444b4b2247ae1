"""Rows and sums of all processes, with the gradient that one process would have."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gradaccum.sync.gather import gather_with_gradient, sum_with_gradient
from gradaccum.sync.ranks import Ranks
from oracle import EXACT
from ranks import results_of

ROWS = {2: [[3, 2], [4, 0]], 3: [[1, 2, 3], [0, 5, 0]]}


def coupled(rows: Tensor) -> Tensor:
    """A loss for each row that depends on all rows."""
    return (rows @ rows.T).exp().sum(1).log()


def gathers(rank: int, world_size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    ranks = Ranks((world,), torch.device("cpu"))
    assert (ranks.rank, ranks.size) == (rank, world_size)
    for counts in ROWS[world_size]:
        whole = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
        coupled(whole).mean().backward()
        start = sum(counts[:rank])
        mine = slice(start, start + counts[rank])
        own = whole.detach()[mine].clone().requires_grad_()

        gathered = gather_with_gradient(own, ranks)
        assert torch.equal(gathered, whole)
        (coupled(gathered)[mine].sum() / sum(counts)).backward()  # its own rows' part of the loss
        torch.testing.assert_close(own.grad, whole.grad[mine], rtol=EXACT, atol=EXACT)

        # Moments over all rows, as normalisation takes them: the loss of each process goes through the sum of all.
        whole.grad = own.grad = None
        (whole / whole.square().sum(0)).square().sum().backward()
        (own / sum_with_gradient(own.square().sum(0), ranks)).square().sum().backward()
        torch.testing.assert_close(own.grad, whole.grad[mine], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathers(world_size: int) -> None:
    results_of(gathers, world_size)
