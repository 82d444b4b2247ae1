"""Gradients that add up in SGD's momentum: the whole batch's updates, with no memory for gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.errors import MisuseError
from gradaccum.memory.live_bytes import LiveBytes
from oracle import EXACT, RAGGED, ROWS, assert_same_gradients, doubled, parameters_of, whole_batches
from tasks import pieces

FEATURES, WORDS = 6, 7
Batch = dict[str, Tensor]


class Net(nn.Module):
    """Tied, used twice, unused, frozen, sometimes used, and an embedding: whatever a parameter can be."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, FEATURES)
        self.first = nn.Linear(FEATURES, FEATURES)
        self.last = nn.Linear(FEATURES, WORDS, bias=False)
        self.last.weight = self.table.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.sometimes = nn.Linear(FEATURES, FEATURES)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.first(torch.tanh(self.first(self.table(batch["ids"]))))
        if bool(batch["uses"].any()):
            hidden = hidden + self.sometimes(hidden) * batch["uses"].unsqueeze(1)
        return self.last(self.frozen(hidden).relu())


def make() -> nn.Module:
    torch.manual_seed(3)
    return doubled(Net())


def batches(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    made: list[Batch] = []
    for index in range(count):
        uses = torch.zeros(ROWS, dtype=torch.float64)
        uses[5] = 0.0 if index == 1 else 1.0  # in one window not at all, otherwise in one micro-batch
        made.append(
            {
                "ids": torch.randint(WORDS, (ROWS,), generator=generator),
                "y": torch.randint(WORDS, (ROWS,), generator=generator),
                "uses": uses,
            }
        )
    return made


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch), batch["y"])


def rows(batch: Batch) -> int:
    return len(batch["y"])


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options
    if isinstance(options["lr"], Tensor):
        options["lr"] = options["lr"].clone()  # schedulers write there
    named = list(model.named_parameters())
    groups = [
        {"params": [parameter for name, parameter in named if "first" in name], "lr": 0.05, "weight_decay": 0.1},
        {"params": [parameter for name, parameter in named if "first" not in name]},
    ]
    return torch.optim.SGD(groups, **options)


def momentum_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | None]:
    return {
        name: optimizer.state.get(parameter, {}).get("momentum_buffer") for name, parameter in model.named_parameters()
    }


def by_train_step(model: nn.Module, optimizer: Any, whole: list[Batch], **options: Any) -> list[ga.Update]:
    train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, accumulate_into="momentum", **options)
    return [train_step(batch) for batch in whole]


def by_own_loop(model: nn.Module, optimizer: Any, whole: list[Batch], **options: Any) -> list[ga.Update]:
    accumulator = ga.Accumulator(
        model, optimizer, micro_batches=len(RAGGED), weights=rows, accumulate_into="momentum", **options
    )
    micro_batches = [piece for batch in whole for piece in pieces(batch, RAGGED)]
    made = [accumulator.backward(loss_fn(model, batch)) for batch in accumulator.over(micro_batches)]
    return [update for update in made if update]


def assert_as_whole_batches(model: nn.Module, optimizer: Any, expected: nn.Module, right: Any) -> None:
    assert_same_gradients(parameters_of(model), parameters_of(expected), where="parameter ")
    assert_same_gradients(momentum_of(model, optimizer), momentum_of(expected, right), where="momentum of ")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [
        group["weight_decay"] for group in right.param_groups
    ]
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


WAYS: dict[str, Callable[..., list[ga.Update]]] = {"own loop": by_own_loop, "whole batch in hand": by_train_step}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "lr as a tensor": {"lr": torch.tensor(0.1, dtype=torch.float64), "foreach": False},
    "no weight decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize("fused", [True, False, "auto"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_updates_and_momentum_are_the_whole_batch_s(way: str, implementation: str, fused: Any) -> None:
    options = IMPLEMENTATIONS[implementation]
    model, expected = make(), make()
    optimizer, right = sgd(model, **options), sgd(expected, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.8) for one in (optimizer, right)]
    whole = batches()
    made = whole_batches(expected, right, whole, loss_fn, scheduler=schedulers[1])
    updates = WAYS[way](model, optimizer, whole, fused=fused, scheduler=schedulers[0])
    assert [update.skipped for update in updates] == [False] * len(whole)
    for update, one in zip(updates, made, strict=True):
        assert update.loss.item() == pytest.approx(one.loss, rel=EXACT)
    assert_as_whole_batches(model, optimizer, expected, right)
    assert momentum_of(model, optimizer)["unused.weight"] is None


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_and_unfrozen_while_training(fused: bool) -> None:
    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    whole = batches()
    train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=5, fused=fused, accumulate_into="momentum")
    for index, batch in enumerate(whole):
        for one in (model, expected):
            one.get_submodule("frozen").requires_grad_(index in (1, 3))
            one.get_submodule("first").requires_grad_(index != 2)
        whole_batches(expected, right, [batch], loss_fn)
        train_step(batch)
    assert_as_whole_batches(model, optimizer, expected, right)


