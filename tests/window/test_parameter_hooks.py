"""Hooks on parameters: those that step are refused, those that clamp are told, those that look or mask are let be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

seen: list[Any] = []


class Layerwise:
    """An optimizer in the backward, as LOMO is: steps in a method of a method."""

    def hook(self, parameter: nn.Parameter) -> None:
        self.update(parameter)

    def update(self, parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter.data.sub_(0.1 * parameter.grad)  # type: ignore[operator]
        parameter.grad = None


def of_the_tutorial(model: nn.Module) -> Callable[[Any], None]:
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def hook(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    return hook


def clamps(model: nn.Module) -> Callable[[Any], None]:
    def hook(parameter: Any) -> None:
        parameter.grad.clamp_(-1, 1)

    return hook


def trained(model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch_size=4, **options)
    return step(torch.ones(11, 3))


def looped(model: nn.Module) -> None:
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    for x in accumulator.over([torch.ones(2, 3)]):
        accumulator.backward(model(x).mean())


@pytest.mark.parametrize("make", [of_the_tutorial, lambda model: Layerwise().hook, clamps])
@pytest.mark.parametrize("way", ["TrainStep", "Accumulator"])
def test_an_optimizer_in_the_backward_is_refused_before_it_steps(make: Any, way: str) -> None:
    model = nn.Linear(3, 2)
    hook, before = make(model), model.weight.detach().clone()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    for _ in range(2):  # each time
        with pytest.raises(ga.MisuseError, match=r"runs once a micro-batch.*before_step=function"):
            (trained if way == "TrainStep" else looped)(model)
    assert torch.equal(model.weight, before)


def test_one_that_is_not_read_is_seen_by_what_it_does() -> None:
    model = nn.Linear(3, 2)

    def hook(parameter: Tensor) -> None:
        with torch.no_grad():
            torch._foreach_add_([parameter], [parameter.grad], alpha=-0.1)  # type: ignore[list-item]

    model.weight.register_post_accumulate_grad_hook(hook)
    with pytest.raises(ga.MisuseError, match="changes the parameter"):
        trained(model, check="off")


def test_hooks_that_look_or_are_linear_are_let_be() -> None:
    model, total = nn.Linear(3, 2), torch.zeros(())

    def hook(parameter: Any) -> None:
        total.mul_(0.9).add_(parameter.grad.norm())
        seen.append(parameter.shape)

    mask = torch.tensor([1.0, 0.0, 1.0])
    model.weight.register_post_accumulate_grad_hook(hook)
    model.bias.register_hook(lambda gradient: seen.append(gradient.norm()))
    model.weight.register_hook(lambda gradient: gradient * mask)
    seen.clear()
    assert trained(model).micro_batches == 3
    assert len(seen) == 6


def test_frozen_parameters_have_no_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.register_post_accumulate_grad_hook(of_the_tutorial(model))
    model[0].requires_grad_(False)
    assert trained(model).index == 1


@pytest.mark.parametrize(
    "hook", [lambda g: g.clamp(-1, 1), lambda g: g / max(1.0, float(g.norm()))], ids=["value", "norm"]
)
def test_a_hook_that_clamps_is_told_once(hook: Any) -> None:
    model = nn.Linear(3, 2)
    model.weight.register_hook(hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch_size=4)
    with pytest.warns(ga.GradAccumWarning, match=r"on 'weight' runs on each micro-batch's share.*before_step="):
        step(torch.ones(11, 3))
    step(torch.ones(11, 3))


def test_where_nothing_is_added_up_a_clamp_is_right() -> None:
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch_size=11)
    step(torch.ones(11, 3))
    with pytest.warns(ga.GradAccumWarning, match="on 'weight' runs on each micro-batch's share"):
        step(torch.ones(23, 3))
