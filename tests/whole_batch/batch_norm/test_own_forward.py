"""BatchNorm layers with a forward of their own, networks that a loss has closed over, and feature hooks in lockstep."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

X = torch.randn(14, 2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class ByHand(nn.BatchNorm1d):
    """Normalises without F.batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), keepdim=True, unbiased=False)
        return (x - mean) / (var + self.eps).sqrt() * self.weight[:, None] + self.bias[:, None]


class AndMore(nn.BatchNorm1d):
    """Goes on after F.batch_norm, as timm's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


def net(layer: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), layer(3), nn.Conv1d(3, 1, 3)).double()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).abs().mean()


def step(model: nn.Module, loss_fn: Any = loss, **options: Any) -> ga.TrainStep:
    options = {"micro_batch_size": 4, "batch_norm": "exact", **options}
    return ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, **options)


def assert_whole(model: Any, twin: Any, loss_fn: Any) -> None:
    loss_fn(twin, X).backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-12)


def test_one_that_is_not_seen_is_refused() -> None:
    model = net(ByHand)
    with pytest.raises(ga.UnsupportedError, match=r"ByHand, a BatchNorm with a forward of its own.*Call F\.batch_norm"):
        step(model)(X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layer", [AndMore, nn.BatchNorm1d])
def test_one_that_is_seen_meets(layer: Any) -> None:
    model = net(layer)
    twin = copy.deepcopy(model)
    step(model).backward(X)
    assert_whole(model, twin, loss)


def test_one_in_evaluation_mode_need_not_meet() -> None:
    class Running(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return x - self.running_mean[:, None]  # type: ignore[index]

    model = net(Running)
    model[1].eval()
    twin = copy.deepcopy(model)
    step(model).backward(X)
    assert_whole(model, twin, loss)


def test_frozen_takes_a_closed_over_network_along() -> None:
    model, critic = net(nn.BatchNorm1d), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

    def through_critic(m: nn.Module, x: Tensor) -> Tensor:
        return F.softplus(critic(m(x)[:, 0])).mean()

    before, twins = copy.deepcopy(critic.state_dict()), copy.deepcopy((model, critic))
    step(model, through_critic, batch_norm="frozen").backward(X)
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert critic[1].training
    for twin in twins:
        twin.eval()
    assert_whole(model, twins[0], lambda m, x: F.softplus(twins[1](m(x)[:, 0])).mean())


def test_exact_leaves_a_closed_over_network_as_the_whole_batch_does() -> None:
    model, critic = net(nn.BatchNorm1d), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    twin, other = copy.deepcopy((model, critic))
    step(model, lambda m, x: F.softplus(critic(m(x)[:, 0])).mean()).backward(X)
    assert_whole(model, twin, lambda m, x: F.softplus(other(m(x)[:, 0])).mean())
    for name, value in other.state_dict().items():
        torch.testing.assert_close(critic.state_dict()[name], value, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ feature hooks
def with_list(model: Any) -> Any:
    features: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: features.append(output))

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        features.clear()
        return m(x).abs().mean() + features[0].square().mean()

    return loss_fn


class Features:
    """A collector with an attribute."""

    def __init__(self, layer: nn.Module) -> None:
        self.output = torch.zeros(())
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.output = output

    def loss(self, m: nn.Module, x: Tensor) -> Tensor:
        return m(x).abs().mean() + self.output.square().mean()


def with_dict(model: Any) -> Any:
    features: dict[str, Tensor] = {}
    model[0].register_forward_hook(lambda module, args, output: features.__setitem__("first", output))
    return lambda m, x: m(x).abs().mean() + features["first"].square().mean()


def with_attribute(model: Any) -> Any:
    def keep(module: Any, args: Any, output: Tensor) -> None:
        module.features = output

    model[0].register_forward_hook(keep)
    return lambda m, x: m(x).abs().mean() + m[0].features.square().mean()


@pytest.mark.parametrize("make", [with_list, with_dict, lambda model: Features(model[0]).loss])
def test_a_hook_that_shares_what_it_keeps_is_refused_in_lockstep(make: Any) -> None:
    model = net(nn.BatchNorm1d)
    loss_fn = make(model)
    with pytest.raises(ga.UnsupportedError, match=r"forward hook .* on '0' keeps.*module\.features = output"):
        step(model, loss_fn)(X)
    assert step(model, loss_fn, micro_batch_size=14)(X).micro_batches == 1
    assert step(model, loss_fn, batch_norm="frozen")(X).micro_batches == 4


def test_a_hook_that_keeps_it_on_its_module_is_right() -> None:
    model, twin = net(nn.BatchNorm1d), net(nn.BatchNorm1d)
    step(model, with_attribute(model)).backward(X)
    assert_whole(model, twin, with_attribute(twin))


def test_a_hook_that_only_logs_is_let_be() -> None:
    model, shapes = net(nn.BatchNorm1d), []
    model[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    step(model)(X)
    assert len(shapes) == 4
