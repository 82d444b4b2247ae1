"""Sums of bf16 and fp16 gradients in fp32: as exact as the whole batch's own gradient, with every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import gradaccum as ga
from gradaccum.errors import ParameterError
from oracle import seen_by

ROWS, FEATURES, CLASSES = 1024, 16, 5
# The project's own bound: what adding up may add to the error that the whole batch's gradient has by itself.
OWN_ERROR = 1.05

Parameters = Any
OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "AdamW, one by one": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=False, fused=False),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "SGD with momentum, fused": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


def make(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, CLASSES))
    return layers.to(torch.bfloat16).to(dtype)  # the same numbers in any dtype


def data(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, FEATURES, generator=generator).to(torch.bfloat16)
    y = (x.float() @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return x.to(dtype), y


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def error(gradients: Any, expected: dict[str, Tensor]) -> float:
    """Relative, in the 2-norm over all parameters."""
    differences = [(gradients[name].double() - right).norm() for name, right in expected.items()]
    return (torch.stack(differences).norm() / torch.stack([right.norm() for right in expected.values()]).norm()).item()


def gradients_by_torch(dtype: torch.dtype) -> dict[str, Tensor]:
    model = make(dtype)
    loss_fn(model, data(dtype)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def train_step(model: nn.Module, optimizer: Optimizer, size: int, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=size, accumulate_dtype=torch.float32, **options)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("micro_batches", [64, 1024])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_error_is_the_whole_batchs_own(name: str, micro_batches: int, fused: bool) -> None:
    expected = gradients_by_torch(torch.float64)
    own = error(gradients_by_torch(torch.bfloat16), expected)
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    with seen_by(optimizer, model) as seen:
        update = train_step(model, optimizer, ROWS // micro_batches, fused=fused)(data())
    assert update.micro_batches == micro_batches
    assert all(gradient is not None and gradient.dtype == torch.bfloat16 for gradient in seen[0].values())
    assert error(seen[0], expected) <= OWN_ERROR * own


def test_the_same_sum_in_bf16_is_several_times_worse() -> None:
    expected = gradients_by_torch(torch.float64)
    own = error(gradients_by_torch(torch.bfloat16), expected)
    model = make()
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch_size=1)
    step.backward(data())
    assert error({name: parameter.grad for name, parameter in model.named_parameters()}, expected) > 3 * own


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_your_own_loop(fused: bool) -> None:
    expected = gradients_by_torch(torch.float64)
    own = error(gradients_by_torch(torch.bfloat16), expected)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    accumulator = ga.Accumulator(
        model, optimizer, micro_batches=64, accumulate_dtype=torch.float32, fused=fused, clip_norm=float("inf")
    )
    x, y = data()
    with seen_by(optimizer, model) as seen:
        for micro_batch in accumulator.over(list(zip(x.split(16), y.split(16), strict=True))):
            update = accumulator.backward(loss_fn(model, micro_batch))
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert update is not None
    assert update.grad_norm is not None
    assert error(seen[0], expected) <= OWN_ERROR * own
    norm = torch.cat([right.flatten() for right in expected.values()]).norm()
    assert abs(update.grad_norm.item() / norm.item() - 1) <= OWN_ERROR * own


def test_it_is_clipped_before_it_is_rounded() -> None:
    expected = gradients_by_torch(torch.float64)
    norm = torch.cat([right.flatten() for right in expected.values()]).norm().item()
    own = error(gradients_by_torch(torch.bfloat16), expected)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with seen_by(optimizer, model) as seen:
        train_step(model, optimizer, 16, clip_norm=norm / 2)(data())
    assert error(seen[0], {name: right / 2 for name, right in expected.items()}) <= OWN_ERROR * own


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["AdamW, foreach", "AdamW, fused", "SGD"])
def test_fp16_with_a_scaler(name: str, clip_norm: float | None) -> None:
    """Torch's scaler refuses gradients in fp16; sums in fp32 are none."""
    expected = gradients_by_torch(torch.float64)
    own = error(gradients_by_torch(torch.float16), expected)
    norm = torch.cat([right.flatten() for right in expected.values()]).norm().item()
    model = make(torch.float16)
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with seen_by(optimizer, model) as seen:
        # Summed over 64 micro-batches at this scale, fp16 would overflow.
        update = train_step(model, optimizer, 16, scaler=scaler, clip_norm=clip_norm)(data(torch.float16))
    assert not update.skipped
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    # A scaled loss loses less to underflow than the whole batch's, so that the bound is one from above.
    assert error(seen[0], {name: factor * right for name, right in expected.items()}) <= OWN_ERROR * own


