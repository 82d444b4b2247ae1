"""Where the seconds of an update went: each is put where it was spent, and no second in two places."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import gradaccum as ga
from wrapping import sgd

LOADING, COMPUTING = 0.03, 0.02


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    time.sleep(COMPUTING)
    return model(x).square().mean()


def loader(count: int) -> Iterator[Tensor]:
    for _ in range(count):
        time.sleep(LOADING)
        yield torch.randn(4, 3)


def of_each(numbers: dict[str, float]) -> tuple[float, float, float]:
    return numbers["data_seconds"], numbers["compute_seconds"], numbers["waiting_seconds"]


def test_of_a_loop_of_ones_own() -> None:
    model = nn.Linear(3, 1)
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=3)
    updates = [accumulator.backward(loss_fn(model, x)) for x in accumulator.over(loader(9))]
    found = [update.as_dict() for update in updates if update]
    assert len(found) == 3
    total = sum(one["data_seconds"] for one in found)
    assert total >= 9 * LOADING, "each item is counted, also the one that is read ahead"
    for one in found:
        data, compute, waiting = of_each(one)
        assert data >= 2 * LOADING
        assert 2 * COMPUTING <= compute <= one["seconds"]  # the first forward's is before the window's first backward
        assert compute < one["seconds"] - LOADING, "what the loader took is no computing"
        assert waiting == 0.0


def test_of_a_batch_in_hand() -> None:
    model = nn.Linear(3, 1)
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2, check="off")
    first, *rest = [step(x).as_dict() for x in loader(3)]
    assert "data_seconds" not in first, "when the loop began is not known"
    for one in rest:
        data, compute, waiting = of_each(one)
        assert data >= LOADING
        assert 2 * COMPUTING <= compute <= one["seconds"]
        assert waiting == 0.0
