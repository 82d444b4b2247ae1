"""What functions and their objects keep is as it was after a look, or nothing is looked at."""

import collections
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradaccum as ga

Case = tuple[Any, Callable[[], Any]]
ROWS, FEATURES = 8, 4
updates = 0


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def a_global() -> Case:
    global updates
    updates = 0

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        global updates
        updates += 1
        return squares(model, x)

    return loss_fn, lambda: updates


def a_variable_bound_anew() -> Case:
    centre = torch.zeros(2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal centre
        centre = centre + 1
        return squares(model, x)

    return loss_fn, lambda: centre.tolist()


def containers() -> Case:
    last: collections.deque[int] = collections.deque(maxlen=3)
    counts, by_name, sizes = collections.Counter[str](), collections.defaultdict[str, int](int), np.zeros(2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        last.append(len(last))
        counts["calls"] += 1
        by_name["calls"] += 1
        sizes[0] += len(x)
        return squares(model, x)

    return loss_fn, lambda: (list(last), dict(counts), dict(by_name), sizes.tolist())


def generators() -> Case:
    old, new, own = np.random.RandomState(3), np.random.default_rng(5), random.Random(7)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        old.rand(), new.random(), own.random()
        return squares(model, x)

    return loss_fn, lambda: (old.rand(), new.random(), own.random())


class Slots:
    __slots__ = ("calls", "log")

    def __init__(self) -> None:
        self.calls, self.log = 0, [0]

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        return squares(model, x)


def slots() -> Case:
    loss = Slots()
    return loss, lambda: (loss.calls, loss.log)


class Inner:
    def __init__(self) -> None:
        self.calls = 0
        self.numbers = itertools.count()


class Trainer:
    """A loss that is a method, of an object that holds another one, and counts for its whole class."""

    calls = 0

    def __init__(self) -> None:
        self.inner = Inner()
        self.batches = iter(torch.randn(40, 2, FEATURES).unbind())  # of the training loop
        self.unlabelled = (batch for batch in torch.randn(40, 2, FEATURES).unbind())

    def train(self) -> Tensor:
        return next(self.unlabelled)

    def more(self) -> Tensor:
        return next(self.unlabelled)

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        Trainer.calls += 1
        self.inner.calls += 1
        next(self.inner.numbers)
        return squares(model, x)

    def semi_supervised(self, model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, x) + squares(model, self.more())


def a_trainer() -> Case:
    Trainer.calls = 0
    trainer = Trainer()
    return trainer.loss, lambda: (Trainer.calls, trainer.inner.calls, next(trainer.inner.numbers))


class Numbers:
    def __init__(self) -> None:
        self.last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last


def an_iterator_of_ones_own() -> Case:
    numbers = Numbers()
    return lambda model, x: squares(model, x) + 0 * next(numbers), lambda: numbers.last


def a_hook_on_all_modules() -> Case:
    calls = [0]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def state() -> int:
        handle.remove()
        return calls[0]

    return squares, state


KEPT: dict[str, Callable[[], Case]] = {
    "a global": a_global,
    "a variable that is bound anew": a_variable_bound_anew,
    "containers": containers,
    "generators": generators,
    "slots": slots,
    "a trainer": a_trainer,
    "an iterator of one's own": an_iterator_of_ones_own,
    "a hook on all modules": a_hook_on_all_modules,
}


def after_an_update(make: Callable[[], Case], check: str) -> tuple[Any, str]:
    torch.manual_seed(0)
    loss_fn, state = make()
    model = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, check=check)
    step(torch.randn(ROWS, FEATURES))
    return (state(), model.weight.tolist()), step._accumulation.plan_line.evidence


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_as_without_a_look(name: str) -> None:
    (found, evidence), (expected, _) = (after_an_update(KEPT[name], check) for check in ("first", "off"))
    assert found == expected
    assert evidence == "exact (checked on 3 + 1 samples)"


def an_iterator(of: Iterator[Any]) -> Case:
    return lambda model, x: squares(model, x) + squares(model, next(of)[None]), lambda: next(of).tolist()


def from_a_method() -> Case:
    trainer = Trainer()
    return trainer.semi_supervised, lambda: next(trainer.unlabelled).tolist()


def from_an_object() -> Case:
    trainer = Trainer()
    return lambda model, x: squares(model, x) + squares(model, trainer.more()), lambda: next(
        trainer.unlabelled
    ).tolist()


DRAWN: dict[str, tuple[str, Callable[[], Case]]] = {
    "a generator": ("of", lambda: an_iterator(row for row in torch.randn(40, FEATURES))),
    "a loader": ("of", lambda: an_iterator(iter(DataLoader(torch.randn(40, FEATURES), batch_size=None)))),
    "a cycle": ("of", lambda: an_iterator(itertools.cycle(torch.randn(3, FEATURES).unbind()))),
    "an attribute": ("unlabelled", from_a_method),
    "an object's": ("unlabelled", from_an_object),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_no_item_is_taken_from_what_cannot_be_put_back(name: str) -> None:
    holder, make = DRAWN[name]
    (found, evidence), (expected, _) = (after_an_update(make, check) for check in ("first", "off"))
    assert found == expected
    assert evidence == f"not checked: the loss takes items from {holder}, an iterator that cannot be put back"