@pytest.mark.parametrize("with_scaler", [True, False], ids=["scaler", "no scaler"])
def test_what_overflows_when_it_is_rounded_is_skipped(with_scaler: bool) -> None:
    model = nn.Linear(1, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    step = ga.TrainStep(
        model,
        optimizer,
        lambda model, x: ga.Loss.sum(model(x).float().sum()),
        micro_batch_size=1,
        accumulate_dtype=torch.float32,
        scaler=torch.amp.GradScaler("cpu", init_scale=1.0) if with_scaler else None,
    )
    update = step(torch.full((2, 1), 40_000.0, dtype=torch.float16))  # 80,000 is beyond fp16
    assert update.skipped
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_nothing() -> None:
    model = make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = data()
    x[3, 0] = float("nan")
    step = train_step(model, torch.optim.AdamW(model.parameters(), fused=True), 16)
    assert step((x, y)).skipped
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert_follows_the_parameter(model)
    assert not step(data()).skipped


def test_backward_adds_gradients_of_the_parameters_dtype() -> None:
    model = make()
    step = train_step(model, torch.optim.AdamW(model.parameters()), 16)
    step.backward(data())
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    assert all(gradient.dtype == torch.bfloat16 for gradient in once.values())
    step.backward(data())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_model_of_several_dtypes() -> None:
    model = make()
    model[2].float()  # type: ignore[index]
    model[2].register_forward_pre_hook(lambda module, args: (args[0].float(),))  # type: ignore[index]
    model[2].register_forward_hook(lambda module, args, out: out.to(torch.bfloat16))  # type: ignore[index]
    optimizer = torch.optim.AdamW(model.parameters())
    with seen_by(optimizer, model) as seen:
        train_step(model, optimizer, 16)(data())
    assert {gradient.dtype for gradient in seen[0].values() if gradient is not None} == {torch.bfloat16, torch.float32}


def test_the_model_is_left_as_it_was() -> None:
    model = make()
    step = train_step(model, torch.optim.SGD(model.parameters()), 16)
    step(data())
    assert_follows_the_parameter(model)


def test_also_when_a_window_is_discarded() -> None:
    model = make()

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("broken")

    step = ga.TrainStep(
        model, torch.optim.SGD(model.parameters()), breaks, micro_batch_size=16, accumulate_dtype=torch.float32
    )
    with pytest.raises(ValueError, match="broken"):
        step(data())
    assert_follows_the_parameter(model)


def assert_follows_the_parameter(model: nn.Module) -> None:
    """Gradients have the parameter's dtype, also after it has been converted."""
    model.zero_grad()
    loss_fn(model, data()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters()
    )
    model.zero_grad()
    model.float()
    loss_fn(model, data(torch.float32)).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    model.zero_grad()
    model.bfloat16()


def test_parameters_in_fp32_are_as_without() -> None:
    model, other = make(torch.float32), make(torch.float32)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 16)(data(torch.float32))
    step = ga.TrainStep(other, torch.optim.SGD(other.parameters(), lr=0.1), loss_fn, micro_batch_size=16)
    step(data(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float32"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    model = make()
    with pytest.raises(ParameterError, match=r"torch\.float32.*2% of the gradient"):
        ga.Accumulator(model, torch.optim.SGD(model.parameters()), micro_batches=2, accumulate_dtype=dtype)
