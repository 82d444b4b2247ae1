"""Bytes against what the curve is made for: the maximum of some affine functions, seen at a few sizes. And times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.fit.size_model import Curve, SizeModel, Times

LINES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 500)), min_size=1, max_size=4)


@given(LINES, st.lists(st.integers(1, 200), min_size=2, max_size=6, unique=True), st.integers(1, 200))
def test_never_too_little_between_sizes_that_were_seen(
    lines: list[tuple[int, int]], seen: list[int], size: int
) -> None:
    def true(n: int) -> int:
        return max(fixed + slope * n for fixed, slope in lines)

    curve = Curve.through({n: true(n) for n in seen})
    if min(seen) <= size <= max(seen):
        assert curve.at(size) >= true(size)
    if len(lines) == 1:
        assert curve.at(size) == true(size)
    for n in seen:
        assert curve.at(n) == true(n)


@given(LINES, st.integers(1, 120_000), st.integers(1, 300))
def test_the_largest_that_fits(lines: list[tuple[int, int]], memory: int, batch_size: int) -> None:
    curve = Curve.through({n: max(fixed + slope * n for fixed, slope in lines) for n in (1, 7, 60, 150)})
    largest = curve.largest(memory, batch_size)
    fitting = [n for n in range(1, batch_size + 1) if curve.at(n) <= memory]
    assert largest == max(fitting, default=None)


def test_the_whole_batch_is_apart() -> None:
    curve = Curve.through({1: 110, 4: 140}, whole=(8, 150))
    assert [curve.at(n) for n in (1, 4, 7, 8, 10)] == [110, 140, 170, 150, 170]
    assert curve.largest(150, 8) == 8
    assert [curve.largest(memory, 8) for memory in (149, 140, 139, 110, 109)] == [4, 4, 3, 1, None]
    assert (curve.bytes_per_sample, curve.fixed_bytes) == (10, 100)


def test_what_an_update_takes_anyway() -> None:
    curve = Curve.through({1: 110, 4: 140}, floor=135)
    assert [curve.at(n) for n in (1, 3, 4)] == [135, 135, 140]
    assert curve.largest(134, 100) is None


def test_an_allocator_that_took_less_for_more() -> None:
    curve = Curve.through({1: 100, 2: 90, 4: 120})
    assert [curve.at(n) for n in (1, 2, 3, 4)] == [100, 100, 110, 120]


def test_one_size_alone() -> None:
    curve = Curve.through({4: 120})
    assert [curve.at(n) for n in (1, 4, 9)] == [120, 120, 120]


def test_up_to_a_whole_batch_that_ran_in_one_piece() -> None:
    """Below it gradients wait, so it is at most that much more there, and never less than the slope says."""

    def curve(whole: int, resident: int = 0) -> Curve:
        return SizeModel(
            rows=100, sizes=[10, 20, 100], resident_bytes=resident, peaks={10: 200, 20: 300}, whole=whole,
            gradient_bytes=100,
        ).curve()  # fmt: skip

    assert curve(1500).at(60) == pytest.approx((300 + 1600) / 2)
    assert curve(1500).at(100) == 1500
    assert curve(500).at(60) == 700, "steeper"
    assert curve(500, resident=1000).at(60) == 1700


def test_times_are_medians_for_a_row_without_the_first() -> None:
    times = Times()
    for size, seconds in [(2, 90.0), (4, 12.0), (2, 2.0), (2, 4.0), (8, 16.4), (2, 8.0)]:
        times.add(size, seconds)
    assert times.seconds() == {2: 2.0, 4: 3.0, 8: pytest.approx(2.05)}
    assert times.fastest() == [2]
    assert times.fastest(within=1.03) == [2, 8]
