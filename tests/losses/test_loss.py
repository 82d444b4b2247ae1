"""A loss is the pair (total, weight), whichever of the two ways it was made."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

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


def mean_of(value: float, over: Any = 4) -> ga.Loss:
    return ga.Loss.mean(torch.tensor(value, dtype=torch.float64, requires_grad=True) * 1, over=over)


def sum_of(value: float, over: Any = 4) -> ga.Loss:
    return ga.Loss.sum(torch.tensor(value, dtype=torch.float64, requires_grad=True) * 1, over=over)


def test_a_loss_is_logged_as_its_mean() -> None:
    for loss in (mean_of(2.5), sum_of(10.0)):
        assert loss.item() == float(loss) == 2.5
        assert f"{loss:.3f}" == "2.500"
        assert f"{loss}" == repr(loss) == "Loss(2.5, over=4)"
        assert loss.detach() == 2.5
        assert not loss.detach().requires_grad
    assert repr(ga.Loss.sum(torch.tensor(2.0))) == "Loss(2, a sum)"


@pytest.mark.parametrize(
    ("made", "value"),
    [
        (lambda a, b: 0.5 * a, 1.0),
        (lambda a, b: a * torch.tensor(3.0), 6.0),
        (lambda a, b: a / 4, 0.5),
        (lambda a, b: -a, -2.0),
        (lambda a, b: a + 0.1 * b, 2.5),
        (lambda a, b: a - b, -3.0),
        (lambda a, b: sum([a, b]), 7.0),
    ],
)
@pytest.mark.parametrize("first", [mean_of, lambda value: sum_of(4 * value)])
@pytest.mark.parametrize("second", [mean_of, lambda value: sum_of(4 * value, over=torch.tensor(4))])
def test_arithmetic_keeps_the_weight(made: Any, value: float, first: Any, second: Any) -> None:
    loss = made(first(2.0), second(5.0))
    assert (loss.item(), loss.weight) == (value, 4)
    assert loss.total.item() == 4 * value
    assert loss.root.requires_grad


def test_sums_without_a_divisor_add_up() -> None:
    loss = sum_of(2.0, over=None) + sum_of(3.0, over=None)
    assert (loss.item(), loss.weight, loss.is_mean) == (5.0, None, False)


@pytest.mark.parametrize("other", [mean_of(1.0, over=3), sum_of(1.0, over=None), mean_of(1.0, over=torch.tensor(5))])
def test_losses_over_different_things_do_not_add_up(other: ga.Loss) -> None:
    for one, two in ((mean_of(1.0), other), (other, mean_of(1.0))):
        with pytest.raises(ga.LossError, match=r'over different things.*by name: \{"first": loss.*pass weights='):
            one + two


def test_what_is_no_loss_does_not_add_up() -> None:
    with pytest.raises(ga.LossError, match=r"a Tensor do not add up.*loss \+ ga.Loss.mean\(other, over=n\)"):
        mean_of(1.0) + torch.tensor(1.0)
    with pytest.raises(TypeError, match="unsupported operand"):
        mean_of(1.0) * mean_of(1.0)


def test_a_loss_does_not_run_its_own_backward() -> None:
    with pytest.raises(ga.MisuseError, match=r"accumulator.backward\(loss\).*loss.value.backward\(\)"):
        mean_of(1.0).backward()


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


def test_a_sum_of_criteria_is_the_whole_batch_s() -> None:
    """A head and an auxiliary head over the same labels, some of them ignored; an odd number of rows."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    x, labels = torch.randn(9, 5, 4, dtype=torch.float64), torch.randint(3, (9, 5))
    labels[torch.rand(9, 5) < 0.5] = -100

    def loss(criterion: Any, batch: Any) -> Any:
        head, auxiliary = (criterion(layer(batch[0]).transpose(1, 2), batch[1]) for layer in model)
        return head + 0.4 * auxiliary

    loss(F.cross_entropy, (x, labels)).backward()
    whole = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    criterion = ga.criterion(nn.CrossEntropyLoss())
    train_step = ga.TrainStep(
        model, torch.optim.SGD(model.parameters()), lambda _, b: loss(criterion, b), micro_batch_size=2
    )
    train_step.backward((x, labels))
    made = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(made, whole, rtol=1e-12, atol=1e-12)


def test_torch_finds_the_tensor_of_a_loss_that_a_model_returns() -> None:
    loss = ga.Loss.mean(torch.ones(()), over=3)
    leaves, structure = tree_flatten({"loss": loss})
    assert leaves == [loss.root]
    again = tree_unflatten([2 * leaf for leaf in leaves], structure)["loss"]
    assert (again.item(), again.weight, again.is_mean) == (2, 3, True)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_a_count_that_its_dtype_cannot_hold_is_an_error(dtype: torch.dtype, exact: int) -> None:
    for count in (0, 1, exact - 1, exact):
        assert ga.Loss.sum(LOSSES.sum(), over=torch.ones(count, dtype=dtype).sum()).weight == count
    with pytest.raises(ga.LossError, match=rf"holds whole numbers only up to {exact}:.*mask.sum\(dtype"):
        ga.Loss.mean(LOSSES.mean(), over=torch.ones(exact + 1, dtype=torch.long).sum().to(dtype) * 2)
    mask = torch.ones(exact + 1, dtype=dtype)
    assert ga.Loss.sum(LOSSES.sum(), over=mask.sum(dtype=torch.long)).weight == exact + 1, (
        "what the error says to write"
    )
    assert ga.Loss.sum(LOSSES.sum(), over=mask.float().sum()).weight == exact + 1
