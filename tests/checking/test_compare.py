"""Each verdict by name, and the error over all parameters."""

import math

import pytest
import torch
from torch import Tensor

from gradaccum.checking.compare import compare, different_buffers, relative_error

TOLERANCE = 1e-10
ONE = torch.tensor([3.0, 4.0], dtype=torch.float64)
ZERO = torch.zeros(2, dtype=torch.float64)

CASES: dict[str, tuple[Tensor | None, Tensor | None, str, float]] = {
    "equal": (ONE, ONE, "equal", 1.0),
    "rounding": (ONE * (1 + 1e-14), ONE, "rounding", 1.0),
    "scaled": (4 * ONE, ONE, "scaled", 4.0),
    "turned round": (-ONE, ONE, "scaled", -1.0),
    "biased": (ONE + torch.tensor([4.0, -3.0]), ONE, "biased", 1.0),
    "a single number is never scaled": (4 * ONE[:1], ONE[:1], "biased", 4.0),
    "missing": (None, ONE, "missing", 0.0),
    "one too many": (ONE, None, "missing", 0.0),
    "none and zeros": (ZERO, None, "equal", 1.0),
    "zeros and none": (None, ZERO, "equal", 1.0),
    "neither": (None, None, "equal", 1.0),
    "not a number": (ONE * math.nan, ONE, "biased", math.nan),
    "sparse": (ONE.to_sparse(), ONE, "equal", 1.0),
}


@pytest.mark.parametrize(("made", "expected", "verdict", "ratio"), CASES.values(), ids=CASES.keys())
def test_a_verdict(made: Tensor | None, expected: Tensor | None, verdict: str, ratio: float) -> None:
    other = {"other": ONE}
    [found, _] = compare({"x": made, **other}, {"x": expected, **other}, tolerance=TOLERANCE)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(ratio, nan_ok=True)


def test_noise_in_a_gradient_of_nothing_is_rounding() -> None:
    noise = 1e-17 * torch.tensor([1.0, -2.0], dtype=torch.float64)
    [_, bias] = compare({"weight": ONE, "bias": noise}, {"weight": ONE, "bias": -noise}, tolerance=TOLERANCE)
    assert bias.verdict == "rounding"
    assert bias.error < 1e-15


def test_the_error_over_all_parameters() -> None:
    expected: dict[str, Tensor | None] = {"a": ONE, "b": None, "c": ZERO}
    assert relative_error(expected, expected) == 0
    assert relative_error({"a": 2 * ONE, "b": None, "c": None}, expected) == pytest.approx(1)
    assert relative_error({"a": ONE, "b": ONE, "c": ZERO}, expected) == pytest.approx(1)
    assert relative_error({"a": None, "b": None, "c": ZERO}, expected) == pytest.approx(1)
    assert relative_error({"a": ONE * math.nan, "b": None, "c": ZERO}, expected) == math.inf
    assert relative_error({"a": ONE}, {"a": ZERO}) == math.inf


def test_buffers_that_differ() -> None:
    expected = {("norm", "mean"): ONE, ("norm", "calls"): torch.tensor(3), ("cache", "keys"): ZERO}
    made = {("norm", "mean"): ONE * (1 + 1e-14), ("norm", "calls"): torch.tensor(6), ("cache", "keys"): ONE[:1]}
    found = different_buffers(made, expected, TOLERANCE)
    assert found == {("norm", "calls"): 1.0, ("cache", "keys"): math.inf}
