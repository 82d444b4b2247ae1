"""How the audit cuts: every row once, never too many at a time, and not all pieces alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.checking.pieces import FixedSplit, equal_sizes, numbered, pieces, ragged_sizes
from gradaccum.split.by_samples import split_by_samples


@given(rows=st.integers(2, 300), size=st.integers(1, 64))
def test_every_row_once_in_ragged_pieces_unless_they_are_too_small_for_it(rows: int, size: int) -> None:
    ragged = ragged_sizes(rows, size)
    for sizes in (equal_sizes(rows, size), ragged):
        assert sum(sizes) == rows
        assert len(sizes) > 1
        assert 1 <= min(sizes) <= max(sizes) <= size
    assert len(set(ragged)) > 1 or max(ragged) <= 2


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        (16, 8, [6, 5, 5]),
        (12, 6, [5, 4, 3]),
        (13, 4, [4, 3, 3, 3]),
        (7, 64, [4, 3]),
        (3, 1, [1] * 3),
        (4, 2, [2, 1, 1]),
    ],
)
def test_examples(rows: int, size: int, expected: list[int]) -> None:
    assert ragged_sizes(rows, size) == expected


def test_micro_batches_are_in_memory_of_their_own() -> None:
    batch = torch.arange(5.0)
    split = FixedSplit(pieces((3, 2)), split_by_samples())
    with_numbers = numbered(batch, 5)
    cut = [split.cut(with_numbers, rows) for rows in split.plan(with_numbers, split.largest(with_numbers))]
    assert [numbers.tolist() for _, numbers in cut] == [[0, 1, 2], [3, 4]]
    made = [one for one, _ in cut]
    made[1].zero_()
    assert batch.tolist() == [0, 1, 2, 3, 4]
    assert [piece.rows for piece in pieces((3, 2))] == [len(one) for one in made]