def test_cycled_momentum_and_step_hooks() -> None:
    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    whole = batches()
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.1, total_steps=10, cycle_momentum=True)
        for one in (optimizer, right)
    ]
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    whole_batches(expected, right, whole, loss_fn, scheduler=schedulers[1])
    by_train_step(model, optimizer, whole, scheduler=schedulers[0])
    assert len(steps) == len(whole)
    assert_same_gradients(parameters_of(model), parameters_of(expected))
    assert optimizer.param_groups[0]["momentum"] == right.param_groups[0]["momentum"] != 0.9


def test_a_mean_over_tokens_with_weights() -> None:
    def tokens(batch: Batch) -> float:
        return float((batch["y"] > 2).sum())

    def over_tokens(model: nn.Module, batch: Batch) -> Tensor:
        counted = batch["y"] > 2
        return F.cross_entropy(model(batch)[counted], batch["y"][counted])

    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    train_step = ga.TrainStep(
        model, optimizer, over_tokens, micro_batch_size=4, weights=tokens, accumulate_into="momentum"
    )
    for batch in batches():
        whole_batches(expected, right, [batch], over_tokens)
        train_step(batch)
    assert_as_whole_batches(model, optimizer, expected, right)


def test_outputs_over_the_whole_batch() -> None:
    def batch_loss(outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs @ outputs.T).logsumexp(1).mean()

    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    train_step = ga.TrainStep(
        model,
        optimizer,
        forward=lambda model, batch: model(batch),
        batch_loss=batch_loss,
        micro_batch_size=4,
        kept_graphs=0,
        accumulate_into="momentum",
    )
    for batch in batches():
        whole_batches(expected, right, [batch], lambda model, batch: batch_loss(model(batch), batch))
        train_step(batch)
    assert_as_whole_batches(model, optimizer, expected, right)


def test_losses_that_weigh_their_rows() -> None:
    def loss_of(model: nn.Module, batch: Batch) -> Any:
        return {"a": ga.Loss.mean(loss_fn(model, batch), over=len(batch["y"])), "b": loss_fn(model, batch)}

    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    train_step = ga.TrainStep(model, optimizer, loss_of, micro_batch_size=4, accumulate_into="momentum")
    for batch in batches():
        whole_batches(expected, right, [batch], lambda model, batch: 2 * loss_fn(model, batch))
        train_step(batch)
    assert_as_whole_batches(model, optimizer, expected, right)


def test_a_batch_that_weighs_nothing_leaves_momentum_alone() -> None:
    def counted(batch: Batch) -> float:
        return float((batch["uses"] >= 0).sum())

    def over_counted(model: nn.Module, batch: Batch) -> ga.Loss:
        losses = F.cross_entropy(model(batch), batch["y"], reduction="none")
        return ga.Loss.sum((losses * (batch["uses"] >= 0)).sum(), over=counted(batch))

    model, expected = make(), make()
    optimizer, right = sgd(model), sgd(expected)
    train_step = ga.TrainStep(
        model, optimizer, over_counted, micro_batch_size=4, weights=counted, accumulate_into="momentum"
    )
    first, nothing = batches(2)
    nothing["uses"] -= 1
    train_step(first)
    assert train_step(nothing).skipped
    whole_batches(expected, right, [first], loss_fn)
    assert_as_whole_batches(model, optimizer, expected, right)


