"""Samples that stay together do so where memory is short too; a group that does not fit is an error that says so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

PAIRS = 7


class Scarce(nn.Module):
    """Runs out of memory with more rows than ``most``."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most, self.seen = nn.Linear(3, 1).double(), most, []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")
        self.seen.append(len(x))
        return self.linear(x).squeeze(1)


def loss_fn(model: Any, batch: Tensor) -> ga.Loss:
    chosen, rejected = model(batch).chunk(2)
    losses = -nn.functional.logsigmoid(chosen - rejected)
    return ga.Loss.mean(losses.mean(), over=len(losses))


def pair_of(batch: Tensor) -> Tensor:
    return torch.arange(len(batch) // 2).repeat(2)


SPLITS = {
    "by samples": lambda: ga.split_by_samples(groups=pair_of),
    "by cost": lambda: ga.split_by_cost(lambda batch: torch.arange(1, len(batch) + 1), 1000, groups=pair_of),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("most", [2, 3, 5])
def test_pieces_get_smaller_down_to_a_group(most: int, name: str) -> None:
    model, batch = Scarce(100), torch.randn(2 * PAIRS, 3, dtype=torch.float64)
    loss_fn(model, batch).value.backward()
    right, model.linear.weight.grad = model.linear.weight.grad, None
    model.linear.bias.grad = None
    model.most = most
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, split=SPLITS[name]())
    for _ in range(3):
        model.seen.clear()
        step.backward(batch)
        assert right is not None
        torch.testing.assert_close(model.linear.weight.grad, right, rtol=1e-12, atol=1e-14)
        model.zero_grad()
    assert sum(model.seen) == 2 * PAIRS
    assert max(model.seen) == most // 2 * 2


@pytest.mark.parametrize("name", SPLITS)
def test_a_group_that_does_not_fit(name: str) -> None:
    model, batch = Scarce(1), torch.randn(2 * PAIRS, 3, dtype=torch.float64)
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, split=SPLITS[name]())
    with pytest.raises(ga.DoesNotFitError, match=r"A micro-batch of 2 samples, which are one group.*stay together"):
        step(batch)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", SPLITS)
def test_a_group_larger_than_the_micro_batch_is_one(name: str) -> None:
    model, batch = Scarce(100), torch.randn(2 * PAIRS, 3, dtype=torch.float64)
    step = ga.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, split=SPLITS[name](), micro_batch_size=1
    )
    update = step(batch)
    assert (update.micro_batches, update.micro_batch_size, update.samples) == (PAIRS, 2, 2 * PAIRS)


@pytest.mark.parametrize("name", SPLITS)
def test_groups_of_any_size(name: str) -> None:
    groups = torch.tensor([0, 1, 0, 2, 3, 1, 0, 2, 1, 4, 2])
    make: Any = {
        "by samples": lambda: ga.split_by_samples(groups=lambda _: groups),
        "by cost": lambda: ga.split_by_cost(lambda _: groups + 1, 12, groups=lambda _: groups),
    }[name]
    batch = torch.arange(11.0)
    for max_rows in (1, 2, 3, 5, 11):
        split = make()
        pieces = split.plan(batch, split.largest(batch), max_rows=max_rows)
        rows = [split.cut(batch, piece).tolist() for piece in pieces]
        assert sorted(row for piece in rows for row in piece) == batch.tolist()
        for piece in rows:
            numbers = {int(groups[int(row)]) for row in piece}
            assert len(piece) == sum(int((groups == number).sum()) for number in numbers), "whole groups"
            assert len(piece) <= max_rows or len(numbers) == 1
            assert piece == sorted(piece), "in the batch's order"
