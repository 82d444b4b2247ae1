"""A batch into micro-batches: every row once and in order, as many pieces as needed, and these as equal as can be."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradaccum as ga

sizes = st.integers(1, 40)


def cut(rows: int, micro_batch_size: int) -> list[slice]:
    planned = ga.split_by_samples().plan(torch.zeros(rows, 1), micro_batch_size)
    assert all(isinstance(piece, slice) and piece.step in (None, 1) for piece in planned)
    return [piece for piece in planned if isinstance(piece, slice)]


@given(st.integers(1, 200), sizes)
def test_every_row_once_in_no_more_pieces_than_needed_and_all_alike(rows: int, micro_batch_size: int) -> None:
    pieces = cut(rows, micro_batch_size)
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert len(lengths) == -(-rows // micro_batch_size)
    assert max(lengths) <= micro_batch_size
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True), "two shapes at most, the longer first"


@pytest.mark.parametrize(
    ("rows", "micro_batch_size", "lengths"),
    [
        pytest.param(13, 4, [4, 3, 3, 3], id="ragged"),
        pytest.param(12, 4, [4, 4, 4], id="divides"),
        pytest.param(5, 5, [5], id="the whole batch"),
        pytest.param(5, 1000, [5], id="larger than the batch"),
        pytest.param(1, 1, [1], id="one sample"),
        pytest.param(3, 1, [1, 1, 1], id="one by one"),
        pytest.param(9, 8, [5, 4], id="one too many"),
    ],
)
def test_by_name(rows: int, micro_batch_size: int, lengths: list[int]) -> None:
    assert [piece.stop - piece.start for piece in cut(rows, micro_batch_size)] == lengths


@given(st.integers(1, 30), sizes)
def test_the_pieces_are_the_batch(rows: int, micro_batch_size: int) -> None:
    x, y = torch.arange(rows * 2).reshape(rows, 2), torch.arange(rows)
    batch: dict[str, Any] = {"x": x, "rest": (y, [f"row {i}" for i in range(rows)], "shared")}
    split = ga.split_by_samples()
    pieces = [split.cut(batch, piece) for piece in split.plan(batch, micro_batch_size)]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), x)
    assert torch.equal(torch.cat([piece["rest"][0] for piece in pieces]), y)
    assert [name for piece in pieces for name in piece["rest"][1]] == batch["rest"][1]
    assert {piece["rest"][2] for piece in pieces} == {"shared"}
    for before, after in pairwise(pieces):
        assert before["rest"][0][-1] + 1 == after["rest"][0][0]


@given(st.integers(1, 200), sizes, sizes)
def test_a_limit_of_rows_besides(rows: int, size: int, max_rows: int) -> None:
    """Samples are the unit, so that both are one: the smaller counts."""
    batch, split = torch.zeros(rows, 1), ga.split_by_samples()
    assert split.plan(batch, size, max_rows=max_rows) == split.plan(batch, min(size, max_rows))


def test_the_largest_size_is_the_whole_batch() -> None:
    batch, split = {"x": torch.zeros(13, 2), "y": torch.zeros(13)}, ga.split_by_samples()
    assert split.largest(batch) == 13
    assert split.plan(batch, split.largest(batch)) == [slice(0, 13)]


@pytest.mark.parametrize("micro_batch_size", [0, -1])
def test_a_size_below_one(micro_batch_size: int) -> None:
    with pytest.raises(ga.WindowError, match=f"size={micro_batch_size}: a micro-batch has at least one sample"):
        cut(4, micro_batch_size)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, 1), r"The batch has 0 rows.*Leave empty batches out"),
        ({"x": torch.tensor(1.0)}, "holds no tensor with a first dimension"),
        ((torch.zeros(4), torch.zeros(5)), "Rows disagree"),
    ],
    ids=["no rows", "nothing with rows", "rows that disagree"],
)
def test_a_batch_without_rows(batch: Any, message: str) -> None:
    with pytest.raises(ga.BatchError, match=message):
        ga.split_by_samples().plan(batch, 4)
