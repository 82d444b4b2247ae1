"""How loops are timed: in rounds, each loop once a round, in an order that changes; what counts is a median of ratios.

Another program that disturbs a round disturbs all loops of it alike, so a ratio within a round is steadier than the
times themselves. Processor time is measured beside wall time: waiting for a processor does not count there.

The order is that of a balanced Latin square (E. J. Williams, Experimental designs balanced for the estimation of
residual effects, 1949): every loop follows every other one equally often, so none always finds the caches, or the heat,
that the same neighbour left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Loop = Callable[[], object]

Clocked = Callable[[], tuple[float, float]]
"""Has a loop run once; wall and processor time of that, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Medians over the rounds.

    Attributes:
        seconds: wall time of one run.
        ratio: of it to the base's in the same round.
        processor_seconds: of all threads of this process.
        processor_ratio: of it to the base's in the same round.
    """

    seconds: float
    ratio: float
    processor_seconds: float
    processor_ratio: float


def measure(
    loops: Mapping[str, Loop],
    rounds: int,
    *,
    bases: Mapping[str, str] | None = None,
    warm_up: int = 1,
    device: torch.device | None = None,
) -> dict[str, Times]:
    """Times loops against each other.

    Args:
        loops: by name; one run of each is one call.
        rounds: that count.
        bases: what a loop is compared with, where that is not the first loop.
        warm_up: rounds before them, which do not count.
        device: that is waited for before a clock is read.
    """
    runs = {name: clocked(loop, device) for name, loop in loops.items()}
    return compare(runs, rounds, bases=bases, warm_up=warm_up)


def compare(
    runs: Mapping[str, Clocked], rounds: int, *, bases: Mapping[str, str] | None = None, warm_up: int = 1
) -> dict[str, Times]:
    """The same for loops that are timed elsewhere."""
    first, names = next(iter(runs)), list(runs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warm_up, rounds):
        for name in order(names, round_):
            seconds = runs[name]()
            if round_ >= 0:
                wall[name].append(seconds[0])
                processor[name].append(seconds[1])
    base = {name: (bases or {}).get(name, first) for name in names}
    return {
        name: Times(
            seconds=statistics.median(wall[name]),
            ratio=_ratio(wall[name], wall[base[name]]),
            processor_seconds=statistics.median(processor[name]),
            processor_ratio=_ratio(processor[name], processor[base[name]]),
        )
        for name in names
    }


def clocked(loop: Loop, device: torch.device | None = None) -> Clocked:
    """Has the loop timed whenever it runs."""

    def run() -> tuple[float, float]:
        _wait(device)
        started = time.perf_counter(), time.process_time()
        loop()
        _wait(device)
        return time.perf_counter() - started[0], time.process_time() - started[1]

    return run


def order(names: Sequence[str], round_: int) -> list[str]:
    """Who runs when in a round: each follows each other one once in ``len(names)`` rounds, or twice in as many again.

    With an even number of names a zigzag (0, 1, -1, 2, -2, ...), moved on by one each round, does that; with an odd
    number every other round has to run backwards.
    """
    count = len(names)
    zigzag = ((place + 1) // 2 if place % 2 else -(place // 2) for place in range(count))
    turn = [names[(place + round_) % count] for place in zigzag]
    return turn[::-1] if count % 2 and round_ % 2 else turn


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))
