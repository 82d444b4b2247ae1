"""``TrainStep.backward``: the gradient alone, for closures, for two gradients an update, for looking at it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from oracle import EXACT, SINGLE, assert_same_gradients, assert_same_number, gradients_of, parameters_of
from pairs import ROWS, Pair, X, Y, make_model, make_step, squares


@pytest.mark.parametrize("at", ["first", "last"])
def test_it_adds_to_what_is_there_as_torchs_own_does(at: str) -> None:
    def train(model: nn.Module, backward: Callable[[Pair], Any]) -> None:
        if at == "last":
            model(X[:5]).sum().backward()
        backward((X, Y))
        backward((X[:5], Y[:5]))
        if at == "first":
            model(X[:5]).sum().backward()

    own, _, train_step = make_step()
    whole = make_model()
    train(own, train_step.backward)
    train(whole, lambda batch: squares(whole, batch).backward())
    assert_same_gradients(gradients_of(own), gradients_of(whole))


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_it_adds_sparse_and_dense(first: str) -> None:
    def train(model: nn.Module, dense: Callable[[Tensor], Any]) -> None:
        words = torch.tensor([1, 3, 3])
        for kind in [first, "dense" if first == "sparse" else "sparse"]:
            model(words).sum().backward() if kind == "sparse" else dense(words)

    def loss_fn(model: nn.Module, words: Tensor) -> Tensor:
        return (model.weight**2).sum() + model(words).mean()

    own, whole = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)
    whole.load_state_dict(own.state_dict())
    train_step = ga.TrainStep(own, torch.optim.SGD(own.parameters(), lr=0.1), loss_fn, micro_batch_size=2)
    train(own, train_step.backward)
    train(whole, lambda words: loss_fn(whole, words).backward())
    assert_same_gradients(gradients_of(own), gradients_of(whole), tolerance=SINGLE)


def test_it_makes_no_update() -> None:
    model, optimizer, train_step = make_step(clip_norm=1e-3)
    before = parameters_of(model)
    loss = train_step.backward((X, Y))
    assert isinstance(loss, ga.Loss)
    assert loss.weight == ROWS
    assert not loss.value.requires_grad
    assert_same_number(loss.value.item(), squares(model, (X, Y)).item())
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert not optimizer.state
    assert train_step.state_dict() == {"updates": 0, "micro_batches": 0, "samples": 0, "version": 1}
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients_of(model).values()))
    assert norm > 0.01, "it is not clipped"


def test_several_terms_come_back_as_their_sum() -> None:
    def loss_fn(model: nn.Module, batch: Pair) -> dict[str, Any]:
        return {"fit": squares(model, batch), "size": ga.Loss.mean(model(batch[0]).mean(), over=2 * len(batch[0]))}

    def weights(batch: Pair) -> dict[str, int]:
        return {"fit": len(batch[0]), "size": 2 * len(batch[0])}

    model, _, train_step = make_step(loss_fn, weights=weights)
    loss = train_step.backward((X, Y))
    assert loss.weight is None
    assert_same_number(loss.value.item(), (squares(model, (X, Y)) + model(X).mean()).item())


def test_a_backward_that_fails_leaves_the_gradients_that_were_there() -> None:
    calls = iter(range(9))

    def loss_fn(model: nn.Module, batch: Pair) -> Tensor:
        if next(calls) == 2:
            raise RuntimeError("out of memory, say")
        return squares(model, batch)

    model, _, train_step = make_step(loss_fn, check="off")
    model(X).sum().backward()
    before = gradients_of(model)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        train_step.backward((X, Y))
    assert_same_gradients(gradients_of(model), before, tolerance=0.0)


def test_the_same_batch_gives_the_very_same_gradient_again() -> None:
    model, optimizer, train_step = make_step()
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        train_step.backward((X, Y))
        found.append(gradients_of(model))
    assert_same_gradients(found[0], found[1], tolerance=0.0)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    def train(model: nn.Module, backward: Callable[[], Any]) -> tuple[dict[str, Tensor], list[float]]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=line_search)
        losses: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses.append(backward().detach())
            return losses[-1]

        optimizer.step(closure)
        return parameters_of(model), [loss.item() for loss in losses]

    def whole_backward() -> Tensor:
        loss = squares(whole, (X, Y))
        loss.backward()
        return loss

    own, whole = make_model(), make_model()
    lbfgs = torch.optim.LBFGS(own.parameters())
    train_step = ga.TrainStep(own, lbfgs, squares, micro_batch_size=4)
    parameters, losses = train(own, lambda: train_step.backward((X, Y)).value)
    expected, expected_losses = train(whole, whole_backward)
    assert len(losses) == len(expected_losses)
    torch.testing.assert_close(losses, expected_losses, rtol=EXACT, atol=EXACT)
    assert_same_gradients(parameters, expected)
    with pytest.raises(ga.UnsupportedError, match=r"LBFGS evaluates the loss several times.*train_step\.backward"):
        train_step((X, Y))


def test_sharpness_aware_minimisation() -> None:
    """Two gradients an update: here, and a step of 0.05 up from here (Foret 2021)."""

    def train(model: nn.Module, backward: Callable[[], Any]) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            up = [0.05 * g / torch.cat([g.flatten() for g in gradients]).norm() for g in gradients]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), up)
            optimizer.zero_grad()
            backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), up)
            optimizer.step()
        return parameters_of(model)

    own, _, train_step = make_step()
    whole = make_model()
    made = train(own, lambda: train_step.backward((X, Y)))
    assert_same_gradients(made, train(whole, lambda: squares(whole, (X, Y)).backward()))
