"""Where the time of an update went: into data, into waiting for other processes, or into computing.

A straggler is found by it: the process with the fewest seconds of waiting is the one that the others wait for, and its
other two numbers say why. A clock is read when a window opens and when it closes, and by a pass round each reading of
its loader. On a GPU kernels run behind: what waits for the device counts where it waits.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds of one update; see `Update`."""

    seconds: float
    data_seconds: float | None
    compute_seconds: float
    waiting_seconds: float


class Seconds:
    """The clock of windows, one after another.

    Attributes:
        data: seconds that went into data since the update before, as far as they are known; None where nothing is.
    """

    def __init__(self) -> None:
        self.data: float | None = None
        self._ended: float | None = None
        self._started = self._data = self._waited = 0.0

    def called(self) -> None:
        """A batch is there: what has passed since the update before went into it."""
        if self._ended is not None:
            self.data = time.perf_counter() - self._ended

    def opened(self, *, waited: float) -> None:
        """A window begins; so many seconds have been waited so far."""
        self._started, self._waited, self._data = time.perf_counter(), waited, self.data or 0.0

    def closed(self, *, waited: float) -> Spent:
        """The update has been made."""
        now = time.perf_counter()
        seconds, waiting = now - self._started, waited - self._waited
        inside = (self.data or 0.0) - self._data  # what a loader took since the window was opened
        spent = Spent(seconds, self.data, max(0.0, seconds - waiting - inside), waiting)
        self.data, self._ended = None, now
        return spent
