"""Pairs of inputs and targets, a small model and its loss: what the tests of both ways to train share."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gradaccum as ga

Pair = tuple[Tensor, Tensor]

ROWS = 13
"""A prime, as is the number of all samples: no size of micro-batch or batch divides them."""
_drawn = torch.Generator().manual_seed(3)
ALL_X, ALL_Y = (torch.randn(23, width, dtype=torch.float64, generator=_drawn) for width in (3, 1))
X, Y = ALL_X[:ROWS], ALL_Y[:ROWS]


def pairs(*sizes: int) -> list[Pair]:
    """The first samples, cut into micro-batches of these sizes."""
    rows = sum(sizes)
    return list(zip(ALL_X[:rows].split(list(sizes)), ALL_Y[:rows].split(list(sizes)), strict=True))


def squares(model: nn.Module, batch: Pair) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def make_step(loss_fn: Any = squares, **options: Any) -> tuple[nn.Module, Optimizer, ga.TrainStep]:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, ga.TrainStep(model, optimizer, loss_fn, **{"micro_batch_size": 4, **options})


def make_accumulator(**options: Any) -> tuple[nn.Module, Optimizer, ga.Accumulator]:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, ga.Accumulator(model, optimizer, **options)


def assert_no_gradients(model: nn.Module) -> None:
    assert all(parameter.grad is None for parameter in model.parameters())


def line_here(offset: int = 0) -> str:
    """``file:line`` of who calls."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{frame.f_back.f_code.co_filename}:{frame.f_back.f_lineno + offset}"
