"""Splitting by cost: little padding, the whole batch's gradient, and clear words where it cannot be done."""

import copy
import gc
import logging
import statistics
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.split.packing import restore_order
from oracle import assert_same_gradients, gradients_of

SEEDS = range(40)
BUDGET = 2_048
WORDS, FEATURES = 23, 8


def tokens(batch: Any) -> Tensor:
    return batch["mask"].sum(1)


def lengths_of(batch: Any) -> Tensor:
    return batch["lengths"]


def log_normal(seed: int, rows: int = 256) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.exp(4 + 0.8 * torch.randn(rows, generator=made)).round().clamp(min=1).long()


def make_batch(lengths: Tensor, *, left: bool = False) -> dict[str, Tensor]:
    width = int(lengths.max()) + 2
    columns = torch.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    ids = torch.randint(1, WORDS, mask.shape) * mask
    has_loss = mask & (torch.rand(mask.shape) < 0.7)
    return {
        "ids": ids,
        "mask": mask.long(),
        "labels": torch.where(has_loss, torch.randint(0, WORDS, mask.shape), -100),
        "positions": (mask.cumsum(1) - 1).clamp(min=0),
        "allowed": mask[:, None, None, :] & torch.ones(width, width, dtype=torch.bool).tril(),
        "x": torch.randn(*mask.shape, FEATURES, dtype=torch.float64) * mask[..., None],
        "lengths": lengths,
    }


# ----------------------------------------------------------------------------------------------------- how much it runs
def test_at_most_1_12_tokens_run_for_each_real_one() -> None:
    split = ga.split_by_cost(lengths_of, BUDGET)
    ratios: list[float] = []
    for seed in SEEDS:
        lengths = log_normal(seed)
        pieces = split.plan({"lengths": lengths}, split.largest({"lengths": lengths}))
        run = [len(piece) * int(lengths[piece].max()) for piece in pieces]
        assert max(run) <= BUDGET
        ratios.append(sum(run) / int(lengths.sum()))
    assert statistics.mean(ratios) <= 1.12


def test_what_is_planned_is_what_runs_and_comes_back_in_order() -> None:
    batch = make_batch(log_normal(0, rows=64))
    split = ga.split_by_cost(tokens, BUDGET)
    pieces = split.plan(batch, split.largest(batch))
    micro_batches = [split.cut(batch, piece)["ids"] for piece in pieces]
    for piece, ids in zip(pieces, micro_batches, strict=True):
        assert ids.numel() == len(piece) * int(batch["lengths"][piece].max())
    assert torch.equal(restore_order(pieces, [ids.sum(1) for ids in micro_batches]), batch["ids"].sum(1))


def test_more_pieces_where_they_cost_less() -> None:
    batch = {"lengths": log_normal(0)}
    few, usual, many = (
        len(ga.split_by_cost(lengths_of, BUDGET, piece_cost=piece_cost).plan(batch, BUDGET))
        for piece_cost in (BUDGET, None, 1)
    )
    assert few < usual < many


