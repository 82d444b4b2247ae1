"""Bytes against what the curve is made for: the maximum of some affine functions, seen at a few sizes. And times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.fit.size_model import Curve, SizeModel, Times, in_words

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


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        pytest.param(Curve.through({1: 110, 4: 140}, floor=135), {1: 135, 3: 135, 4: 140}, id="what is there anyway"),
        pytest.param(Curve.through({1: 100, 2: 90, 4: 120}), {1: 100, 2: 100, 3: 110, 4: 120}, id="less for more"),
        pytest.param(Curve.through({4: 120}), {1: 120, 4: 120, 9: 120}, id="one size alone"),
    ],
)
def test_other_curves(curve: Curve, expected: dict[int, int]) -> None:
    assert {n: curve.at(n) for n in expected} == expected
    assert curve.largest(min(expected.values()) - 1, 100) is None


def test_up_to_a_whole_batch_that_ran_in_one_piece() -> None:
    """Below it gradients wait, so it is at most that much more there, and never less than the slope says."""

    def curve(whole: int, resident: int = 0) -> Curve:
        known = {"rows": 100, "sizes": [10, 20, 100], "peaks": {10: 200, 20: 300}, "gradient_bytes": 100}
        return SizeModel(**known, parameters=resident, whole=whole).curve()  # type: ignore[arg-type]

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


WORDS = {0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1536: "1.5 KiB", 999 * 2**10: "999 KiB", 123_456_789: "118 MiB"}
WORDS |= {24 * 2**30: "24 GiB", 5 * 2**40: "5 TiB", 5000 * 2**40: "5,000 TiB"}


@pytest.mark.parametrize("num_bytes", WORDS)
def test_words(num_bytes: int) -> None:
    assert in_words(num_bytes) == WORDS[num_bytes]
