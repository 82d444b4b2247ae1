"""Whose fault it was: what the others say when one process fails or dies.

A process that fails reports it in a message where it can (`Ranks.agree`), and writes it to the process group's store
before its error goes on, for those who are inside of a collective with it. One that is killed reports nothing. Those
who wait for it get an error of the transport ("connection closed by peer") that names neither rank nor reason; so they
look into the store, and if nothing is written there, at which of the processes on their own machine are still alive.

A process whose script comes to its end while others wait for it has not been killed: it says in the store, at its exit,
how it ended. Where it held the store itself nobody can read that.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

_KEY = "gradaccum/fault"
_ENDED = "gradaccum/ended"
_KILLED = "ended without a word, as a process that is killed"
_BY = "was ended by"
_CAUSE = "that processes have unequal numbers of batches"
_UNEQUAL = f", and was not killed; the commonest cause is {_CAUSE}"
_SECONDS_TO_DIE = 5.0  # between a connection that closes and the end of the process that held it
_MAX_CHARACTERS = 1_000


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process runs, so that others can see whether it still does."""

    host: str
    pid: int
    rank: int = 0  # among all processes

    @staticmethod
    def own(rank: int = 0) -> Whereabouts:
        """Where this process runs."""
        return Whereabouts(socket.gethostname(), os.getpid(), rank)

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False for one on another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:  # a zombie: it has ended, and its parent has not asked about it yet
            return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
        except (OSError, IndexError):
            return False


def description(error: BaseException) -> str:
    """An error's type and message, cut to what other processes are sent."""
    return f"{type(error).__name__}: {error}".strip()[:_MAX_CHARACTERS]


def is_of_transport(error: BaseException) -> bool:
    """Whether an error is that of a collective, as raised inside of a model's forward or backward."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", "NCCL", "connectFullMesh"))


def report(rank: int, message: str) -> None:
    """Writes what went wrong on a process into the store. Never raises: another error is on its way already."""
    with suppress(Exception):  # the process that held the store has gone
        store = _store()
        if not store.check([_KEY]):
            store.set(_KEY, f"{rank}:{message}")


def withdraw() -> None:
    """Takes a report back of which all processes have heard: what ends some process later has another cause."""
    with suppress(Exception):
        _store().delete_key(_KEY)


def tell_of_the_end(rank: int) -> None:
    """Has this process say in the store, at its exit, how it ended: by an error, or at the end of its script."""
    try:
        store = _store().clone()  # the user may destroy the process group before; a clone keeps no server alive
    except (AttributeError, RuntimeError):  # a store of another kind
        return

    def tell() -> None:
        error = getattr(sys, "last_value", None)  # set where an exception has ended the script
        how = f"{_BY} {description(error)}" if isinstance(error, BaseException) else "came to its end"
        with suppress(Exception):  # the process that held the store may have gone
            if _answers(store):
                store.set(f"{_ENDED}/{rank}", how)

    atexit.register(tell)


def _answers(store: Any) -> bool:
    """Whether a store over TCP is still there; torch prints a page about one that is not."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not hasattr(store, "port"):
        return True
    with suppress(OSError), socket.create_connection((store.host, store.port), timeout=1.0):
        return True
    return False


def found(whereabouts: list[Whereabouts], *, own_rank: int) -> str:
    """What is known about the fault of another process, after a collective has failed here."""
    end = time.monotonic() + _SECONDS_TO_DIE
    while True:
        others = [where for where in whereabouts if where.rank != own_rank]
        gone = [where.rank for where in others if where.is_gone()]
        # Read second: a process that raised because of another's fault, and ended just now, wrote whose it was before.
        reported = _read(_KEY)
        rank, _, message = (reported or f"{own_rank}:").partition(":")
        if int(rank) in {where.rank for where in others}:
            return f"rank {rank} failed ({message})"
        ended = {where.rank: how for where in others if (how := _read(f"{_ENDED}/{where.rank}")) is not None}
        if ended:
            # Processes that are done end at the same time: first the one that an error has ended.
            rank, how = min(ended.items(), key=lambda one: (not one[1].startswith(_BY), one))
            return f"the script of rank {rank} {how}{'' if how.startswith(_BY) else _UNEQUAL}"
        if gone:
            ranks = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
            if not _is_there():
                return f"{ranks} ended, and the store with it that would say how: killed, or at the end of its script"
            report(gone[0], f"it {_KILLED}")
            return f"{ranks} {_KILLED}"
        if time.monotonic() > end:
            return (
                "which one is not known: it runs on another machine, or is still alive and does something else. The "
                f"commonest cause is {_CAUSE}"
            )
        time.sleep(0.05)


def _is_there() -> bool:
    try:
        return _answers(_store())
    except Exception:  # noqa: BLE001 - the process group has been destroyed
        return False


def _read(key: str) -> str | None:
    with suppress(Exception):
        store = _store()
        return store.get(key).decode() if store.check([key]) else None
    return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # no public name; DDP and elastic use it too
