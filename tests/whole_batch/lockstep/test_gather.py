"""Tensors over the batch inside of a model: statistics, attention and losses between samples, in the batch's order."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from normed import CLASSES, NORMED, ROWS, SIDE, assert_like_whole, classes_loss, make_batches, sgd, trained

FEATURES = 3 * SIDE * SIDE


class MinibatchStd(nn.Module):
    """Karras et al. 2018, section 3: the spread over the batch as one more feature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(1)))
        spread = ga.gather(hidden).std(0).mean()
        return self.second(torch.cat([hidden, spread.expand(len(x), 1)], dim=1))


class BetweenSamples(nn.Module):
    """Attention of each sample to all of the batch, twice, with a BatchNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.keys = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.attend(torch.tanh(self.first(x.flatten(1))))
        return self.head(self.attend(self.bn(hidden)) + hidden)

    def attend(self, hidden: Tensor) -> Tensor:
        everyone = ga.gather(hidden)
        return F.softmax(hidden @ self.keys(everyone).t(), dim=1) @ everyone


class Contrastive(nn.Module):
    """A head that tells each sample from all others of the batch; it finds itself by an index that the batch brings."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(FEATURES, 5), nn.Linear(FEATURES, 5)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        one, other = self.one(x.flatten(1)), ga.gather(self.other(x.flatten(1).square()))
        target = (index.unsqueeze(1) == ga.gather(index)).int().argmax(1)
        return F.cross_entropy(one @ other.t(), target)


class Checkpointed(BetweenSamples):
    """Gathers twice inside of one checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.Identity()  # instead of buffers, which torch would advance twice in the oracle

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


WITHOUT_BATCH_NORM: dict[str, Any] = {"batch_norm": "micro", "lockstep": True}


@pytest.mark.parametrize("size", [1, 4, 7, ROWS])
@pytest.mark.parametrize("model", [MinibatchStd, BetweenSamples, Checkpointed])
def test_the_whole_batch(model: type[nn.Module], size: int) -> None:
    torch.manual_seed(0)
    assert_like_whole(model().double(), make_batches(2), micro_batch_size=size, batch_norm="exact")


@pytest.mark.parametrize("size", [1, 4, ROWS])
def test_lockstep_without_batch_norm(size: int) -> None:
    assert_like_whole(MinibatchStd().double(), make_batches(2), micro_batch_size=size, **WITHOUT_BATCH_NORM)


@pytest.mark.parametrize("size", [1, 4, ROWS])
def test_contrastive_inside_of_the_model(size: int) -> None:
    batches = [(x, y, torch.randperm(ROWS)) for x, y in make_batches(2)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0], batch[2])

    assert_like_whole(Contrastive().double(), batches, loss, micro_batch_size=size, **WITHOUT_BATCH_NORM)


def test_the_batchs_order_where_samples_are_packed() -> None:
    order: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        order.append(ga.gather(batch[2]))
        return classes_loss(model, batch)

    batches = [(x, y, torch.arange(ROWS)) for x, y in make_batches(2)]
    split = ga.split_by_cost(lambda batch: 1 + batch[2] % 5, 15, trim=False)
    options: dict[str, Any] = {"micro_batch_size": 4, "split": split}
    updates = assert_like_whole(BetweenSamples().double(), batches, loss, whole_loss=classes_loss, **options)
    assert updates[0].micro_batches > 3
    assert all(torch.equal(one, torch.arange(ROWS)) for one in order)


def test_outside_it_returns_its_argument() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert ga.gather(x) is x
    model = nn.Linear(1, 1)
    optimizer = sgd(model)
    seen: list[tuple[int, int]] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append((len(x), len(ga.gather(x))))
        return model(x).mean()

    for size, lockstep in ((2, False), (5, True), (2, True)):
        ga.TrainStep(model, optimizer, loss, micro_batch_size=size, lockstep=lockstep)(torch.ones(5, 1))
    assert seen == [(2, 2), (2, 2), (1, 1), (5, 5), (2, 5), (2, 5), (1, 5)]


def test_without_a_graph() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            assert not ga.gather(model(x)).requires_grad
        return model(x).mean()

    model = nn.Linear(1, 1)
    ga.TrainStep(model, sgd(model), loss, micro_batch_size=2, lockstep=True)(torch.ones(5, 1))


@pytest.mark.parametrize(("value", "kind"), [(torch.ones(()), "0-d tensor"), ([torch.ones(3)], "list")])
def test_what_has_no_rows_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(ga.BatchError, match=f"ga.gather got a {kind}"):
        ga.gather(value)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (lambda x: x.new_ones(2, len(x)), {}, r"rows of shape \(3,\) in one micro-batch and \(4,\) in another"),
        (
            lambda x: x.new_ones(2, 4),
            {"split": ga.split_by_cost(lambda batch: 1 + batch[1], 15, trim=False)},
            "whose order in the batch is its split's",
        ),
    ],
    ids=["of different shape", "of unknown order"],
)
def test_rows_that_cannot_be_joined_are_refused(rows: Any, options: dict[str, Any], message: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ga.gather(rows(batch[0])).sum()

    with pytest.raises(ga.BatchError, match=message):
        trained(nn.Linear(4, 1).double(), make_batches(1), loss, micro_batch_size=4, lockstep=True, **options)


class Reentrant(BetweenSamples):
    def attend(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().attend, hidden, use_reentrant=True)


class Drifting(BetweenSamples):
    calls = 0

    def attend(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.drift, hidden, use_reentrant=False)

    def drift(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return super().attend(hidden * self.calls)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Reentrant, r"ga.gather ran without a graph .* reentrant"),
        (Drifting, "with other values than in the forward"),
    ],
)
def test_checkpoints_that_cannot_gather_again_are_refused(model: type[nn.Module], message: str) -> None:
    with pytest.raises(ga.UnsupportedError, match=message):
        trained(model().double(), make_batches(1), micro_batch_size=4)


def test_exactness_is_not_by_accident() -> None:
    """Without lockstep the same model sees its micro-batch alone."""
    model = MinibatchStd().double()
    with pytest.raises(AssertionError, match="is off by"):
        assert_like_whole(model, make_batches(1), micro_batch_size=4, batch_norm="micro", check="off")
    assert NORMED < 1e-8
