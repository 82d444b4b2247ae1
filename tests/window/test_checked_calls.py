"""Checks that run before each call of a method of one object."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import gradaccum as ga
from gradaccum.window.guards import checked_before


class Counting:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self) -> int:
        self.calls += 1
        return self.calls


def noting(log: list[str], what: str) -> Callable[[], None]:
    return lambda: log.append(what)


def test_the_check_runs_before_the_call_which_returns_as_always() -> None:
    log: list[str] = []
    one = Counting()
    with checked_before(one, "step", lambda: log.append(f"after {one.calls} calls")):
        assert [one.step(), one.step()] == [1, 2]
    assert one.step() == 3
    assert log == ["after 0 calls", "after 1 calls"]


def test_several_checks_of_one_object_run_in_turn_and_end_in_any_order() -> None:
    log: list[str] = []
    one = Counting()
    first, second = (
        checked_before(one, "step", noting(log, "first")),
        checked_before(one, "step", noting(log, "second")),
    )
    first.__enter__(), second.__enter__()
    one.step()
    first.__exit__(None, None, None)
    one.step()
    second.__exit__(None, None, None)
    one.step()
    assert log == ["first", "second", "second"]
    assert type(one) is Counting


def test_an_object_is_of_the_same_class_each_time_it_is_watched() -> None:
    """Python finds attributes of a class it knows in half the time."""
    one, seen = Counting(), []
    for _ in range(2):
        with checked_before(one, "step", lambda: None):
            seen.append(type(one))
    assert seen[0] is seen[1]
    assert seen[0] is not Counting


def test_each_object_has_its_own_check_and_a_subclass_its_own_method() -> None:
    class Other(Counting):
        def step(self) -> int:
            return -super().step()

    log: list[str] = []
    first, second, third = Counting(), Other(), Counting()
    with checked_before(first, "step", noting(log, "first")), checked_before(second, "step", noting(log, "second")):
        assert [one.step() for one in (second, first, third)] == [-1, 1, 1]
    assert log == ["second", "first"]
    assert (type(first), type(second)) == (Counting, Other)


def test_a_method_that_is_patched_between_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Counting()
    with checked_before(one, "step", lambda: None):
        assert one.step() == 1
    monkeypatch.setattr(Counting, "step", lambda self: "patched")
    with checked_before(one, "step", lambda: None):
        assert one.step() == "patched"


def test_two_methods_of_one_object() -> None:
    log: list[str] = []
    optimizer = SGD(nn.Linear(1, 1).parameters())
    zero, step = (checked_before(optimizer, name, noting(log, name)) for name in ("zero_grad", "step"))
    with zero, step:
        optimizer.step(), optimizer.zero_grad()
    optimizer.step(), optimizer.zero_grad()
    assert log == ["step", "zero_grad"]
    assert type(optimizer) is SGD


@pytest.mark.parametrize("leaves", [False, True], ids=["", "by break"])
def test_after_a_pass_everything_is_freed_with_its_last_reference(leaves: bool) -> None:
    """A model of several gigabytes must not stay until the garbage collector comes by."""

    def train() -> list[weakref.ref[Any]]:
        model = nn.Linear(3, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        accumulator = ga.Accumulator(model, optimizer, micro_batches=1)
        for x in accumulator.over([torch.ones(5, 3)] * 3):
            accumulator.backward(F.mse_loss(model(x), torch.zeros(5, 1)))
            if leaves:
                break
        return [weakref.ref(one) for one in (accumulator, optimizer, model)]

    train()  # torch imports modules in the first step, and an import keeps frames
    gc.collect()
    gc.disable()
    try:
        assert [one() is None for one in train()] == [True, True, True]
    finally:
        gc.enable()
