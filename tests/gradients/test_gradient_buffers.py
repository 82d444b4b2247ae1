"""What gradients add up in.

In memory that stays: right with backwards that write their result over the last one, as CUDA graphs do. In fp32: as
exact as the whole batch's own gradient, with every optimizer.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import gradaccum as ga
from gradaccum.errors import MisuseError, ParameterError, UnsupportedError
from gradaccum.gradients.gradient_buffers import check_persistent
from oracle import (
    EXACT,
    RAGGED,
    ROWS,
    WAYS,
    assert_same,
    assert_same_gradients,
    by_own_loop,
    gradients_of,
    parameters_of,
    seen_by,
    whole_batches,
    whole_in_hand,
)
from tasks import MODELS, Batch, make_batch, make_model, pieces

BATCHES = [make_batch(ROWS, seed=seed) for seed in (1, 2, 3)]


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["y"])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def persistent_step(model: nn.Module, optimizer: Optimizer, loss_fn: Any, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(model, optimizer, loss_fn, **{"micro_batch_size": 4, "persistent_gradients": True} | options)


# -------------------------------------------------------------------------------------------------------- static memory
class Replayed(torch.autograd.Function):
    """A product whose backward writes the weight's gradient into the same memory each time, and returns an alias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, static: Tensor, alias: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.static, ctx.alias = static, alias
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        torch.matmul(gradients[0].t(), x, out=ctx.static)
        return gradients[0] @ weight, ctx.alias(ctx.static), None, None


class Graphed(nn.Module):
    """Two layers of the kind, and one of torch's own."""

    def __init__(self, alias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.alias = alias
        self.static = [torch.empty(6, 6, dtype=torch.float64) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        for layer, static in zip((self.first, self.second), self.static, strict=True):
            x = torch.tanh(Replayed.apply(x, layer.weight, static, self.alias))
        return self.last(x)


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda static: static.detach(),
    "a view": lambda static: static.view_as(static),
    "of the storage": lambda static: torch.empty(0, dtype=static.dtype).set_(static),  # type: ignore[call-overload]
}


def graphed(alias: str = "detached") -> Graphed:
    torch.manual_seed(5)
    return Graphed(ALIASES[alias]).double()


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def float_squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


def by_torch(alias: str, rows: int) -> dict[str, Tensor | None]:
    model = graphed(alias)
    for piece in inputs()[0].split(rows):
        (squares(model, piece) * len(piece) / ROWS).backward()
    return gradients_of(model)


@pytest.mark.parametrize("alias", ALIASES)
def test_torch_itself_is_wrong(alias: str) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(by_torch(alias, 4), by_torch("detached", ROWS))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("alias", ALIASES)
def test_replayed_backwards_add_up(alias: str, persistent: bool, fused: bool) -> None:
    model, expected = graphed(alias), graphed()
    train_step = persistent_step(model, sgd(model), squares, fused=fused, persistent_gradients=persistent)
    for x in inputs():
        train_step(x)
    whole_batches(expected, sgd(expected), inputs(), squares)
    with nullcontext() if persistent else pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(parameters_of(model), parameters_of(expected))


@pytest.mark.parametrize("alias", ALIASES)
def test_so_do_those_of_a_loop_and_of_the_gradient_alone(alias: str) -> None:
    model, expected = graphed(alias), graphed()
    optimizer = sgd(model)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=len(RAGGED), persistent_gradients=True)
    for piece in accumulator.over([piece for x in inputs() for piece in x.split(RAGGED)]):
        accumulator.backward(squares(model, piece))
    whole_batches(expected, sgd(expected), inputs(), squares)
    assert_same_gradients(parameters_of(model), parameters_of(expected))
    persistent_step(model, optimizer, squares).backward(inputs()[0])
    squares(expected, inputs()[0]).backward()
    assert_same_gradients(gradients_of(model), gradients_of(expected))


# ------------------------------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_updates_are_the_whole_batch_s(way: str, name: str, fused: bool) -> None:
    model, expected = make_model(name), make_model(name)
    # Torch's SGD refuses weight decay for sparse gradients, which the oracle has.
    decay = 0.0 if name == "sparse embedding" else 0.1
    optimizer, right = (
        torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=decay) for one in (model, expected)
    )
    made = WAYS[way](model, optimizer, BATCHES, mse, fused=fused, clip_norm=0.3, persistent_gradients=True)
    assert_same(made, whole_batches(expected, right, BATCHES, mse, clip_norm=0.3))


