"""A window whose losses go through another model: that one may not step until the window closes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga


def nets() -> tuple[Any, Any]:
    torch.manual_seed(3)
    return nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss_d(g: Any, d: Any, x: Tensor) -> Tensor:
    return (F.softplus(-d(x.repeat(1, 2)[:, :4])) + F.softplus(d(g(x).detach()))).mean()


def loss_g(g: Any, d: Any, x: Tensor) -> Tensor:
    return F.softplus(-d(g(x))).mean()


def accumulators(g: Any, d: Any, micro_batches: int) -> tuple[ga.Accumulator, ga.Accumulator]:
    one, other = (
        ga.Accumulator(m, torch.optim.SGD(m.parameters(), lr=0.5), micro_batches=micro_batches) for m in (g, d)
    )
    return one, other


DATA = torch.randn(28, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_order_that_is_wrong() -> None:
    g, d = nets()
    of_g, of_d = accumulators(g, d, 3)
    before = g.weight.detach().clone()

    def train() -> None:
        for x in of_d.over(of_g.over(list(DATA.split(4)))):
            of_d.backward(loss_d(g, d, x))
            of_g.backward(loss_g(g, d, x))

    with pytest.raises(ga.MisuseError, match=r"4 parameters of another model.*two different models.*first"):
        train()
    assert torch.equal(g.weight, before), "no update was made from it"


@pytest.mark.filterwarnings("ignore::gradaccum.DiscardedWindowWarning")
def test_a_step_by_hand() -> None:
    g, d = nets()
    accumulator = ga.Accumulator(g, torch.optim.SGD(g.parameters(), lr=0.5), micro_batches=3)
    other = torch.optim.SGD(d.parameters(), lr=0.5)

    def train() -> None:
        for x in accumulator.over(list(DATA.split(4))):
            accumulator.backward(loss_g(g, d, x))
            loss_d(g, d, x).backward()
            other.step()
            other.zero_grad()

    with pytest.raises(ga.MisuseError, match="another model"):
        train()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_order_that_is_right(micro_batches: int) -> None:
    """Of what the message says to type, against whole batches."""
    g, d = nets()
    of_g, of_d = accumulators(g, d, micro_batches)
    for x in of_d.over(of_g.over(list(DATA.split(4)))):
        for_g, for_d = loss_g(g, d, x), loss_d(g, d, x)
        of_g.backward(for_g)
        of_d.backward(for_d)
    g0, d0 = nets()
    og, od = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (g0, d0))
    for x in DATA.split(4 * micro_batches):
        grad_g = torch.autograd.grad(loss_g(g0, d0, x), list(g0.parameters()))
        grad_d = torch.autograd.grad(loss_d(g0, d0, x), list(d0.parameters()))
        for model, optimizer, grads in ((g0, og, grad_g), (d0, od, grad_d)):
            for parameter, gradient in zip(model.parameters(), grads, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for mine, whole in zip([*g.parameters(), *d.parameters()], [*g0.parameters(), *d0.parameters()], strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=1e-12)


def test_a_change_that_was_undone_is_none() -> None:
    g, d = nets()
    accumulator = ga.Accumulator(g, torch.optim.SGD(g.parameters(), lr=0.5), micro_batches=7)
    for x in accumulator.over(list(DATA.split(4))):
        update = accumulator.backward(loss_g(g, d, x))
        with torch.no_grad():  # averaged weights, for an evaluation
            kept = [parameter.clone() for parameter in d.parameters()]
            for parameter, before in zip(d.parameters(), kept, strict=True):
                parameter.zero_()
                parameter.copy_(before)
    assert update is not None
    assert update.micro_batches == 7


def test_a_backward_by_hand_before_the_windows_first() -> None:
    model = nn.Linear(3, 1).double()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), micro_batches=1)
    stream = accumulator.over([DATA])
    x = next(stream)
    model.weight.square().sum().backward()
    with pytest.raises(ga.MisuseError, match=r"have a \.grad before the window's first micro-batch"):
        accumulator.backward(model(x).square().mean())
