"""Micro-batches in lockstep: one thread each, a baton so that only one runs, a meeting where they need each other.

    conductor          micro-batch 0        micro-batch 1
    go 0  ───────────▶ forward to a meeting
          ◀─────────── waits                             a round: each runs to its next meeting, or to its end,
    go 1  ────────────────────────────────▶ forward      in the batch's order
          ◀──────────────────────────────── waits
    combine what both brought
    go 0  ───────────▶ goes on with the result ...

Threads, because a forward is ordinary Python that cannot be left in the middle in any other way: generators would have
to be written by the user, greenlets are a dependency and share torch's thread-local state. Nothing runs side by side,
so nothing is raced for; a switch costs some 15 us.

Nothing waits for ever. A micro-batch waits for the conductor alone, and the conductor for the micro-batch that runs.
Whatever ends the run early (an error, Ctrl-C in the conductor) has every waiting micro-batch raise `Abandoned` where it
stands, so that its ``finally`` and ``with`` blocks run, and joins the threads.
One that is running then, which only Ctrl-C can find, goes on to its next meeting or its end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from gradaccum.errors import UnsupportedError
from gradaccum.whole_batch.lockstep.micro_batch_state import carry_thread_state


class Abandoned(BaseException):
    """Ends a micro-batch that waits, because another one has failed."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a micro-batch waits: for whom, what it brings, and what is made of it."""

    key: Any
    where: str
    mine: Any
    combine: Callable[[Sequence[Any]], Any]


Switched = Callable[[int], AbstractContextManager[None]]
"""Of state that is the process's, and that each micro-batch has for itself: the scope in which the micro-batch of an
index runs until its next meeting. It puts that state in place, and notes at its end what has become of it."""


class Member:
    """One micro-batch, and its thread."""

    def __init__(self, index: int, conductor: Conductor) -> None:
        self.index = index
        self.result: Any = None
        self.error: BaseException | None = None
        self.meeting: Meeting | None = None
        self.is_done = False
        self._conductor = conductor
        self._answer: Any = None
        # Two locks pass the baton: the conductor releases the one, the micro-batch the other.
        self._go = threading.Lock()
        self._go.acquire()
        self._has_stopped = threading.Lock()
        self._has_stopped.acquire()
        self._thread: threading.Thread | None = None

    def meet(self, key: Any, where: str, mine: Any, combine: Callable[[Sequence[Any]], Any]) -> Any:
        """Called by the micro-batch: waits for the others, and returns what `combine` made."""
        if threading.current_thread() is not self._thread:
            raise UnsupportedError(
                f"{where} was called by a thread that the loss function has started. Which micro-batch it belongs to "
                "cannot be told. Call it in the thread of the loss function."
            )
        if self._conductor.is_abandoned:
            raise Abandoned
        self.meeting = Meeting(key, where, mine, combine)
        del mine
        _release(self._has_stopped)
        self._go.acquire()
        if self._conductor.is_abandoned:
            raise Abandoned
        answer, self._answer = self._answer, None
        return answer

    def advance(self, answer: Any) -> None:
        """Called by the conductor: lets the micro-batch run to its next meeting or its end."""
        self._answer, self.meeting = answer, None
        if self._thread is None:
            name = f"gradaccum micro-batch {self.index}"
            self._thread = threading.Thread(target=self._main, name=name, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._has_stopped.acquire()

    def abandon(self) -> None:
        """Called by the conductor, when `is_abandoned` is set: wakes the micro-batch up for the last time."""
        self.meeting = None
        _release(self._go)

    def join(self) -> None:
        """Called by the conductor: waits until the thread has ended."""
        if self._thread is not None and self._thread.ident is not None:  # else Ctrl-C came before it had started
            self._thread.join()

    def _main(self) -> None:
        try:
            self.result = self._conductor.run_one(self)
        except Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the conductor
            self.error = error
        finally:
            self.is_done = True
            _release(self._has_stopped)


class Conductor:
    """Runs micro-batches in lockstep, each by ``run_one`` in its member's thread."""

    def __init__(self, device: torch.device, switched: Sequence[Switched], run_one: Callable[[Member], Any]) -> None:
        self.is_abandoned = False
        in_state = carry_thread_state(device)
        self.run_one: Callable[[Member], Any] = lambda member: in_state(lambda: run_one(member))  # in its thread
        self._switched = switched
        self._members: list[Member] = []

    def run(self, count: int) -> list[Any]:
        """Runs so many micro-batches, at least one, started in order; returns what each returned.

        Raises:
            UnsupportedError: micro-batches took different paths.
        """
        self._members = [Member(index, self) for index in range(count)]
        try:
            answer: Any = None
            while not self._members[0].is_done:
                for member in self._members:
                    self._advance(member, answer)
                answer = None  # not kept while the next one is made
                answer = self._combined()
            return [member.result for member in self._members]
        except BaseException:
            self.is_abandoned = True
            for member in self._members:  # all of them before the first is waited for: Ctrl-C may come again
                member.abandon()
            for member in self._members:
                member.join()
            self._members.clear()
            raise

    def _advance(self, member: Member, answer: Any) -> None:
        default_dtype = torch.get_default_dtype()
        with ExitStack() as held:
            for switched in self._switched:
                held.enter_context(switched(member.index))
            member.advance(answer)
        if torch.get_default_dtype() is not default_dtype and not member.is_done:
            raise UnsupportedError(
                f"The default dtype is {torch.get_default_dtype()} inside of the loss function and {default_dtype} "
                "outside, where the other micro-batches start from. It is the process's, not the micro-batch's, so "
                "they would get each other's. Set it around the training step."
            )
        if member.error is not None:
            error, member.error = member.error, None  # its traceback holds this frame
            try:
                raise error
            finally:
                del error

    def _combined(self) -> Any:
        """What all micro-batches get for what they brought to one meeting; None at the end."""
        meetings = [member.meeting for member in self._members]
        keys = [None if meeting is None else meeting.key for meeting in meetings]
        odd = next((index for index, key in enumerate(keys) if key != keys[0]), None)
        if odd is not None:
            pair = meetings[0], meetings[odd]
            first, other = ("had reached its end" if one is None else f"was at {one.where}" for one in pair)
            place = next(one.where for one in pair if one is not None)
            raise UnsupportedError(
                f"Micro-batches took different paths at {place}: micro-batch 0 {first} when micro-batch {odd} {other}. "
                "A layer over the whole batch needs all of its micro-batches, and a path that depends on the data "
                "leaves some out; the batch's statistics would be another model's. Let every micro-batch go through "
                "the same layers in the same order, with 0 rows if need be."
            )
        together = [meeting for meeting in meetings if meeting is not None]
        for member in self._members:
            member.meeting = None
        return together[0].combine([meeting.mine for meeting in together]) if together else None


def _release(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # free already: after Ctrl-C both sides let go, in whatever order
        lock.release()
