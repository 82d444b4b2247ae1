"""Packing: every row once, within the budget, and no division of the samples is better; outputs come back in order."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.split.packing import pack, restore_order

costs = st.integers(0, 30) | st.floats(0, 30)


def total(pieces: list[list[int]], costs: list[float], piece_cost: float) -> float:
    return sum(len(piece) * max(costs[row] for row in piece) + piece_cost for piece in pieces)


def fits(piece: list[int], costs: list[float], size: float, max_rows: int) -> bool:
    return len(piece) == 1 or (len(piece) <= max_rows and len(piece) * max(costs[row] for row in piece) <= size)


def divisions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Every way to divide the rows into pieces, neighbours in cost or not."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for pieces in divisions(rest):
        yield [[first], *pieces]
        for i, piece in enumerate(pieces):
            yield [*pieces[:i], [first, *piece], *pieces[i + 1 :]]


@given(
    st.lists(costs, min_size=1, max_size=6), st.integers(1, 100), st.sampled_from([0, 1, 3.5, 40]), st.integers(1, 6)
)
def test_no_division_is_better(costs: list[float], size: int, piece_cost: float, max_rows: int) -> None:
    packed = pack(costs, size=size, piece_cost=piece_cost, max_rows=max_rows)

    best = min(
        total(pieces, costs, piece_cost)
        for pieces in divisions(list(range(len(costs))))
        if all(fits(piece, costs, size, max_rows) for piece in pieces)
    )
    assert total(packed, costs, piece_cost) == pytest.approx(best, rel=1e-12, abs=1e-12)


@given(st.lists(costs, min_size=1, max_size=120), st.integers(1, 500), st.sampled_from([0, 2, 90]), st.integers(1, 50))
def test_every_row_once_within_the_budget(costs: list[float], size: int, piece_cost: float, max_rows: int) -> None:
    packed = pack(costs, size=size, piece_cost=piece_cost, max_rows=max_rows)

    assert sorted(row for piece in packed for row in piece) == list(range(len(costs)))
    assert all(len(piece) <= max_rows and fits(piece, costs, size, max_rows) for piece in packed)
    assert all(piece == sorted(piece) for piece in packed)
    runs = [len(piece) * max(costs[row] for row in piece) for piece in packed]
    assert runs == sorted(runs, reverse=True), "the piece with most to run first"


def by_trying_all_starts(costs: list[float], size: float, piece_cost: float, max_rows: int) -> float:
    """The same dynamic program without its queue: rows squared, obviously right."""
    ascending = sorted(costs)
    best = [0.0]
    for stop in range(1, len(costs) + 1):
        cost = ascending[stop - 1]
        best.append(
            min(
                best[start] + (stop - start) * cost + piece_cost
                for start in range(stop)
                if stop - start == 1 or ((stop - start) * cost <= size and stop - start <= max_rows)
            )
        )
    return best[-1]


@given(st.integers(0, 999), st.sampled_from([300, 2_048, 10**6]), st.sampled_from([0, 102, 3_000]), st.integers(5, 400))
def test_the_queue_forgets_no_start(seed: int, size: int, piece_cost: int, max_rows: int) -> None:
    made = torch.Generator().manual_seed(seed)
    costs: list[float] = torch.exp(4 + 0.8 * torch.randn(100, generator=made)).round().tolist()
    packed = pack(costs, size=size, piece_cost=piece_cost, max_rows=max_rows)
    assert total(packed, costs, piece_cost) == by_trying_all_starts(costs, size, piece_cost, max_rows)


@pytest.mark.parametrize(
    ("costs", "size", "piece_cost", "pieces"),
    [
        pytest.param([5], 100, 1, [[0]], id="one sample"),
        pytest.param([4, 4, 4, 4], 16, 1, [[0, 1, 2, 3]], id="all alike, one piece"),
        pytest.param([4, 4, 4, 4], 16, 0, [[0, 1, 2, 3]], id="all alike, pieces cost nothing"),
        pytest.param([4, 4, 4], 8, 1, [[1, 2], [0]], id="all alike, over the budget"),
        pytest.param([0, 0, 0], 1, 1, [[0, 1, 2]], id="empty samples only"),
        pytest.param([0, 7, 0, 7], 14, 1, [[1, 3], [0, 2]], id="empty samples among others"),
        pytest.param([3, 50, 3], 10, 1, [[1], [0, 2]], id="a sample over the budget is alone"),
        pytest.param([50, 60], 10, 1, [[1], [0]], id="all over the budget"),
        pytest.param([9, 8], 100, 5, [[0, 1]], id="padding cheaper than a piece"),
        pytest.param([9, 2], 100, 5, [[0], [1]], id="a piece cheaper than padding"),
        pytest.param([1e-9, 1e9], 1, 0, [[1], [0]], id="far apart"),
    ],
)
def test_by_name(costs: list[float], size: int, piece_cost: float, pieces: list[list[int]]) -> None:
    assert pack(costs, size=size, piece_cost=piece_cost, max_rows=100) == pieces


def test_no_more_rows_than_asked_for() -> None:
    assert sorted(map(len, pack([1] * 7, size=1_000, piece_cost=50, max_rows=3))) == [1, 3, 3]


def test_fewer_pieces_where_they_cost_more() -> None:
    costs = [round(math.exp(i / 40)) for i in range(256)]
    counts = [len(pack(costs, size=2_048, piece_cost=piece_cost, max_rows=256)) for piece_cost in (0, 10, 100, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3]


@given(st.permutations(list(range(12))), st.lists(st.integers(1, 11), max_size=3, unique=True))
def test_outputs_in_the_order_of_the_batch(order: list[int], cuts: list[int]) -> None:
    batch = torch.randn(12, 3)
    slices = [slice(start, stop) for start, stop in pairwise([0, *sorted(cuts), 12])]
    for pieces in (list(torch.tensor(order).tensor_split(sorted(cuts))), slices[::-1]):
        assert torch.equal(restore_order(pieces, [batch[piece] for piece in pieces]), batch)


def test_the_gradient_goes_back_to_each_piece() -> None:
    outputs = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    restored = restore_order([torch.tensor([2, 0]), torch.tensor([1])], outputs)
    (restored * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert [output.grad.tolist() for output in outputs if output.grad is not None] == [[3.0, 1.0], [2.0]]
