"""What forwards change, and BatchNorms that are not the models' own: named once, for both ways of training."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

FEATURES = 8


class Centred(nn.Linear):
    """Keeps a running centre of its outputs, which each forward moves, in place or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__(FEATURES, FEATURES)
        self.in_place = in_place
        self.register_buffer("centre", torch.zeros(FEATURES))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        moved = 0.9 * self.centre + 0.1 * output.detach().mean(0)
        if self.in_place:
            self.centre.copy_(moved)
        else:
            self.centre = moved
        return output - moved


class Teacher(nn.Module):
    """A frozen copy that follows in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
        return self.student(x) - self.teacher(x)


class Counting(nn.Linear):
    """Counts its forwards, and makes a table anew that is always the same: neither enters into the gradient."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        self.forwards += 1
        self.table = torch.arange(8.0)
        return super().forward(input) + self.table


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def told(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, in_hand: bool, micro_batches: int = 3, check: Any = "off"
) -> list[str]:
    """The warnings of three updates; of what is read, where the check before the first one is off."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8 * micro_batches, FEATURES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if in_hand:
            step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=8, check=check)
            for _ in range(3):
                step(x)
        else:
            accumulator = ga.Accumulator(model, optimizer, micro_batches=micro_batches)
            for _ in range(3):
                for piece in accumulator.over(x.split(8)):
                    accumulator.backward(loss_fn(model, piece))
    assert all(issubclass(warning.category, ga.GradAccumWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


MOVES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a centre": (lambda: Centred(in_place=True), "centre changed in a forward"),
    "a centre that is replaced": (lambda: nn.Sequential(Centred(in_place=False)), "0.centre changed"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 4)), "_u.*_v changed"),
    "a frozen teacher": (Teacher, "teacher.weight changed in a forward"),
}
STAYS: dict[str, Callable[[], nn.Module]] = {
    "a counter and a cache": Counting,
    "LayerNorm": lambda: nn.LayerNorm(FEATURES),
    "InstanceNorm": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True)),
    "BatchNorm in eval mode": lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4).eval()),
}


@pytest.mark.parametrize("in_hand", [False, True])
@pytest.mark.parametrize(("make", "match"), MOVES.values(), ids=MOVES)
def test_state_that_moves_is_named_once(make: Callable[[], nn.Module], match: str, in_hand: bool) -> None:
    [text] = told(make(), squares, in_hand=in_hand)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(text)
    assert "advances 3 times an update instead of once" in text
    assert "test_forward_state.py:" in text


@pytest.mark.parametrize("in_hand", [False, True])
@pytest.mark.parametrize("make", STAYS.values(), ids=STAYS)
def test_what_stays_is_not_blamed(make: Callable[[], nn.Module], in_hand: bool) -> None:
    assert told(make(), squares, in_hand=in_hand) == []
    assert not in_hand or told(make(), squares, in_hand=True, check="first") == []


@pytest.mark.parametrize("in_hand", [False, True])
def test_a_batch_norm_of_another_model_is_told(in_hand: bool) -> None:
    judge = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return F.softplus(-judge(model(x))).mean()

    [text] = told(nn.Linear(FEATURES, FEATURES), loss_fn, in_hand=in_hand)
    assert "a BatchNorm of 16 features that is not among the models ran in training mode" in text
    judge.eval()
    assert told(nn.Linear(FEATURES, FEATURES), loss_fn, in_hand=in_hand) == []


@pytest.mark.parametrize("in_hand", [False, True])
def test_the_models_own_batch_norm_is_told_once(in_hand: bool) -> None:
    [text] = told(nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4)), squares, in_hand=in_hand)
    assert "1 BatchNorm layer in training mode (1)" in text


def test_windows_of_one_micro_batch_are_no_fault() -> None:
    assert told(Centred(in_place=True), squares, in_hand=False, micro_batches=1) == []
