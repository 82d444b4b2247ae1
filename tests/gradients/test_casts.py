"""Under autocast each weight is cast once a window: same gradients, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from casting import (
    FEATURES,
    MICRO_BATCHES,
    ROWS,
    Casts,
    autocast,
    is_cache_empty,
    loss_fn,
    loss_without_cache,
    make,
    nesting,
)
from gradaccum.gradients.casts import KeptCasts
from oracle import parameters_of

LossFunction = Callable[[nn.Module, Tensor], Tensor]


@contextmanager
def not_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(KeptCasts, "hold", lambda self: None)
        yield


def by_own_loop(model: nn.Module, x: Tensor, loss: LossFunction, **options: Any) -> None:
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=MICRO_BATCHES, **options)
    for micro_batch in accumulator.over(x.chunk(MICRO_BATCHES)):
        accumulator.backward(loss(model, micro_batch))


def by_train_step(model: nn.Module, x: Tensor, loss: LossFunction, **options: Any) -> None:
    size = ROWS // MICRO_BATCHES
    ga.TrainStep(model, SGD(model.parameters(), lr=0.1), loss, micro_batch_size=size, **options)(x)


WAYS: dict[str, Callable[..., None]] = {"own loop": by_own_loop, "train step": by_train_step}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
EVERY_FUSED = pytest.mark.parametrize("fused", [False, True])


# -------------------------------------------------------------------------------------------------------- what it does


@EVERY_FUSED
@EVERY_WAY
def test_each_weight_is_cast_once_a_window(way: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(ROWS, FEATURES)
    model = make()
    weights = len(list(model.parameters()))
    with Casts(model) as casts:
        WAYS[way](model, x, loss_fn, fused=fused)
    assert casts.count == weights
    with not_held(monkeypatch), Casts(model) as casts:
        WAYS[way](model, x, loss_fn, fused=fused)
    assert casts.count == MICRO_BATCHES * weights


@EVERY_FUSED
@EVERY_WAY
def test_not_a_bit_of_the_update_changes(way: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(ROWS, FEATURES)
    kept, recast, uncached = make(), make(), make()
    WAYS[way](kept, x, loss_fn, fused=fused)
    WAYS[way](uncached, x, loss_without_cache, fused=fused)
    with not_held(monkeypatch):
        WAYS[way](recast, x, loss_fn, fused=fused)
    for name, parameter in parameters_of(kept).items():
        assert torch.equal(parameter, parameters_of(recast)[name])
        assert torch.equal(parameter, parameters_of(uncached)[name])


def test_turned_off_by_the_users_own_autocast() -> None:
    model = make()
    with Casts(model) as casts:
        by_own_loop(model, torch.randn(ROWS, FEATURES), loss_without_cache)
    assert casts.count == MICRO_BATCHES * len(list(model.parameters()))


def test_a_gradient_for_backward_alone() -> None:
    model, plain = make(), make()
    x = torch.randn(ROWS, FEATURES)
    train_step = ga.TrainStep(model, SGD(model.parameters()), loss_fn, micro_batch_size=4, fused=False)
    with Casts(model) as casts:
        train_step.backward(x)
    assert casts.count == len(list(model.parameters()))
    for micro_batch in x.chunk(MICRO_BATCHES):
        (loss_fn(plain, micro_batch) / MICRO_BATCHES).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7)  # fp32 sums in another order


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_forwards_without_a_graph_inside_a_window_leave_the_gradient_whole(without_grad: Any) -> None:
    """Torch before 2.11 took casts made without a graph for those of the forward with one, and lost the gradient."""
    x = torch.randn(ROWS, FEATURES)

    def looks_first(model: nn.Module, micro_batch: Tensor) -> Tensor:
        with without_grad(), autocast():
            model(micro_batch)
        return loss_fn(model, micro_batch)

    made, expected = make(), make()
    by_own_loop(made, x, looks_first)
    by_own_loop(expected, x, loss_without_cache)
    for name, parameter in parameters_of(made).items():
        assert torch.equal(parameter, parameters_of(expected)[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
@EVERY_WAY
def test_checkpoints(way: str, use_reentrant: bool) -> None:
    x = torch.randn(ROWS, FEATURES, requires_grad=True)

    def checkpointed(cache_enabled: bool) -> LossFunction:
        def loss(model: nn.Module, micro_batch: Tensor) -> Tensor:
            assert isinstance(model, nn.Sequential)
            with autocast(cache_enabled=cache_enabled):
                hidden: Any = checkpoint(model[:2], micro_batch, use_reentrant=use_reentrant)
                return model[2:](hidden).float().square().mean()

        return loss

    made, expected = make(), make()
    WAYS[way](made, x, checkpointed(True))
    WAYS[way](expected, x, checkpointed(False))
    for name, parameter in parameters_of(made).items():
        assert torch.equal(parameter, parameters_of(expected)[name])


def test_casts_that_were_kept_are_not_run_last_in_the_backward() -> None:
    """Else the gradients of all weights would wait side by side, in bf16, until the backward's end."""
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3), nn.Linear(4, 2))
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    accumulator = ga.Accumulator(model, SGD(model.parameters()), micro_batches=2, fused=True)
    orders: list[list[str]] = []

    def noted(gradient: Tensor) -> None:
        order.append("first layer's output")

    for x in accumulator.over([torch.randn(2, 1, 8)] * 2):
        with autocast():
            hidden = model[0](x)
            hidden.register_hook(noted)
            loss = model[2](model[1](hidden)).float().square().mean()
        order.clear()
        accumulator.backward(loss)
        orders.append([*order])
    assert orders[1].index("1.weight") < orders[1].index("first layer's output")
    assert orders[0].index("1.weight") < orders[0].index("first layer's output")