# --------------------------------------------------------------------------------------------------------- the gradient
class Attention(nn.Module):
    """One causal layer that sees what `allowed` says, with positions from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, FEATURES), nn.Embedding(64, FEATURES)
        self.qkv, self.head = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, WORDS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.words(batch["ids"]) + self.places(batch["positions"])
        q, k, v = self.qkv(hidden)[:, None].chunk(3, dim=-1)
        # Padded queries may see themselves, so that their softmax has something to sum over.
        allowed = batch["allowed"] | torch.eye(hidden.shape[1], dtype=torch.bool)
        return self.head(hidden + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[:, 0])


class Encoder(nn.Module):
    """Both ways, by torch's own layer, with padding named to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES)
        self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(FEATURES, WORDS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.layer(self.words(batch["ids"]), src_key_padding_mask=batch["mask"] == 0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(FEATURES, FEATURES, batch_first=True), nn.Linear(FEATURES, WORDS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.gru(batch["x"])[0])


@pytest.mark.parametrize("max_rows", [1_000, 3])
@pytest.mark.parametrize(
    ("make", "left"),
    [(Attention, False), (Attention, True), (Encoder, False), (Encoder, True), (Recurrent, False)],
    ids=["attention", "attention, left", "encoder", "encoder, left", "gru"],
)
def test_the_gradient_is_the_whole_padded_batch_s(make: Callable[[], nn.Module], left: bool, max_rows: int) -> None:
    batch = make_batch(log_normal(0, rows=20).clamp(max=40), left=left)
    model = make().double()
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(batch).transpose(1, 2), batch["labels"]).backward()
    widths: list[int] = []

    def seen(model: nn.Module, micro_batch: dict[str, Tensor]) -> ga.Loss:
        widths.append(micro_batch["ids"].shape[1])
        return ga.criterion(nn.CrossEntropyLoss())(model(micro_batch).transpose(1, 2), micro_batch["labels"])

    optimizer, split = torch.optim.SGD(model.parameters(), lr=0.1), ga.split_by_cost(tokens, 128, piece_cost=8)
    ga.TrainStep(model, optimizer, seen, micro_batch_size=max_rows, split=split).backward(batch)
    assert_same_gradients(gradients_of(model), gradients_of(whole))
    assert len(set(widths)) > 2
    assert max(widths) < batch["ids"].shape[1]


# ---------------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize(
    ("costs", "max_cost", "largest", "pieces"),
    [
        pytest.param([4, 4, 4, 4], 100, 16, [[0, 1, 2, 3]], id="all alike"),
        pytest.param([7], 100, 7, [[0]], id="one sample"),
        pytest.param([0, 0], 100, 1, [[0, 1]], id="all empty"),
        pytest.param([9, 0, 9], 18, 18, [[0, 2], [1]], id="one empty"),
        pytest.param([3, 50, 3], 10, 10, [[1], [0, 2]], id="one over the budget"),
        pytest.param([0.5, 0.25, 0.5], 1, 1, [[0, 2], [1]], id="fractions"),
        pytest.param([True, False, True], 2, 2, [[0, 2], [1]], id="booleans"),
    ],
)
def test_by_name(costs: list[float], max_cost: int, largest: int, pieces: list[list[int]]) -> None:
    batch = torch.tensor(costs)
    split = ga.split_by_cost(lambda batch: batch, max_cost)
    assert split.largest(batch) == largest
    planned = split.plan(batch, largest)
    assert [piece.tolist() for piece in planned if isinstance(piece, Tensor)] == pieces
    assert torch.equal(torch.cat([split.cut(batch, piece) for piece in planned]).sort()[0], batch.sort()[0])


def test_a_smaller_size_and_fewer_rows() -> None:
    batch = {"lengths": log_normal(0)}
    split = ga.split_by_cost(lengths_of, BUDGET)
    for piece in split.plan(batch, 300, max_rows=4):
        assert len(piece) <= 4 if isinstance(piece, Tensor) else False
        assert len(piece) == 1 or len(piece) * int(batch["lengths"][piece].max()) <= 300


def test_untrimmed() -> None:
    batch, split = make_batch(torch.tensor([3, 5, 2, 9])), ga.split_by_cost(tokens, 10, trim=False)
    assert {split.cut(batch, piece)["ids"].shape[1] for piece in split.plan(batch, 10)} == {11}


def test_a_batch_that_is_trimmed_already() -> None:
    batch = make_batch(torch.tensor([4, 4, 4]))
    batch = {name: batch[name][:, :4] for name in ("ids", "mask")}
    split = ga.split_by_cost(tokens, 8)
    assert [split.cut(batch, piece)["ids"].shape[1] for piece in split.plan(batch, 8)] == [4, 4]


def test_a_cut_without_a_plan_and_a_batch_after_another() -> None:
    split = ga.split_by_cost(tokens, 100)
    first, second = make_batch(torch.tensor([3, 5, 2, 9])), make_batch(torch.tensor([9, 2, 5, 3]))
    for batch in (first, second, first):
        row = int(batch["lengths"].argmin())
        assert split.cut(batch, torch.tensor([row]))["ids"].shape[1] == 2


def test_tensors_that_are_filled_anew() -> None:
    split = ga.split_by_cost(tokens, 100)
    batch = make_batch(torch.tensor([3, 5, 2, 9]))
    split.cut(batch, split.plan(batch, 100)[0])
    for name, field in make_batch(torch.tensor([9, 2, 5, 3])).items():
        batch[name].copy_(field)
    split.plan(batch, 100)
    assert split.cut(batch, torch.tensor([0]))["ids"].shape[1] == 9


