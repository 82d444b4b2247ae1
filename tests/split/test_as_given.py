"""Micro-batches that are ready run as they are."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

EXACT = 1e-12


def make(loss_fn: Any, **options: Any) -> tuple[nn.Module, ga.TrainStep]:
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, ga.TrainStep(model, optimizer, loss_fn, split=ga.split_as_given(**options))


def squares(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def window(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, dtype=torch.float64) for n in sizes]


def off(model: nn.Module, right: Tensor) -> float:
    gradient = model.weight.grad
    assert isinstance(gradient, Tensor)
    return float((gradient - right).norm() / right.norm())


def test_plain_means_are_over_the_samples_that_are_seen() -> None:
    model, step = make(squares)
    batch = window(4, 1, 0, 2)
    (right,) = torch.autograd.grad(squares(model, torch.cat(batch)), model.weight)
    step.backward(batch)
    assert off(model, right) < EXACT
    model.zero_grad()
    update = step(batch)
    assert (update.micro_batches, update.samples, update.micro_batch_size) == (3, 7, 4), (
        "nothing is run with no samples"
    )


def test_samples_that_cannot_be_seen() -> None:
    def counted(model: Any, packed: Any) -> ga.Loss:
        return ga.Loss.mean(squares(model, packed["x"]), over=len(packed["x"]))

    batch = [{"x": x, "cu_seq_lens": torch.tensor([0, len(x)])} for x in window(4, 3, 5)]
    model, step = make(counted)
    (right,) = torch.autograd.grad(squares(model, torch.cat([part["x"] for part in batch])), model.weight)
    step.backward(batch)
    assert off(model, right) < EXACT
    model.zero_grad()
    assert step(batch).samples is None

    model, step = make(lambda model, packed: squares(model, packed["x"]))
    with pytest.raises(ga.LossError, match="number of samples is not known"):
        step(batch)
    model, step = make(lambda model, packed: squares(model, packed["x"]), samples=lambda packed: len(packed["x"]))
    assert step(batch).samples == 12


def test_a_loss_over_the_whole_window() -> None:
    model = nn.Linear(3, 2).double()
    step = ga.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.0), forward=lambda model, x: model(x),
        batch_loss=lambda outputs, batch: outputs.std(), split=ga.split_as_given(),
    )  # fmt: skip
    for batch in (window(4, 1, 2), window(5)):
        (right,) = torch.autograd.grad(model(torch.cat(batch)).std(), model.weight)
        step.backward(batch)
        assert off(model, right) < EXACT
        model.zero_grad()


def test_one_that_does_not_fit_is_not_cut() -> None:
    def scarce(model: Any, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")
        return squares(model, x)

    with pytest.raises(ga.DoesNotFitError, match="A micro-batch of 4 samples, which are one group or piece"):
        make(scarce)[1](window(2, 4))


@pytest.mark.parametrize(
    ("batch", "message"), [(torch.zeros(3), "takes a list of micro-batches"), ([], "0 samples")], ids=["tensor", "none"]
)
def test_what_is_no_list_of_micro_batches(batch: Any, message: str) -> None:
    with pytest.raises(ga.BatchError, match=message):
        make(squares)[1].backward(batch)
    with pytest.raises(ga.WindowError, match="samples=3: it counts the samples"):
        ga.split_as_given(3)  # type: ignore[arg-type]


def test_the_plan_line_says_that_nothing_is_joined(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), split=ga.split_as_given())
    with caplog.at_level(logging.INFO, "gradaccum"):
        step([torch.randn(4, 3), torch.randn(3, 3)])
    line = next(one for one in caplog.messages if one.startswith("batch"))
    assert "not checked: ready micro-batches run as they are, and are not joined" in line
