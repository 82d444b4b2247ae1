"""Parameters that an optimizer is given in place of others, as many as before."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

X = torch.randn(11, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("way", ["step", "backward", "loop"])
def test_a_replaced_parameter_trains_like_the_others(way: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, loss, micro_batch_size=4)
    accumulator = ga.Accumulator(model, optimizer, batch_size=11)

    def train() -> None:
        if way == "step":
            step(X)
        elif way == "backward":
            step.backward(X)
            optimizer.step()
            optimizer.zero_grad()
        else:
            for x in accumulator.over(X.split(4)):
                accumulator.backward(loss(model, x))

    train()
    model[1] = nn.Linear(3, 5, bias=False).double()
    optimizer.param_groups[0]["params"][2] = model[1].weight
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        grads = torch.autograd.grad(loss(model, X), list(model.parameters()))
        train()
        for parameter, old, gradient in zip(model.parameters(), before, grads, strict=True):
            torch.testing.assert_close(parameter, old - 0.1 * gradient, rtol=0, atol=1e-12)
            assert parameter.grad is None
