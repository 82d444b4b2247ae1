"""The real dtypes against the whole batch in float64; and gradients that are not finite, which leave no trace."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import gradaccum as ga
from oracle import (
    ROWS,
    SINGLE,
    WAYS,
    Gradients,
    assert_same,
    assert_same_gradients,
    doubled,
    gradients_of,
    parameters_of,
    seen_by,
    whole_batches,
)
from tasks import LOSSES, MODELS, Batch, make_batch, make_model

EVERY_WAY = pytest.mark.parametrize("way", WAYS)

# One rounding to bf16 is off by 2**-9 = 0.2%, to fp16 by 2**-12 = 0.02%. A gradient is rounded some ten times on its
# way back through these models, and four micro-batches are added up; errors of random sign.
BF16 = 0.03
FP16 = 0.004

BATCHES = [make_batch(ROWS, seed=1), make_batch(ROWS, seed=2)]


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def error_of(made: Gradients, expected: Gradients) -> float:
    """2-norm of the difference, relative."""
    difference, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, right in expected.items():
        left = made[name]
        assert left is not None
        assert right is not None
        difference += (left.double() - right).square().sum()
        size += right.square().sum()
    return (difference / size).sqrt().item()


@pytest.mark.parametrize("loss", ["plain mean", "mean over tokens", "class weights, smoothed", "plain sum"])
@pytest.mark.parametrize("model", MODELS)
@EVERY_WAY
def test_single_precision(way: str, model: str, loss: str) -> None:
    own = make_model(model).float()
    whole = doubled(own)
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-3)
    batches = [in_dtype(batch, torch.float32) for batch in BATCHES]

    made = WAYS[way](own, optimizer, batches, LOSSES[loss].for_library)
    exact_batches = [in_dtype(batch, torch.float64) for batch in batches]
    optimizer = torch.optim.SGD(whole.parameters(), lr=1e-3)
    assert_same(made, whole_batches(whole, optimizer, exact_batches, LOSSES[loss].for_oracle), tolerance=SINGLE)


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["y"])


def autocast(dtype: torch.dtype) -> Callable[[nn.Module, Batch], Tensor]:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype):
            return F.mse_loss(model(batch).float(), batch["y"])

    return loss_fn


def first_gradient(way: str, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Any], **options: Any) -> Gradients:
    """What the optimizer finds at its first step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dtype = next(model.parameters()).dtype
    return WAYS[way](model, optimizer, [in_dtype(BATCHES[0], dtype)], loss_fn, **options)[0].gradients


def exact_gradient(model: nn.Module) -> Gradients:
    whole = doubled(model)
    mse(whole, BATCHES[0]).backward()
    return gradients_of(whole)


@pytest.mark.parametrize(
    ("dtype", "loss_fn"), [(torch.bfloat16, mse), (torch.float32, autocast(torch.bfloat16))], ids=["model", "autocast"]
)
@EVERY_WAY
def test_bf16(way: str, dtype: torch.dtype, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
    model = make_model("mlp").to(dtype)
    expected = exact_gradient(model)
    assert error_of(first_gradient(way, model, loss_fn), expected) < BF16


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@EVERY_WAY
def test_fp16_autocast_with_a_scaler(way: str, clip_norm: float | None) -> None:
    model = make_model("mlp").float()
    expected = exact_gradient(model)
    if clip_norm is not None:
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        expected = {name: gradient * clip_norm / norm for name, gradient in expected.items()}
    scaler = GradScaler("cpu")
    made = first_gradient(way, model, autocast(torch.float16), scaler=scaler, clip_norm=clip_norm)
    assert error_of(made, expected) < FP16
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("fused", [False, True])
@EVERY_WAY
def test_a_scale_changes_no_digit_of_fp32(way: str, fused: bool) -> None:
    """It is a power of two, and divided out again, also where a correction is made along with it."""
    found: list[dict[str, Tensor]] = []
    for scaler in (None, GradScaler("cpu")):
        model = make_model("mlp").float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        WAYS[way](model, optimizer, [in_dtype(batch, torch.float32) for batch in BATCHES], mse, scaler=scaler)
        found.append(parameters_of(model))
    assert_same_gradients(found[1], found[0], tolerance=1e-6)  # the correction is rounded to fp32, 2**-24, in both


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([1] * 256, id="equal"),
        pytest.param([3, 1, 2] * 40, id="ragged"),
        pytest.param([0, 5, 4], id="nothing first"),
        pytest.param([1, 200, 200], id="light first"),
    ],
)
def test_fp16_sums_do_not_overflow(weights: list[int]) -> None:
    """A mean gradient of 3,000: added up before it is divided it would be beyond 65,504, where fp16 ends."""
    model = nn.Linear(1, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=len(weights))
    x = torch.full((1, 1), 3000.0, dtype=torch.float16)
    with seen_by(optimizer, model) as seen:
        for weight in accumulator.over(weights):
            accumulator.backward(ga.Loss.mean(model(x).mean(), over=weight))
    assert len(seen) == 1, "it was skipped"
    gradient = seen[0]["weight"]
    assert gradient is not None
    assert abs(gradient.item() - 3000) <= 256 * 2**-11 * 3000  # each addition is rounded to 11 bits


# ---------------------------------------------------------------------------------------- gradients that are not finite

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


def spoiled(batch: Batch, bad: float, row: int) -> Batch:
    x = batch["x"].clone()
    x[row] = bad
    return {**batch, "x": x}


@pytest.mark.parametrize("row", [0, 6, ROWS - 1])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@EVERY_WAY
def test_one_bad_micro_batch_skips_the_update(
    way: str, name: str, scaled: bool, clip_norm: float | None, bad: float, row: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = [in_dtype(batch, torch.float32) for batch in BATCHES]
    batches = [good[0], spoiled(good[1], bad, row), good[1]]
    model = make_model("linear").float()
    whole = doubled(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = GradScaler("cpu") if scaled else None

    with caplog.at_level(logging.WARNING, "gradaccum"):
        made = WAYS[way](model, optimizer, batches, mse, clip_norm=clip_norm, scheduler=scheduler, scaler=scaler)

    assert [one.is_skipped for one in made] == [False, True, False]
    assert made[1].grad_norm is None if clip_norm is None else not math.isfinite(made[1].grad_norm)
    assert_same_gradients(made[1].parameters, made[0].parameters, tolerance=0.0)
    assert [one.rate for one in made] == [0.1 * 0.9, 0.1 * 0.9, 0.1 * 0.9 * 0.9]
    assert "update 2 was skipped: its gradient is not finite" in caplog.text
    if scaler is not None:
        assert scaler.get_scale() == 2.0**15, "it backs off once"
    # As if the bad batch had never been: moments and their bias correction, too.
    rest = OPTIMIZERS[name](whole.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(rest, 0.9)
    exact = [in_dtype(batch, torch.float64) for batch in good]
    expected = whole_batches(whole, rest, exact, mse, clip_norm=clip_norm, scheduler=scheduler)
    assert error_of(made[2].parameters, expected[1].parameters) < 1e-4  # Adam divides by the gradient's own size