def test_the_gradient_alone_stays_a_gradient() -> None:
    model = make()
    optimizer = sgd(model)
    train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, accumulate_into="momentum")
    one, other = batches(2)
    train_step(one)
    before = {name: None if b is None else b.clone() for name, b in momentum_of(model, optimizer).items()}
    train_step.backward(other)
    assert_same_gradients(momentum_of(model, optimizer), before)
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss_fn(model, other).backward()
    assert_same_gradients(gradient, {name: parameter.grad for name, parameter in model.named_parameters()})
    model.zero_grad()
    first = model.get_submodule("first").weight
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(first.grad is optimizer.state[first]["momentum_buffer"]))
    train_step(one)
    assert seen == [True], "the next update is made in the momentum again"


# -------------------------------------------------------------------------------------------------- what costs momentum


def test_a_gradient_that_is_not_finite_resets_what_it_touched(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    spoils = [False]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        loss = loss_fn(model, batch)
        return loss + (model.get_submodule("sometimes").weight.sum() * float("nan") if spoils[0] else 0)

    train_step = ga.TrainStep(
        model, optimizer, loss_of, micro_batch_size=4, scheduler=scheduler, accumulate_into="momentum"
    )
    one, other, third = batches(3)
    train_step(one)
    before, rates = parameters_of(model), scheduler.get_last_lr()
    spoils[0] = True
    with caplog.at_level(logging.WARNING, "gradaccum"):
        update = train_step(other)
    assert update.skipped is True
    assert update.index == 2
    assert scheduler.get_last_lr() == rates
    assert_same_gradients(parameters_of(model), before)
    momentum = momentum_of(model, optimizer)
    assert momentum["sometimes.weight"] is None
    assert momentum["first.weight"] is not None
    assert all(buffer is None or bool(buffer.isfinite().all()) for buffer in momentum.values())
    assert "the momentum of 1 of" in caplog.text
    spoils[0] = False
    assert not train_step(third).skipped
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_a_discarded_window_resets_what_it_touched(fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    optimizer = sgd(model)
    calls = [0]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("broken")
        return loss_fn(model, batch)

    train_step = ga.TrainStep(model, optimizer, loss_of, micro_batch_size=4, fused=fused, accumulate_into="momentum")
    one, other, _ = batches(3)
    train_step(one)
    with caplog.at_level(logging.WARNING, "gradaccum"), pytest.raises(RuntimeError, match="broken"):
        train_step(other)
    momentum = momentum_of(model, optimizer)
    assert momentum["first.weight"] is None
    assert momentum["sometimes.weight"] is not None, "nothing was added to it"
    assert "the momentum of 3 of" in caplog.text  # table, and weight and bias of first
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_a_step_that_raises_restores_the_options() -> None:
    model = make()
    optimizer = sgd(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("in the step")

    handle = optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the step"):
        by_train_step(model, optimizer, batches(1))
    handle.remove()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert not optimizer.state


def test_clearing_by_hand_inside_a_window_is_seen() -> None:
    model = make()
    accumulator = ga.Accumulator(
        model, sgd(model), micro_batches=4, weights=rows, fused=False, accumulate_into="momentum"
    )
    micro_batches = iter(accumulator.over(pieces(batches(1)[0], RAGGED)))
    accumulator.backward(loss_fn(model, next(micro_batches)))
    model.get_submodule("first").zero_grad()
    model.get_submodule("table").zero_grad()
    loss = loss_fn(model, next(micro_batches))
    with pytest.raises(MisuseError, match="was cleared between two micro-batches"):
        accumulator.backward(loss)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradients_alive_are_one_layer_s(fused: bool) -> None:
    layers, width = 12, 64
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, width)
    peaks: dict[str, int] = {}
    for into in ("momentum", "grad"):
        train_step = ga.TrainStep(
            model,
            optimizer,
            lambda model, x: model(x).square().mean(),
            micro_batch_size=2,
            fused=fused,
            accumulate_into=into,  # type: ignore[arg-type]
        )
        train_step(x)  # the buffers are there
        with LiveBytes() as memory:
            train_step(x)
        peaks[into] = memory.peak
    one_layer = 4 * width * width
    activations = 4 * 4 * width * (layers + 2)
    if fused:  # the products are made where they add up
        assert peaks["momentum"] <= activations
    else:
        assert peaks["grad"] >= layers * one_layer
        assert one_layer <= peaks["momentum"] <= 2 * one_layer + activations
