"""Gradients in memory that stays: right with backwards that write their result over the last one, as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

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
    whole_batches,
)
from tasks import MODELS, Batch, make_batch, make_model, pieces

EVERY_WAY = pytest.mark.parametrize("way", WAYS)
BATCHES = [make_batch(ROWS, seed=seed) for seed in (1, 2, 3)]


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["y"])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


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


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


def by_torch(alias: str) -> dict[str, Tensor | None]:
    model = graphed(alias)
    for piece in inputs()[0].split(4):
        (squares(model, piece) * len(piece) / ROWS).backward()
    return gradients_of(model)


def whole_gradient() -> dict[str, Tensor | None]:
    model = graphed()
    squares(model, inputs()[0]).backward()
    return gradients_of(model)


@pytest.mark.parametrize("alias", ALIASES)
def test_torch_itself_is_wrong(alias: str) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(by_torch(alias), whole_gradient())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("alias", ALIASES)
def test_replayed_backwards_add_up(alias: str, persistent: bool, fused: bool) -> None:
    model, expected = graphed(alias), graphed()
    optimizer, right = sgd(model), sgd(expected)
    train_step = ga.TrainStep(
        model, optimizer, squares, micro_batch_size=4, fused=fused, persistent_gradients=persistent
    )
    for x in inputs():
        train_step(x)
    whole_batches(expected, right, inputs(), squares)
    if persistent:
        assert_same_gradients(parameters_of(model), parameters_of(expected))
    else:
        with pytest.raises(AssertionError, match="is off by"):
            assert_same_gradients(parameters_of(model), parameters_of(expected))


@pytest.mark.parametrize("alias", ALIASES)
def test_so_do_those_of_a_loop_and_of_the_gradient_alone(alias: str) -> None:
    model, expected = graphed(alias), graphed()
    optimizer, right = sgd(model), sgd(expected)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=len(RAGGED), persistent_gradients=True)
    for piece in accumulator.over([piece for x in inputs() for piece in x.split(RAGGED)]):
        accumulator.backward(squares(model, piece))
    whole_batches(expected, right, inputs(), squares)
    assert_same_gradients(parameters_of(model), parameters_of(expected))
    train_step = ga.TrainStep(model, optimizer, squares, micro_batch_size=4, persistent_gradients=True)
    train_step.backward(inputs()[0])
    squares(expected, inputs()[0]).backward()
    assert_same_gradients(gradients_of(model), gradients_of(expected))


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
@EVERY_WAY
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
        return ga.Loss.mean(mse(model, batch), over=weight_of[len(batch["x"])])

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
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(Sometimes().double())
    model, expected = models
    optimizer, right = sgd(model), sgd(expected)
    whole = [x.abs() if index == 1 else -x.abs() for index, x in enumerate(inputs())]
    train_step = ga.TrainStep(model, optimizer, squares, micro_batch_size=4, fused=fused, persistent_gradients=True)
    found: list[dict[str, Tensor | None]] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(gradients_of(model)))
    for x in whole:
        train_step(x)
    made = whole_batches(expected, right, whole, squares)
    for one, other in zip(found, made, strict=True):
        assert_same_gradients(one, other.gradients)
    assert found[1]["sometimes.weight"] is None
    assert_same_gradients(parameters_of(model), parameters_of(expected))


def test_fp16_scaling_and_a_gradient_that_is_not_finite() -> None:
    model, expected = make_model("mlp"), make_model("mlp")
    optimizer = sgd(model)
    spoiled = {name: value.clone() for name, value in BATCHES[1].items()}
    spoiled["x"][0] = float("inf")
    scaler = GradScaler("cpu", init_scale=2.0**8)
    train_step = ga.TrainStep(model, optimizer, mse, micro_batch_size=4, scaler=scaler, persistent_gradients=True)
    updates = [train_step(batch) for batch in (BATCHES[0], spoiled, BATCHES[2])]
    assert [bool(update.skipped) for update in updates] == [False, True, False]
    whole_batches(expected, sgd(expected), [BATCHES[0], BATCHES[2]], mse)
    assert_same_gradients(parameters_of(model), parameters_of(expected))


def test_bf16_is_added_up_in_fp32() -> None:
    model = nn.Linear(6, 6, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 6)
    seen: dict[bool, Tensor] = {}
    start = parameters_of(model)

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.bfloat16()).float().square().mean()

    for persistent in (True, False):
        model.load_state_dict(start)
        train_step = ga.TrainStep(
            model,
            optimizer,
            loss_of,
            micro_batch_size=1,
            accumulate_dtype=torch.float32,
            persistent_gradients=persistent,
        )
        train_step.backward(x)
        assert model.weight.grad is not None
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
    train_step = ga.TrainStep(model, optimizer, mse, micro_batch_size=4, persistent_gradients=True)
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
    train_step = ga.TrainStep(
        model,
        optimizer,
        lambda model, batch: F.mse_loss(
            model({"x": batch["x"].to(next(model.parameters()).dtype)}).double(), batch["y"]
        ),
        micro_batch_size=4,
        persistent_gradients=True,
    )
    train_step(BATCHES[0])
    model.double()
    expected = make_model("mlp")
    expected.load_state_dict(model.state_dict())
    train_step(BATCHES[1])
    whole_batches(expected, torch.optim.SGD(expected.parameters(), lr=0.1), [BATCHES[1]], mse)
    assert_same_gradients(parameters_of(model), parameters_of(expected), tolerance=EXACT)


def test_after_a_discarded_window() -> None:
    model, expected = make_model("mlp"), make_model("mlp")
    optimizer = sgd(model)
    calls = [0]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("broken")
        return mse(model, batch)

    train_step = ga.TrainStep(model, optimizer, loss_of, micro_batch_size=4, persistent_gradients=True)
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
        ga.TrainStep(
            model, torch.optim.SparseAdam(model.parameters()), squares, micro_batch_size=4, persistent_gradients=True
        )


def test_several_processes() -> None:
    with pytest.raises(UnsupportedError, match="persistent_gradients=True with several processes"):
        check_persistent([], has_ranks=True)
