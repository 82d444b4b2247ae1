"""A window's own loss scale, scalers that are shared with another accumulator or the user, losses scaled by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import gradaccum as ga


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def scaler(**options: Any) -> GradScaler:
    return GradScaler("cpu", **{"init_scale": 1024.0, **options})


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def data(rows: int = 13) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("growth_interval", [1, 2000])
def test_one_scaler_for_two_accumulators(growth_interval: int) -> None:
    """The one's update moves the scale while the other's window is open: backs off, or grows."""

    def trained(*, shared: bool) -> Tensor:
        one = scaler(growth_interval=growth_interval)
        models = [net(1), net(2)]
        first, second = (
            ga.Accumulator(model, sgd(model), micro_batches=count, scaler=one if shared else scaler())
            for model, count in zip(models, (2, 3), strict=True)
        )
        for i, x in enumerate(second.over(first.over(list(data(24).split(2))))):
            first.backward(squares(models[0], x) * (float("inf") if i == 0 else 1.0))
            second.backward(squares(models[1], x))
        return weights(models[1])

    torch.testing.assert_close(trained(shared=True), trained(shared=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_the_users_scaler_takes_the_gradients_as_they_are(fused: bool) -> None:
    model, one = net().float(), scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    before, x = weights(model), data().float()
    step = ga.TrainStep(model, optimizer, squares, micro_batch_size=4, scaler=one)
    step.backward(x[:6])
    step.backward(x[6:])
    want = before - 0.1 * torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    one.step(optimizer)
    one.update()
    torch.testing.assert_close(weights(model), want)
    optimizer.zero_grad()
    assert step(x).skipped is False


def test_marks_that_no_step_used_do_not_last() -> None:
    model, one = net(), scaler()
    step = ga.TrainStep(model, sgd(model), squares, micro_batch_size=4, scaler=one)
    step.backward(data())
    model.zero_grad()
    twin = net()
    assert step(data()).skipped is False
    ga.TrainStep(twin, sgd(twin), squares, micro_batch_size=4)(data())
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-12)


def test_another_accumulators_update_does_not_forget_the_mark() -> None:
    model, other, one = net(1), net(2), scaler()
    optimizer, before = sgd(model), weights(net(1))
    ga.TrainStep(model, optimizer, squares, micro_batch_size=4, scaler=one).backward(data())
    ga.TrainStep(other, sgd(other), squares, micro_batch_size=4, scaler=one)(data())
    one.step(optimizer)
    want = before - 0.1 * torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(weights(model), want, rtol=0, atol=1e-12)


def test_gradients_left_scaled() -> None:
    model, twin, one = net(), net(), scaler()
    optimizer = sgd(model)
    step = ga.TrainStep(model, optimizer, squares, micro_batch_size=4, scaler=one)
    step.backward(data(), unscale=False)
    ga.TrainStep(twin, sgd(twin), squares, micro_batch_size=13).backward(data())
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad * 1024, rtol=1e-12, atol=0)  # type: ignore[operator]
    one.unscale_(optimizer)
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, rtol=1e-7, atol=0)


def test_what_cannot_be_left_scaled() -> None:
    model = net()
    with pytest.raises(ga.MisuseError, match=r"nothing scales losses here.*Pass scaler="):
        ga.TrainStep(model, sgd(model), squares, micro_batch_size=4).backward(data(), unscale=False)
    step = ga.TrainStep(model, sgd(model), squares, micro_batch_size=4, scaler=scaler())
    step.backward(data())
    with pytest.raises(ga.MisuseError, match="divided by the loss scale already"):
        step.backward(data(), unscale=False)


# ----------------------------------------------------------------------------------------------------- scaled by hand
@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("form", ["plain", "Loss", "divided after"])
def test_a_loss_that_was_scaled_by_hand(is_told: bool, form: str) -> None:
    model, one = net(), scaler()
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=2, scaler=one if is_told else None)
    for x in accumulator.over([data(4)]):
        scaled: Any = one.scale(squares(model, x))
        loss = {"plain": scaled, "Loss": ga.Loss.mean(scaled, over=4), "divided after": scaled / 2}[form]
        with pytest.raises(ga.LossError, match=r"scaler\.scale\(loss\)\. The gradient would be.*Pass the loss itself"):
            accumulator.backward(loss)
        break


def test_other_factors_are_no_scale() -> None:
    one, half = scaler(), torch.tensor(0.5)
    assert one.scale(torch.ones(())) == 1024.0
    model = net().float()
    step = ga.TrainStep(model, sgd(model), lambda m, x: 2.0 * squares(m, x) * half * torch.tensor(1024.0),
                        micro_batch_size=4)  # fmt: skip
    assert step(data().float()).skipped is False
