"""What modules keep on themselves during a forward is the micro-batch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradaccum.whole_batch.lockstep.attributes import Attributes, noted_in, watched
from normed import CLASSES, ROWS, assert_like_whole, make_batches, trained


class Skips(nn.Module):
    """Keeps features in one layer for a later one, and what is left of them for whoever looks afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(8, CLASSES)
        self.kept: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.conv(x))
        self.size = len(x)
        hidden = self.bn(self.kept)
        assert self.size == len(x)
        self.calls += 1
        output = self.head(torch.cat([hidden, self.kept], dim=1).mean((2, 3)))
        del self.size
        return output


@pytest.mark.parametrize("size", [1, 4, ROWS])
def test_features_kept_on_the_module(size: int) -> None:
    assert_like_whole(Skips().double(), make_batches(2), micro_batch_size=size)


def test_the_last_micro_batchs_stay() -> None:
    model = Skips().double()
    trained(model, make_batches(1), micro_batch_size=4)
    assert model.kept is not None
    assert len(model.kept) == 3
    assert model.calls == 4
    assert not hasattr(model, "size")


def test_modules_are_as_they_were() -> None:
    before = nn.Module.__setattr__, nn.Module.__delattr__
    trained(Skips().double(), make_batches(1), micro_batch_size=4)
    assert (nn.Module.__setattr__, nn.Module.__delattr__) == before


def test_switching() -> None:
    module, first, second = nn.Linear(1, 1), Attributes(), Attributes()
    with watched():
        with noted_in(first):
            module.kept = "first"
        first.leave()
        with noted_in(second):
            module.kept = "second"
            module.weight = nn.Parameter(torch.zeros(1, 1))  # is everybody's
        second.leave()
        first.enter()
        assert module.kept == "first"
        with noted_in(first):
            del module.kept
        first.leave()
        second.enter()
        assert module.kept == "second"
        first.enter()
        assert not hasattr(module, "kept")
        assert module.weight.item() == 0


def test_other_threads_are_not_noted() -> None:
    module, attributes = nn.Linear(1, 1), Attributes()
    with watched():
        module.kept = 1
        with noted_in(attributes):
            pass
        module.kept = 2
    attributes.leave()
    attributes.enter()
    assert module.kept == 2