def test_totals_that_are_guessed_far_too_small() -> None:
    weight_of = dict(zip(RAGGED, (1.0, 50.0, 2.0, 3.0), strict=True))  # 4 are expected, so the sum so far is rescaled

    def weighted(model: nn.Module, batch: Batch) -> ga.Loss:
        weight = weight_of[len(batch["x"])]
        return ga.Loss.sum(mse(model, batch) * weight, over=weight)

    def whole(model: nn.Module, batch: Batch) -> Tensor:
        losses = [mse(model, piece) * weight_of[len(piece["x"])] for piece in pieces(batch, RAGGED)]
        return torch.stack(losses).sum() / sum(weight_of.values())

    model, expected = make_model("mlp"), make_model("mlp")
    for one in (model, expected):
        one.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    made = by_own_loop(model, sgd(model), BATCHES, weighted, persistent_gradients=True)
    assert_same(made, whole_batches(expected, sgd(expected), BATCHES, whole))


class Sometimes(nn.Module):
    """A layer that some windows do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) if x[0, 0] > 0 else self.sometimes(self.always(x))


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_without_a_gradient_are_left_alone(fused: bool) -> None:
    model = Sometimes().double()
    expected = copy.deepcopy(model)
    optimizer = sgd(model)
    whole = [x.abs() if index == 1 else -x.abs() for index, x in enumerate(inputs())]
    made, _ = whole_in_hand(persistent_step(model, optimizer, squares, fused=fused), model, optimizer, whole)
    assert_same(made, whole_batches(expected, sgd(expected), whole, squares))
    assert made[1].gradients["sometimes.weight"] is None


def test_fp16_scaling_and_a_gradient_that_is_not_finite() -> None:
    model, expected = make_model("mlp"), make_model("mlp")
    spoiled = copy.deepcopy(BATCHES[1])
    spoiled["x"][0] = float("inf")
    train_step = persistent_step(model, sgd(model), mse, scaler=GradScaler("cpu", init_scale=2.0**8))
    updates = [train_step(batch) for batch in (BATCHES[0], spoiled, BATCHES[2])]
    assert [bool(update.skipped) for update in updates] == [False, True, False]
    whole_batches(expected, sgd(expected), [BATCHES[0], BATCHES[2]], mse)
    assert_same_gradients(parameters_of(model), parameters_of(expected))


def test_bf16_is_added_up_in_fp32() -> None:
    model = nn.Linear(6, 6, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    seen: dict[bool, Any] = {}
    start = parameters_of(model)
    for persistent in (True, False):
        model.load_state_dict(start)
        options = {"accumulate_dtype": torch.float32, "persistent_gradients": persistent}
        train_step = persistent_step(model, optimizer, float_squares, micro_batch_size=1, **options)
        train_step.backward(x)
        seen[persistent] = model.weight.grad
        optimizer.zero_grad()
        train_step(x)
    assert seen[True].dtype == torch.bfloat16
    torch.testing.assert_close(seen[True], seen[False])  # both rounded once


# --------------------------------------------------------------------------------------------------------------- memory
def test_the_memory_is_the_same_in_every_window_and_not_the_user_s() -> None:
    model = make_model("mlp")
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False))
    optimizer = sgd(model)
    frozen = model.get_parameter("frozen")
    name, weight = next((name, one) for name, one in model.named_parameters() if one.requires_grad)
    where: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: where.append(weight.grad.data_ptr()))  # type: ignore[union-attr]
    train_step = persistent_step(model, optimizer, mse)
    before: list[bool] = []
    weight.register_post_accumulate_grad_hook(lambda _: before.append(frozen.grad is None))
    train_step(BATCHES[0])
    assert weight.grad is None
    train_step.backward(BATCHES[1])
    own, values = weight.grad, gradients_of(model)
    optimizer.zero_grad()
    train_step(BATCHES[2])
    assert where[0] == where[1]
    assert own is not None
    assert own.data_ptr() != where[0]
    assert torch.equal(own, values[name])  # type: ignore[arg-type]
    assert all(before), "frozen parameters have no buffer"
    frozen.requires_grad_()
    train_step(BATCHES[0])
    assert not all(before)
    assert where[2] == where[0]


def test_a_model_that_was_converted() -> None:
    model = make_model("mlp").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model({"x": batch["x"].to(next(model.parameters()).dtype)}).double(), batch["y"])

    train_step = persistent_step(model, optimizer, loss_of)
    train_step(BATCHES[0])
    model.double()
    expected = make_model("mlp")
    expected.load_state_dict(model.state_dict())
    train_step(BATCHES[1])
    whole_batches(expected, torch.optim.SGD(expected.parameters(), lr=0.1), [BATCHES[1]], mse)
    assert_same_gradients(parameters_of(model), parameters_of(expected), tolerance=EXACT)


def test_after_a_discarded_window() -> None:
    model, expected = make_model("mlp"), make_model("mlp")
    calls = count(1)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        if next(calls) == 3:
            raise RuntimeError("broken")
        return mse(model, batch)

    train_step = persistent_step(model, sgd(model), loss_of)
    with pytest.raises(RuntimeError, match="broken"):
        train_step(BATCHES[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    train_step(BATCHES[1])
    whole_batches(expected, sgd(expected), [BATCHES[1]], mse)
    assert_same_gradients(parameters_of(model), parameters_of(expected))


def test_clearing_before_the_first_backward_is_seen() -> None:
    model = make_model("mlp")
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=4, persistent_gradients=True)
    micro_batches = iter(accumulator.over(pieces(BATCHES[0], RAGGED)))
    loss = mse(model, next(micro_batches))
    model.zero_grad()
    with pytest.raises(MisuseError, match="was cleared"):
        accumulator.backward(loss)


# -------------------------------------------------------------------------------------------------------------- refused
def test_optimizers_of_sparse_gradients() -> None:
    model = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ParameterError, match="with SparseAdam"):
        persistent_step(model, torch.optim.SparseAdam(model.parameters()), squares)


def test_several_processes() -> None:
    with pytest.raises(UnsupportedError, match="persistent_gradients=True with several processes"):
        check_persistent([], has_ranks=True)


# ------------------------------------------------------------------------------------------------------------- in fp32
SAMPLES, FEATURES, CLASSES = 1024, 16, 5
# The project's own bound: what adding up may add to the error that the whole batch's gradient has by itself.
OWN_ERROR = 1.05

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW, one by one": (torch.optim.AdamW, {"lr": 1e-3, "foreach": False, "fused": False}),
    "AdamW, foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 1e-3}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2}),
    "SGD with momentum, fused": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "fused": True}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-3}),
}


def seen_in_fp32(
    name: str, size: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[dict[str, Tensor], ga.Update]:
    """What an optimizer finds in an update whose gradients add up in fp32, and the update."""
    model = make_half(dtype)
    kind, its_own = OPTIMIZERS[name]
    optimizer: Optimizer = kind(model.parameters(), **its_own)
    with seen_by(optimizer, model) as seen:
        update = wide_step(model, optimizer, size, **options)(samples_of(dtype))
    return seen[0], update  # type: ignore[return-value]


def make_half(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, CLASSES))
    return layers.to(torch.bfloat16).to(dtype)  # the same numbers in any dtype


def samples_of(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, FEATURES, generator=generator).to(torch.bfloat16)
    y = (x.float() @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return x.to(dtype), y


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def error(gradients: Any, expected: dict[str, Tensor]) -> float:
    """Relative, in the 2-norm over all parameters."""
    return norm_of({name: gradients[name].double() - right for name, right in expected.items()}) / norm_of(expected)


def norm_of(gradients: dict[str, Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def gradients_by_torch(dtype: torch.dtype) -> dict[str, Tensor]:
    model = make_half(dtype)
    loss_fn(model, samples_of(dtype)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def whole_gradient_and_error(dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], float]:
    """The whole batch's gradient in float64, and the error of torch's own in a half precision."""
    expected = gradients_by_torch(torch.float64)
    return expected, error(gradients_by_torch(dtype), expected)


def wide_step(model: nn.Module, optimizer: Optimizer, size: int, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=size, accumulate_dtype=torch.float32, **options)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("micro_batches", [64, 1024])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_error_is_the_whole_batchs_own(name: str, micro_batches: int, fused: bool) -> None:
    expected, own = whole_gradient_and_error()
    seen, update = seen_in_fp32(name, SAMPLES // micro_batches, fused=fused)
    assert update.micro_batches == micro_batches
    assert {gradient.dtype for gradient in seen.values()} == {torch.bfloat16}
    assert error(seen, expected) <= OWN_ERROR * own


def test_the_same_sum_in_bf16_is_several_times_worse() -> None:
    expected, own = whole_gradient_and_error()
    model = make_half()
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch_size=1)
    step.backward(samples_of())
    assert error({name: parameter.grad for name, parameter in model.named_parameters()}, expected) > 3 * own


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_your_own_loop(fused: bool) -> None:
    expected, own = whole_gradient_and_error()
    model = make_half()
    optimizer = torch.optim.AdamW(model.parameters())
    accumulator = ga.Accumulator(
        model, optimizer, micro_batches=64, accumulate_dtype=torch.float32, fused=fused, clip_norm=float("inf")
    )
    x, y = samples_of()
    with seen_by(optimizer, model) as seen:
        for micro_batch in accumulator.over(list(zip(x.split(16), y.split(16), strict=True))):
            update = accumulator.backward(loss_fn(model, micro_batch))
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert update is not None
    assert update.grad_norm is not None
    assert error(seen[0], expected) <= OWN_ERROR * own
    assert abs(update.grad_norm.item() / norm_of(expected) - 1) <= OWN_ERROR * own


def test_it_is_clipped_before_it_is_rounded() -> None:
    expected, own = whole_gradient_and_error()
    seen, _ = seen_in_fp32("AdamW, fused", 16, clip_norm=norm_of(expected) / 2)
    assert error(seen, {name: right / 2 for name, right in expected.items()}) <= OWN_ERROR * own


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["AdamW, foreach", "AdamW, fused", "SGD"])
def test_fp16_with_a_scaler(name: str, clip_norm: float | None) -> None:
    """Torch's scaler refuses gradients in fp16; sums in fp32 are none."""
    expected, own = whole_gradient_and_error(torch.float16)
    scaler = GradScaler("cpu", init_scale=2.0**16)  # summed over 64 micro-batches at this scale, fp16 would overflow
    seen, update = seen_in_fp32(name, 16, torch.float16, scaler=scaler, clip_norm=clip_norm)
    assert not update.skipped
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm_of(expected))
    # A scaled loss loses less to underflow than the whole batch's, so that the bound is one from above.
    assert error(seen, {name: factor * right for name, right in expected.items()}) <= OWN_ERROR * own


