"""How the audit cuts: every row once, never too many at a time, and not all pieces alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.checking.pieces import FixedSplit, equal_sizes, pieces, planned_pieces, ragged_sizes


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


def test_a_fixed_split_cuts_numbers_of_rows() -> None:
    numbers, packed = torch.arange(5), planned_pieces([torch.tensor([4, 0]), slice(1, 4)])
    for cut, expected in ((pieces((3, 2)), [[0, 1, 2], [3, 4]]), (packed, [[4, 0], [1, 2, 3]])):
        split = FixedSplit(cut)
        planned = split.plan(numbers, split.largest(numbers))
        assert [split.cut(numbers, rows).tolist() for rows in planned] == expected
        assert [piece.start for piece in cut] == [rows[0] for rows in expected]
