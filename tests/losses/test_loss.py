"""A loss is the pair (total, weight), whichever of the two ways it was made."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradaccum as ga

LOSSES = torch.tensor([1.0, 2.0, 6.0])


@pytest.mark.parametrize("over", [3, 3.0, torch.tensor(3), torch.tensor(3.0), np.int64(3), Fraction(3)], ids=repr)
def test_a_mean_and_a_sum_of_the_same_losses_are_one(over: Any) -> None:
    mean, total = ga.Loss.mean(LOSSES.mean(), over=over), ga.Loss.sum(LOSSES.sum(), over=over)
    assert mean.value == total.value == 3
    assert mean.total == total.total == 9
    assert mean.weight == total.weight == 3
    assert mean.is_mean
    assert not total.is_mean


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
def test_value_times_weight_is_the_total(losses: list[float]) -> None:
    values = torch.tensor(losses, dtype=torch.float64)
    n = len(losses)
    for loss in (ga.Loss.mean(values.mean(), over=n), ga.Loss.sum(values.sum(), over=n)):
        assert loss.total.item() == pytest.approx(math.fsum(losses), abs=1e-9)
        assert loss.value.item() == pytest.approx(math.fsum(losses) / n, abs=1e-9)


def test_a_sum_without_over_stays_a_sum() -> None:
    loss = ga.Loss.sum(LOSSES.sum())
    assert loss.weight is None
    assert loss.value == loss.total == 9


@pytest.mark.parametrize("over", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_mean_over_nothing_totals_zero(over: Any) -> None:
    empty = torch.zeros(0)
    loss = ga.Loss.mean(empty.mean(), over=over)
    assert loss.total == 0, "not 0 x NaN"
    assert loss.value.isnan()
    assert ga.Loss.sum(empty.sum(), over=over).total == 0


def test_the_graph_is_kept_and_no_node_added() -> None:
    x = torch.ones(3, requires_grad=True)
    value = (x * 2).mean()
    loss = ga.Loss.mean(value, over=3)
    assert loss.root is value
    assert loss.value is value
    loss.total.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_a_count_that_has_a_graph_is_detached() -> None:
    count = torch.tensor(3.0, requires_grad=True) * 1
    weight = ga.Loss.sum(LOSSES.sum(), over=count).weight
    assert isinstance(weight, torch.Tensor)
    assert not weight.requires_grad


def test_frozen_and_compared_by_identity() -> None:
    loss = ga.Loss.sum(LOSSES.sum())
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.root = LOSSES.sum()  # type: ignore[misc]
    assert loss == loss
    assert loss != ga.Loss.sum(LOSSES.sum())


def test_repr_is_what_made_it() -> None:
    assert repr(ga.Loss.mean(torch.tensor(2.0), over=3)) == "Loss.mean(tensor(2.), over=3)"
    assert repr(ga.Loss.sum(torch.tensor(2.0))) == "Loss.sum(tensor(2.), over=None)"


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(half: torch.dtype) -> None:
    loss = ga.Loss.mean(LOSSES.to(half).mean(), over=3)
    assert loss.value.dtype == loss.total.dtype == half
    assert loss.total == 9


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("make", [ga.Loss.mean, ga.Loss.sum], ids=["mean", "sum"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(3.0, "needs a 0-d tensor and got float. A number has no graph.*before .item", id="number"),
        pytest.param(None, "needs a 0-d tensor and got NoneType", id="None"),
        pytest.param(LOSSES, r"needs a 0-d tensor and got one of shape \(3,\).*over=losses.numel", id="losses"),
        pytest.param(torch.ones(1), r"needs a 0-d tensor and got one of shape \(1,\)", id="one element is not 0-d"),
        pytest.param(torch.tensor(3), "needs a floating-point tensor and got torch.int64", id="int"),
        pytest.param(torch.tensor(1j), "needs a floating-point tensor and got torch.complex64", id="complex"),
        pytest.param(ga.Loss.sum(torch.tensor(1.0)), "needs a 0-d tensor and got Loss", id="a Loss already"),
    ],
)
def test_a_value_that_is_no_loss(make: Any, value: Any, message: str) -> None:
    with pytest.raises(ga.LossError, match=rf"ga.Loss.{make.__name__} {message}"):
        make(value, over=3)


@pytest.mark.parametrize("make", [ga.Loss.mean, ga.Loss.sum], ids=["mean", "sum"])
@pytest.mark.parametrize(
    ("over", "message"),
    [
        pytest.param(
            -1, "got -1 as the count; a mean is taken over a finite number of items, at least 0", id="negative"
        ),
        pytest.param(float("inf"), "got inf as the count", id="infinite"),
        pytest.param(float("nan"), "got nan as the count", id="NaN"),
        pytest.param(torch.tensor(-3), "got -3 as the count", id="negative tensor"),
        pytest.param(torch.tensor(float("nan")), "got nan as the count", id="NaN tensor"),
        pytest.param(True, "got bool as the count; it must be an int, a float or a 0-d tensor", id="bool"),
        pytest.param("3", "got str as the count", id="string"),
        pytest.param([1, 1], "got list as the count", id="list"),
        pytest.param(
            torch.ones(3), r"got a tensor of shape \(3,\) as the count.*Sum it first: over=mask.sum", id="mask"
        ),
    ],
)
def test_an_over_that_is_no_count(make: Any, over: Any, message: str) -> None:
    with pytest.raises(ga.LossError, match=rf"ga.Loss.{make.__name__} {message}"):
        make(torch.tensor(1.0), over=over)


def test_a_mean_must_say_over_what() -> None:
    with pytest.raises(ga.LossError, match="got NoneType as the count"):
        ga.Loss.mean(torch.tensor(1.0), over=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="over"):
        ga.Loss.mean(torch.tensor(1.0))  # type: ignore[call-arg]


def test_errors_are_value_errors_too() -> None:
    with pytest.raises(ValueError, match="0-d tensor"):
        ga.Loss.mean(1.0, over=1)  # type: ignore[arg-type]