@pytest.mark.parametrize("with_scaler", [True, False], ids=["scaler", "no scaler"])
def test_what_overflows_when_it_is_rounded_is_skipped(with_scaler: bool) -> None:
    model = nn.Linear(1, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()

    def total(model: nn.Module, x: Tensor) -> ga.Loss:
        return ga.Loss.sum(model(x).float().sum())

    scaler = GradScaler("cpu", init_scale=1.0) if with_scaler else None
    step = ga.TrainStep(model, optimizer, total, micro_batch_size=1, accumulate_dtype=torch.float32, scaler=scaler)
    update = step(torch.full((2, 1), 40_000.0, dtype=torch.float16))  # 80,000 is beyond fp16
    assert update.skipped
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_nothing() -> None:
    model = make_half()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = samples_of()
    x[3, 0] = float("nan")
    step = wide_step(model, torch.optim.AdamW(model.parameters(), fused=True), 16)
    assert step((x, y)).skipped
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert_follows_the_parameter(model)
    assert not step(samples_of()).skipped


def test_backward_adds_gradients_of_the_parameters_dtype() -> None:
    model = make_half()
    step = wide_step(model, torch.optim.AdamW(model.parameters()), 16)
    step.backward(samples_of())
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    assert all(gradient.dtype == torch.bfloat16 for gradient in once.values())
    step.backward(samples_of())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_model_of_several_dtypes() -> None:
    model = make_half()
    model[2].float()  # type: ignore[index]
    model[2].register_forward_pre_hook(lambda module, args: (args[0].float(),))  # type: ignore[index]
    model[2].register_forward_hook(lambda module, args, out: out.to(torch.bfloat16))  # type: ignore[index]
    optimizer = torch.optim.AdamW(model.parameters())
    with seen_by(optimizer, model) as seen:
        wide_step(model, optimizer, 16)(samples_of())
    assert {gradient.dtype for gradient in seen[0].values() if gradient is not None} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("breaks", [False, True], ids=["applied", "discarded"])
def test_the_model_is_left_as_it_was(breaks: bool) -> None:
    model = make_half()
    step = wide_step(model, torch.optim.SGD(model.parameters()), 16)
    x, y = samples_of()
    with pytest.raises(IndexError, match="out of bounds") if breaks else nullcontext():
        step((x, y + CLASSES) if breaks else (x, y))
    assert_follows_the_parameter(model)


def assert_follows_the_parameter(model: nn.Module) -> None:
    """Gradients have the parameter's dtype, also after it has been converted."""
    for dtype in (torch.bfloat16, torch.float32):
        model.zero_grad()
        model.to(dtype)
        loss_fn(model, samples_of(dtype)).backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    model.zero_grad()
    model.bfloat16()


def test_parameters_in_fp32_are_as_without() -> None:
    model, other = make_half(torch.float32), make_half(torch.float32)
    wide_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 16)(samples_of(torch.float32))
    step = ga.TrainStep(other, torch.optim.SGD(other.parameters(), lr=0.1), loss_fn, micro_batch_size=16)
    step(samples_of(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float32"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    model = make_half()
    with pytest.raises(ParameterError, match=r"torch\.float32.*2% of the gradient"):
        ga.Accumulator(model, torch.optim.SGD(model.parameters()), micro_batches=2, accumulate_dtype=dtype)
