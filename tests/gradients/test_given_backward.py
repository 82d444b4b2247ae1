"""`backward=fn`: the function runs the backward, and the gradient is the whole batch's whatever it does on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradaccum as ga
from oracle import assert_same_gradients, gradients_of

SIZES = [3, 1, 5, 4]


def job(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(13, 7).double(), torch.randn(13, 1).double()
    return model, list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def whole(model: nn.Module, data: list[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    model.zero_grad()
    loss(model(x), y).backward()
    found = gradients_of(model)
    model.zero_grad()
    return found


def plain(root: Tensor, *, gradient: Tensor) -> None:
    root.backward(gradient=gradient)


def divides(root: Tensor, *, gradient: Tensor) -> None:
    (root / 4).backward(gradient=gradient)


def scales(root: Tensor, *, gradient: Tensor) -> None:
    (root * 1024).backward(gradient=gradient)


@pytest.mark.parametrize("function", [plain, divides, scales])
@pytest.mark.parametrize("way", ["own loop", "whole batch in hand"])
def test_the_gradient_is_the_whole_batchs(function: Any, way: str) -> None:
    model, data = job()
    expected = whole(model, data, F.mse_loss)
    seeds: list[Tensor] = []

    def backward(root: Tensor, *, gradient: Tensor) -> None:
        seeds.append(gradient)
        function(root, gradient=gradient)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    if way == "own loop":
        accumulator = ga.Accumulator(model, optimizer, batch_size=13, backward=backward)
        for x, y in accumulator.over(data):
            accumulator.backward(F.mse_loss(model(x), y))
    else:
        batch = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
        step = ga.TrainStep(
            model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), micro_batch_size=4, backward=backward
        )
        step(batch)
    assert_same_gradients(seen[0], expected)
    assert len(seeds) == 4


def test_two_terms_run_one_backward_from_one_root() -> None:
    model, data = job()
    expected = whole(model, data, lambda out, y: F.mse_loss(out, y) + 0.5 * out.sum() / 7)
    calls: list[Tensor] = []

    def backward(root: Tensor, *, gradient: Tensor) -> None:
        calls.append(root)
        divides(root, gradient=gradient)

    step = ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, b: {
            "fit": ga.Loss.mean(F.mse_loss(m(b[0]), b[1]), over=len(b[0])),
            "size": ga.Loss.sum(0.5 * m(b[0]).sum(), over=7 * len(b[0]) / 13),
        },
        micro_batch_size=4,
        weights=lambda b: {"fit": len(b[0]), "size": 7 * len(b[0]) / 13},
        backward=backward,
    )
    step.backward(tuple(torch.cat(parts) for parts in zip(*data, strict=True)))
    assert_same_gradients(gradients_of(model), expected)
    assert len(calls) == 4
    assert all(root.dim() == 0 for root in calls)


def test_a_loss_over_the_batch_gives_outputs_and_loss_to_it() -> None:
    model, data = job()
    centred = lambda out, y: ((out - out.mean()) * (y - y.mean())).sum()  # noqa: E731
    expected = whole(model, data, centred)
    step = ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        forward=lambda m, b: m(b[0]),
        batch_loss=lambda out, b: centred(out, b[1]),
        kept_graphs=1,
        micro_batch_size=4,
        backward=scales,
    )
    step.backward(tuple(torch.cat(parts) for parts in zip(*data, strict=True)))
    assert_same_gradients(gradients_of(model), expected)


def test_other_models_keep_their_gradients() -> None:
    model, data = job()
    other = nn.Linear(1, 1).double()
    other.weight.grad = torch.full((1, 1), 3.0).double()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=4, backward=divides)
    for x, _ in accumulator.over(data):
        accumulator.backward(ga.Loss.mean(other(model(x)).mean(), over=len(x)))
    assert other.weight.grad.item() == 3.0
    assert other.bias.grad is None


def test_a_scaler_still_scales() -> None:
    model, data = job()
    expected = whole(model, data, F.mse_loss)
    arrived: list[float] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))

    def backward(root: Tensor, *, gradient: Tensor) -> None:
        root.register_hook(lambda g: arrived.append(g.item()))
        scales(root, gradient=gradient)

    accumulator = ga.Accumulator(model, optimizer, batch_size=13, scaler=scaler, backward=backward)
    for x, y in accumulator.over(data):
        accumulator.backward(F.mse_loss(model(x), y))
    assert arrived[0] > 512 / 13
    assert_same_gradients(seen[0], expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda root, gradient: None, "ran 0 backwards .* adds nothing to the gradient"),
        (
            lambda root, gradient: (root.backward(gradient, retain_graph=True), root.backward(gradient)),
            "ran 2 backwards .* counts 2 times",
        ),
        (lambda root, gradient: root.detach().requires_grad_().backward(gradient), "ran 0 backwards"),
    ],
)
def test_a_function_that_runs_no_backward_or_two(function: Any, message: str) -> None:
    model, data = job()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=4, backward=function)
    micro_batches = accumulator.over(data)
    x, y = next(iter(micro_batches))
    with pytest.raises(ga.MisuseError, match=message):
        accumulator.backward(F.mse_loss(model(x), y))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_options_that_do_not_go_together() -> None:
    model, _ = job()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ga.ParameterError, match="Leave fused= out"):
        ga.Accumulator(model, optimizer, micro_batches=4, backward=plain, fused=True)
    with pytest.raises(ga.ParameterError, match="backward= is a int"):
        ga.Accumulator(model, optimizer, micro_batches=4, backward=3)  # type: ignore[arg-type]
