"""How much of a loop's time is spent in the library's own Python, torch's operations not counted."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

from _timing import Loop

import gradaccum as ga

LIBRARY = str(Path(ga.__file__).parent)


def own_share(loop: Loop) -> float:
    """The share of one run, after one that warms up. The profiler makes Python slower, so the true share is smaller."""
    loop()
    profile = cProfile.Profile()
    profile.runcall(loop)
    # Of each function its own time: without what it calls, which is torch's unless it is counted by itself.
    times = {place: of[2] for place, of in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    return sum(time for (file, _, _), time in times.items() if file.startswith(LIBRARY)) / sum(times.values())
