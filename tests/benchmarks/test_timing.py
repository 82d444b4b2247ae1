"""Who runs when, and what is compared with what. How fast anything is, is not tested."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_every_loop_follows_every_other_one_equally_often(count: int, script: ModuleType) -> None:
    names = [str(i) for i in range(count)]
    rounds, times = (count, 1) if count % 2 == 0 else (2 * count, 2)
    orders = [script.order(names, round_) for round_ in range(rounds)]
    assert all(sorted(order) == names for order in orders)
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert neighbours == {(a, b): times for a in names for b in names if a != b}


def test_one_loop(script: ModuleType) -> None:
    assert script.order(["a"], 3) == ["a"]
    assert script.measure({"a": list}, 2)["a"].ratio == 1


class Clock:
    """In place of `time`: loops say how long they take."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor

    def loop(self, *walls: float) -> Callable[[], None]:
        """One that takes these in turn, half of each on the processor."""
        runs = iter(walls)

        def run() -> None:
            seconds = next(runs)
            self.wall += seconds
            self.processor += seconds / 2

        return run


def test_the_warm_up_does_not_count(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "time", clock := Clock())
    times = script.measure({"a": clock.loop(100, 100, 1, 1, 1), "b": clock.loop(9, 9, 2, 2, 2)}, 3, warm_up=2)
    assert (times["a"].seconds, times["b"].seconds) == (1, 2)


def test_ratios_are_medians_within_rounds(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "time", clock := Clock())
    loops = {"a": clock.loop(1, 1, 10, 1), "b": clock.loop(1, 2, 20, 9), "c": clock.loop(1, 1, 5, 9)}
    times = script.measure(loops, 3, bases={"c": "b"})
    assert [times[name].ratio for name in "abc"] == [1, 2, 0.5]
    assert [times[name].processor_ratio for name in "abc"] == [1, 2, 0.5]
    assert [times[name].seconds for name in "abc"] == [1, 9, 5]
    assert [times[name].processor_seconds for name in "abc"] == [0.5, 4.5, 2.5]
