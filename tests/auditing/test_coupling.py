"""Modules that couple samples are named, the innermost ones, all of them, and no others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoo
from gradaccum.auditing.audit_run import AS_IT_IS, Runs
from gradaccum.auditing.coupling import coupled_modules
from gradaccum.checking.pieces import pieces


def coupled(
    model: nn.Module, loss: zoo.LossFunction = zoo.classes, batch: object = None, *, is_double: bool = True
) -> dict[str, bool]:
    task = zoo.task(model, loss, zoo.vectors() if batch is None else batch)
    return coupled_modules(Runs(task, is_double=is_double), pieces([6, 7])[0], AS_IT_IS)


class Outer(nn.Module):
    """Couples samples between its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(zoo.FEATURES, 8), nn.Linear(8, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x - x.mean(0))


class ByAPart(nn.Module):
    """Changes every sample by a part of itself that depends on all of them."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.part * (x.detach().sum() % 7))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, bool]]] = {
    "none": (lambda: zoo.mlp(nn.LayerNorm(8), nn.Dropout(0.5)), {}),
    "one": (lambda: zoo.mlp(nn.BatchNorm1d(8)), {"1": True}),
    "three": (
        lambda: zoo.mlp(nn.BatchNorm1d(8), zoo.BatchAttention(), nn.BatchNorm1d(8)),
        {"1": True, "2": False, "3": True},
    ),
    "inside": (lambda: nn.Sequential(nn.Sequential(Outer())), {"0.0": False}),
    "overflow": (lambda: zoo.mlp(zoo.Experts(0.5)), {"1": False}),
    "room": (lambda: zoo.mlp(zoo.Experts(2.0)), {}),
    "functional": (zoo.NormalisesByHand, {"NormalisesByHand": True}),
    "frozen": (zoo.frozen_statistics, {}),
    "a feature as long as the batch": (
        lambda: nn.Sequential(nn.Linear(zoo.FEATURES, zoo.ROWS), nn.Softmax(1), nn.Linear(zoo.ROWS, zoo.CLASSES)),
        {},
    ),
    "as long, and over the batch": (
        lambda: nn.Sequential(nn.Linear(zoo.FEATURES, zoo.ROWS), zoo.SoftmaxOverBatch()),
        {"1": False},
    ),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS.keys())
def test_modules(model: Callable[[], nn.Module], expected: dict[str, bool]) -> None:
    assert coupled(model()) == expected
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("part", "dtype", "is_coupled"),
    [
        (1e-15, torch.float64, False),
        (1e-12, torch.float64, True),
        (5e-7, torch.float32, False),
        (1e-4, torch.float32, True),
        (0.1, torch.bfloat16, True),  # of which 64 roundings would be a half of everything
    ],
)
def test_rounding_is_nobodys_fault(part: float, dtype: torch.dtype, is_coupled: bool) -> None:
    """Sums of other numbers of rows may be rounded another way, as those of experts are on some processors."""
    x, y = zoo.vectors()
    is_double = dtype == torch.float64
    model = zoo.mlp(ByAPart(part)).to(torch.float32 if is_double else dtype)
    batch = x.to(next(model.parameters()).dtype), y
    assert coupled(model, batch=batch, is_double=is_double) == ({"1": False} if is_coupled else {})


def test_samples_flattened_with_something_else() -> None:
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.BatchNorm1d(zoo.FEATURES), nn.Linear(zoo.FEATURES, 3), nn.Unflatten(0, (-1, zoo.TIME))
    )
    assert coupled(model, zoo.tokens, zoo.sequences()) == {"1": True}
    assert coupled(model.eval(), zoo.tokens, zoo.sequences()) == {}


def test_samples_in_the_second_dimension() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = nn.GRU(zoo.FEATURES, 4), nn.Linear(4, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x.transpose(0, 1))[0]).transpose(0, 1)

    assert coupled(TimeFirst(), zoo.tokens, zoo.sequences()) == {}


def test_code_around_the_model() -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x - x.mean(0)), y)

    assert coupled(zoo.mlp(), loss_fn) == {"": False}