def test_it_keeps_no_batch_alive() -> None:
    split = ga.split_by_cost(tokens, 100)
    batch = make_batch(torch.tensor([3, 5, 2, 9]))
    ids = weakref.ref(batch["ids"])
    split.cut(batch, split.plan(batch, 100)[0])
    del batch
    gc.collect()
    assert ids() is None


@pytest.mark.parametrize(
    ("lengths", "costs", "messages"),
    [
        pytest.param([4, 4, 4], [4, 4, 4], [], id="nothing to trim"),
        pytest.param([3, 5, 2, 9], [3, 5, 2, 9], [], id="trimmed"),
        pytest.param(
            [3, 5, 2, 9],
            [3, 1, 4, 1],
            ["no padding is trimmed: the costs do not go with the lengths that are seen along a dimension of 11"],
            id="not trimmed",
        ),
    ],
)
def test_it_says_once_why_nothing_is_trimmed(
    caplog: pytest.LogCaptureFixture, lengths: list[int], costs: list[int], messages: list[str]
) -> None:
    caplog.set_level(logging.INFO, logger="gradaccum")
    batch = make_batch(torch.tensor(lengths))
    split = ga.split_by_cost(lambda batch: torch.tensor(costs), 100)
    for _ in range(2):
        split.cut(batch, split.plan(batch, 100)[0])
    for record, message in zip(caplog.records, messages, strict=True):
        assert message in record.getMessage()


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("costs", "message"),
    [
        pytest.param([1, 2, 3], r"returned a list for a batch of 3 rows\. Return a 1-d tensor with one", id="list"),
        pytest.param(torch.ones(3, 2), r"shape \(3, 2\).*batch of 3 rows.*one real number for each row", id="2-d"),
        pytest.param(torch.tensor(3), r"shape \(\) and torch.int64 for a batch of 3 rows", id="0-d"),
        pytest.param(torch.ones(4), r"shape \(4,\).*batch of 3 rows", id="one too many"),
        pytest.param(torch.ones(3, dtype=torch.complex64), r"torch.complex64", id="complex"),
        pytest.param(torch.tensor([1.0, 2.0, -1.0]), r"is -1\.0 for row 2.*not negative", id="negative"),
        pytest.param(torch.tensor([1.0, torch.inf, 1.0]), r"is inf for row 1.*finite", id="infinite"),
        pytest.param(torch.tensor([torch.nan, 1.0, 1.0]), r"is nan for row 0", id="nan"),
    ],
)
def test_costs_that_are_none(costs: Any, message: str) -> None:
    split = ga.split_by_cost(lambda batch: costs, 10)
    for ask in (lambda batch: split.plan(batch, 10), split.largest):
        with pytest.raises(ga.BatchError, match=message):
            ask(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"cost": 3}, r"cost is a int, and is called with every batch", id="cost"),
        pytest.param({"max_cost": 0}, r"max_cost=0: it is the largest rows times costliest", id="zero"),
        pytest.param({"max_cost": 2.5}, r"max_cost=2\.5.*an int of at least 1", id="fraction"),
        pytest.param({"max_cost": True}, r"max_cost=True", id="bool"),
        pytest.param({"piece_cost": -1}, r"piece_cost=-1: it is the fixed time of a micro-batch", id="negative"),
        pytest.param({"piece_cost": float("nan")}, r"piece_cost=nan", id="nan"),
        pytest.param({"piece_cost": "much"}, r"piece_cost='much'", id="text"),
    ],
)
def test_options_that_make_no_pieces(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ga.WindowError, match=message):
        ga.split_by_cost(**{"cost": tokens, "max_cost": 10, **options})


@pytest.mark.parametrize(("size", "max_rows"), [(0, None), (10, 0)])
def test_sizes_below_one(size: int, max_rows: int | None) -> None:
    with pytest.raises(ga.WindowError, match=rf"size={size}, max_rows={max_rows}: a micro-batch has at least one"):
        ga.split_by_cost(lambda batch: batch, 10).plan(torch.ones(3), size, max_rows=max_rows)


def test_a_batch_of_no_rows() -> None:
    with pytest.raises(ga.BatchError, match=r"The batch has 0 rows"):
        ga.split_by_cost(lambda batch: batch, 10).plan(torch.ones(0), 10)
