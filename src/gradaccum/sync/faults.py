"""Whose fault it was: what the others say when one process fails or dies.

A process that fails tells so where it can (`Ranks.heed`), and writes it to the process group's store before its error
goes on, for those who are inside of a collective with it. One that is killed tells nothing. Those who wait for it then
get an error of the transport ("connection closed by peer") that names neither rank nor reason; so they look into the
store, and for what is not written there, at which of the processes on their own machine are still alive.
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
_SECONDS_TO_DIE = 5.0  # between a connection that closes and the end of the process that held it
_MAX_TOLD = 1_000


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process runs, so that others can see whether it still does."""

    host: str
    pid: int

    @staticmethod
    def own() -> Whereabouts:
        """Of this process."""
        return Whereabouts(socket.gethostname(), os.getpid())

    def is_gone(self) -> bool:
        """Whether it is known to have ended; False for one on another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:  # one that has ended and that its parent has not asked about yet
            return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
        except (OSError, IndexError):
            return False


def in_words(error: BaseException) -> str:
    """One line about an error, for other processes."""
    return f"{type(error).__name__}: {error}".strip()[:_MAX_TOLD]


def is_of_transport(error: BaseException) -> bool:
    """Whether a collective has failed, inside of a model's forward or backward."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", "NCCL", "Gloo"))


def tell(rank: int, message: str) -> None:
    """Leaves in the store what went wrong here. Never raises: an error of its own is on its way."""
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
        told = _told()  # asked second: who has ended by now of what it heard itself has told before
        if told is not None and told[0] != own_rank:
            return f"rank {told[0]} failed ({told[1]})"
        if gone:
            ranks = ", ".join(map(str, gone))
            message = f"rank{'s' if len(gone) > 1 else ''} {ranks} ended without a word, as a process that is killed"
            tell(gone[0], "it ended without a word, as a process that is killed")
            return message
        if time.monotonic() > end:
            return "which one is not known: it runs on another machine, or is still alive and does something else"
        time.sleep(0.05)


def _told() -> tuple[int, str] | None:
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
