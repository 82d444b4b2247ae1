"""The judge must be able to say no."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gradaccum.cli.demo.comparison import (
    RUNS_PER_TASK,
    Comparison,
    compare,
    distances,
    float32_bound,
    largest_difference,
)
from gradaccum.cli.demo.regression import regression_task
from gradaccum.cli.demo.run import Run


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(regression_task(97, title="97 samples", text=""))


def off(run: Run, factor: float) -> Run:
    return replace(run, parameters=run.parameters * factor)


def test_the_library_is_exact_and_the_textbook_loop_is_not(comparison: Comparison) -> None:
    assert comparison.is_exact
    assert comparison.is_within_rounding(comparison.whole)
    assert not comparison.is_within_rounding(comparison.textbook)


def test_the_textbook_loop_is_right_where_everything_divides() -> None:
    comparison = compare(regression_task(80, title="80 samples", text=""))
    assert comparison.is_within_rounding(comparison.textbook)
    assert comparison.is_exact


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda c: replace(c, library=c.textbook), id="drifts in float32"),
        pytest.param(lambda c: replace(c, library_in_float64=c.library), id="right, but only to float32"),
        pytest.param(
            lambda c: replace(c, library_in_float64=off(c.library_in_float64, 1 + 1e-11)), id="off by 1e-11 in float64"
        ),
        pytest.param(lambda c: replace(c, library=off(c.library, 1 + 1e-4)), id="off by 1e-4 in float32"),
        pytest.param(lambda c: replace(c, library=off(c.library, torch.nan)), id="not a number"),
        pytest.param(
            lambda c: replace(
                c, library_in_float64=replace(c.library_in_float64, gradients=4 * c.library_in_float64.gradients)
            ),
            id="gradients four times as large",
        ),
    ],
)
def test_what_is_not_exact_is_found(comparison: Comparison, wrong: Callable[[Comparison], Comparison]) -> None:
    assert not wrong(comparison).is_exact


def test_one_wrong_update_is_enough(comparison: Comparison) -> None:
    parameters = comparison.library.parameters.clone()
    parameters[2] *= 1.001
    assert not replace(comparison, library=replace(comparison.library, parameters=parameters)).is_exact


def test_every_update_is_reported() -> None:
    task = regression_task(97, title="", text="")
    calls: list[None] = []
    compare(task, lambda: calls.append(None))
    assert len(calls) == RUNS_PER_TASK * task.updates == 5 * 3 * 3


def test_distances_are_relative_and_by_update() -> None:
    measure = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    values = torch.tensor([[3.0, 4.5], [0.0, 2.0]], dtype=torch.float64)
    assert distances(values, measure).tolist() == [0.1, 0.0]
    assert largest_difference(values, measure) == 0.5


def test_the_bound_grows_with_the_number_of_roundings() -> None:
    assert float32_bound(75) == 75 * torch.finfo(torch.float32).eps
