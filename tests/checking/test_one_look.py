"""Threads with models of their own train while another one looks at its model: nothing of theirs is touched."""

import functools
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradaccum as ga
from oracle import assert_same_gradients, parameters_of
from wrapping import sgd

THREADS, STEPS, UPDATES = 4, 6, 3


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def rows(seed: int) -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_threads(*functions: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_trains_as_it_would_alone() -> None:
    def train(seed: int, into: dict[tuple[int, int], dict[str, Tensor]]) -> None:
        for i in range(STEPS):
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
            generator = torch.Generator().manual_seed(i)  # torch's own is the process's, and put back after a look
            for parameter in model.parameters():
                nn.init.normal_(parameter, generator=generator)
            step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size="auto" if i % 2 else 3)
            for k in range(UPDATES):
                step(rows(97 * seed + 7 * i + k))
            into[seed, i] = parameters_of(model)

    together: dict[tuple[int, int], dict[str, Tensor]] = {}
    alone: dict[tuple[int, int], dict[str, Tensor]] = {}
    in_threads(*(lambda seed=seed: train(seed, together) for seed in range(THREADS)))
    for seed in range(THREADS):
        train(seed, alone)
    assert together.keys() == alone.keys()
    for key, parameters in together.items():
        assert_same_gradients(parameters, alone[key])


def test_another_model_called_and_stepped_meanwhile_keeps_its_gradient() -> None:
    """The other thread runs whole updates by hand from inside of the look's first forward."""
    looking, done = threading.Event(), threading.Event()
    calls = []

    def waits(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 1:
            looking.set()
            assert done.wait(20)
        return loss_fn(model, x)

    mine, other = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    before = other.weight.detach().clone()
    gradients: list[Tensor] = []

    def trains() -> None:
        assert looking.wait(20)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            loss_fn(other, rows(5)).backward()
            assert other.weight.grad is not None
            gradients.append(other.weight.grad.clone())
            optimizer.step()
        done.set()

    step = ga.TrainStep(mine, sgd(mine), waits, micro_batch_size=3)
    in_threads(functools.partial(step, rows(0)), trains)
    assert other.weight.grad is not None, "a look has put it back"
    assert torch.equal(other.weight.grad, gradients[-1])
    expected = before - 0.1 * gradients[0] - 0.1 * gradients[1]
    torch.testing.assert_close(other.weight.detach(), expected, rtol=0, atol=1e-15)


def test_looks_that_overlap_leave_warnings_and_the_logger_as_they_were() -> None:
    filters, disabled = list(warnings.filters), logging.getLogger("gradaccum").disabled

    def look() -> None:
        for _ in range(8):
            model = nn.Linear(3, 1).double()
            ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=3)(rows(1))
            ga.audit(model, loss_fn, rows(1), micro_batch_size=3)

    in_threads(look, look, look)
    assert list(warnings.filters) == filters
    assert logging.getLogger("gradaccum").disabled == disabled
