"""Whose fault it was: what the others say when one process fails or dies.

A process that fails reports it in a message where it can (`Ranks.agree`), and writes it to the process group's store
before its error goes on, for those who are inside of a collective with it. One that is killed reports nothing. Those
who wait for it get an error of the transport ("connection closed by peer") that names neither rank nor reason; so they
look into the store, and if nothing is written there, at which of the processes on their own machine are still alive.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

_KEY = "gradaccum/fault"
_KILLED = "ended without a word, as a process that is killed"
_SECONDS_TO_DIE = 5.0  # between a connection that closes and the end of the process that held it
_MAX_CHARACTERS = 1_000


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process runs, so that others can see whether it still does."""

    host: str
    pid: int

    @staticmethod
    def own() -> Whereabouts:
        """Where this process runs."""
        return Whereabouts(socket.gethostname(), os.getpid())

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
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", "NCCL", "Gloo"))


def report(rank: int, message: str) -> None:
    """Writes what went wrong on a process into the store. Never raises: another error is on its way already."""
    try:
        store = _store()
        if not store.check([_KEY]):
            store.set(_KEY, f"{rank}:{message}")
    except Exception:  # noqa: BLE001 - the process that held the store has gone
        return


def found(whereabouts: list[Whereabouts], *, own_rank: int) -> str:
    """What is known about the fault of another process, after a collective has failed here."""
    end = time.monotonic() + _SECONDS_TO_DIE
    while True:
        gone = [rank for rank, where in enumerate(whereabouts) if rank != own_rank and where.is_gone()]
        # Read second: a process that raised because of another's fault, and ended just now, wrote whose it was before.
        reported = _reported()
        if reported is not None and reported[0] != own_rank:
            return f"rank {reported[0]} failed ({reported[1]})"
        if gone:
            ranks = ", ".join(map(str, gone))
            report(gone[0], f"it {_KILLED}")
            return f"rank{'s' if len(gone) > 1 else ''} {ranks} {_KILLED}"
        if time.monotonic() > end:
            return "which one is not known: it runs on another machine, or is still alive and does something else"
        time.sleep(0.05)


def _reported() -> tuple[int, str] | None:
    try:
        store = _store()
        if not store.check([_KEY]):
            return None
        rank, _, message = store.get(_KEY).decode().partition(":")
        return int(rank), message
    except Exception:  # noqa: BLE001 - the process that held the store has gone
        return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # no public name; DDP and elastic use it too
