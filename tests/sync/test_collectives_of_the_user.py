"""Models and losses with collectives of their own: all processes run equally many micro-batches, whatever they have."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as between
from torch import Tensor, nn

import gradaccum as ga
from oracle import assert_same_gradients, gradients_of
from ranks import results_of
from wrapping import sgd, wrapped


def make() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    """A collective with a backward, which adds nothing: so the whole batch's gradient is known."""
    return model(x).square().mean() + 0.0 * between.all_reduce(model(x).sum())


def unequal(rank: int, world_size: int) -> None:
    shares = [rows(29, 1), rows(5, 2)]
    whole = torch.cat(shares)
    alone = make()
    alone(whole).square().mean().backward()
    for how in ("plain", "DDP"):
        model = make()
        step = ga.TrainStep(wrapped(model, how), sgd(model), loss_fn, micro_batch_size=8, collectives=True)
        step.backward(shares[rank])
        assert_same_gradients(gradients_of(model), gradients_of(alone))
        model.zero_grad()
        assert step(shares[rank]).samples == 34
    model = make()
    made: list[Any] = []
    accumulator = ga.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        micro_batches=2,
        collectives=True,
        before_step=lambda: made.append(gradients_of(model)),
    )
    loader = shares[rank].split(8)  # 4 micro-batches here, 1 there
    for x in accumulator.over(loader):
        accumulator.backward(ga.Loss.mean(loss_fn(model, x), over=len(x)))
    assert len(made) == accumulator.updates == 2
    for at, one in enumerate(made):
        alone.zero_grad()
        parts = [*shares[0].split(8)[2 * at : 2 * at + 2], *shares[1].split(8)[2 * at : 2 * at + 2]]
        alone(torch.cat(parts)).square().mean().backward()
        assert_same_gradients(one, gradients_of(alone))


def test_unequal_numbers_of_micro_batches() -> None:
    results_of(unequal, 2)


def test_layers_that_exchange_statistics_are_seen() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for layer, runs in ((nn.SyncBatchNorm(3), True), (nn.BatchNorm1d(3), False)):
            model = nn.Sequential(layer, nn.Linear(3, 1))
            ranks = ga.TrainStep(model, sgd(model), loss_fn)._accumulation.ranks
            assert ranks is not None
            assert ranks.runs_collectives is runs
    finally:
        dist.destroy_process_group()