# ------------------------------------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("ending", ["end", "break", "error", "refused loss"])
def test_nothing_is_left_behind_by_a_pass(ending: str) -> None:
    model = make()
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=3)
    raised = ending in ("error", "refused loss")
    told = ending in ("break", "error")
    with (
        pytest.raises(Exception, match=r"mine|graph") if raised else nullcontext(),
        pytest.warns(ga.GradAccumWarning) if told else nullcontext(),
    ):
        for number, x in enumerate(accumulator.over(torch.randn(16, FEATURES).chunk(4))):
            assert nesting() == 1
            loss = loss_fn(model, x)
            accumulator.backward(loss.detach() if number == 1 and ending == "refused loss" else loss)
            if number == 1 and ending == "break":
                break
            if number == 1 and ending == "error":
                raise RuntimeError("mine")
    assert nesting() == 0
    assert is_cache_empty(model)


def test_nothing_is_left_behind_by_a_batch_that_fails() -> None:
    model = make()

    def fails(model: nn.Module, x: Tensor) -> Tensor:
        loss = loss_fn(model, x)
        if x.shape[0] == 3:
            raise RuntimeError("mine")
        return loss

    train_step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), fails, micro_batch_size=4)
    with pytest.raises(RuntimeError, match="mine"):
        train_step(torch.randn(7, FEATURES))
    assert nesting() == 0
    assert is_cache_empty(model)


def test_the_users_own_contexts_are_counted_beside_it() -> None:
    model = make()
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=2)
    with autocast():
        for x in accumulator.over([torch.randn(4, FEATURES)] * 2):
            assert nesting() == 2
            accumulator.backward(model(x).float().square().mean())
        assert nesting() == 1
        assert torch.is_autocast_enabled("cpu")


def test_given_up_in_another_thread_it_ends_with_its_own_threads_next_step() -> None:
    model = make()
    optimizer = SGD(model.parameters(), lr=0.5)
    casts = KeptCasts()
    casts.hold()
    loss_fn(model, torch.ones(1, FEATURES)).backward()
    elsewhere = threading.Thread(target=casts.release)
    elsewhere.start()
    elsewhere.join()
    assert nesting() == 1
    optimizer.step()
    assert nesting() == 0
    assert is_cache_empty(model)
    with autocast():
        loss = loss_fn(model, torch.ones(1, FEATURES))
        optimizer.step()
        assert torch.equal(loss, loss_fn(model, torch.ones(1, FEATURES))), "plain torch is as it was"
    assert nesting() == 0


def test_holding_and_releasing_twice_counts_once() -> None:
    casts = KeptCasts()
    casts.hold()
    casts.hold()
    assert nesting() == 1
    casts.release()
    casts.release()
    assert nesting() == 0


def test_what_is_held_by_nobody_any_more_is_released() -> None:
    casts = KeptCasts()
    casts.hold()
    del casts
    assert nesting() == 0


# --------------------------------------------------------------------------------------------------------- dtypes


def test_layers_refuse_two_low_dtypes_in_one_window() -> None:
    """Torch keeps one cast of a weight, whatever its dtype; never silently for a layer, and there is a way out."""
    model = make()
    x = torch.randn(4, FEATURES)
    casts = KeptCasts()
    casts.hold()
    try:
        loss_fn(model, x)
        with pytest.raises(RuntimeError, match="same dtype"), torch.autocast("cpu", torch.float16):
            model(x)
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            assert model(x).dtype == torch.float16
    finally:
        casts.release()


def test_two_models_may_have_a_low_dtype_each() -> None:
    first, second = make(), make()
    optimizer = SGD([*first.parameters(), *second.parameters()], lr=0.1)

    def loss(models: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            half = F.mse_loss(models[1](x).float(), torch.zeros(len(x), 2))
        return loss_fn(models[0], x) + half

    ga.TrainStep([first, second], optimizer, loss, micro_batch_size=2)(torch.randn(8, FEATURES))
