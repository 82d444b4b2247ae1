"""A stop that saves: a signal asks for it, an update's end agrees on it, and all leave before the next window.

Signals come to processes at different moments, and some to one of them only. So the handler sets a flag and does no
more; the flag travels in the message of the update's end, from which all processes learn of it at the same update; and
they save and leave when the body of the loop has been run for that update, on each of them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

from gradaccum.errors import StateError


class Stopped(SystemExit):
    """Ends the process with status 0, after a signal and a checkpoint; no fault that others would be told of."""


class Stopping:
    """Whether a signal has asked this run to stop, and whether all processes know.

    Args:
        signals: each takes the place of the handler that there is.
        save: what is called, on all processes, before they leave; returns whether it could save now.
        is_alone: whether there are no other processes, so that nobody has to be agreed with.

    Attributes:
        is_wanted: a signal came to this process.
        is_heard_of: a signal came to some process, and all of them have heard of it at the same update.

    Raises:
        StateError: a signal that cannot be handled, or not in this thread.
    """

    def __init__(self, signals: Sequence[int], save: Callable[[], bool], *, is_alone: bool) -> None:
        self.is_wanted = self.is_heard_of = False
        self._is_alone = is_alone
        self._save = save
        self._before: dict[int, Any] = {}
        try:
            for number in signals:
                self._before[number] = signal.signal(number, self._handle)
        except (ValueError, OSError, TypeError) as error:
            raise StateError(
                f"on_signal={signals!r} cannot be handled: {error}. A stop would not be heard of, and end the run "
                "without a checkpoint. Pass a signal such as signal.SIGTERM, or several, and make the Checkpoint in "
                "the main thread."
            ) from error

    @property
    def is_agreed(self) -> bool:
        """Whether all processes stop before their next window."""
        return self.is_heard_of or (self._is_alone and self.is_wanted)

    def leave(self) -> None:
        """Saves and ends the process, if it can save now.

        Raises:
            Stopped: when it has saved.
        """
        if self._save():
            raise Stopped(0)

    def _handle(self, number: int, frame: Any) -> None:
        self.is_wanted = True
        if number == signal.SIGINT:  # who presses Ctrl-C twice does not want to wait
            signal.signal(number, self._before[number])
