"""Steps that all processes take together: if one of them fails in a step, all of them hear of it in that step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from gradaccum.errors import GradAccumError, StateError

Made = TypeVar("Made")
_MAX_CHARACTERS = 500


def rank_and_world_size() -> tuple[int, int]:
    """Returns this process's rank and how many there are; 0 and 1 where there is no process group."""
    has_group = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if has_group else (0, 1)


def everywhere(step: Callable[[], Made], *, doing: str) -> list[Made]:
    """Takes a step on every process, and returns what each made of it, by rank.

    Raises:
        StateError: it failed on some process; every process raises one that names it. An error of this library is
            raised as it is where it happened.
    """
    world_size = rank_and_world_size()[1]
    made: Any = None
    error: BaseException | None = None
    try:
        made = step()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failed:  # noqa: BLE001 - torch.distributed.checkpoint's errors are no Exceptions
        error = failed
    mine = (made, None if error is None else reason_of(error))
    everything: list[Any] = [mine]
    if world_size > 1:
        everything = [None] * world_size
        dist.all_gather_object(everything, mine)
    if isinstance(error, GradAccumError):
        raise error
    failures = [f"rank {other}: {reason}" for other, (_, reason) in enumerate(everything) if reason is not None]
    if failures:
        where = "; ".join(failures) if world_size > 1 else everything[0][1]
        raise StateError(f"{doing} failed: {where}. The run stands where it stood.") from error
    return [one for one, _ in everything]


def on_first(step: Callable[[], Made], *, doing: str) -> Made:
    """Takes a step on rank 0 alone, and returns on every process what it made there.

    Raises:
        StateError: see `everywhere`.
    """
    rank, _ = rank_and_world_size()
    made: Any = everywhere(lambda: step() if rank == 0 else None, doing=doing)[0]
    return made


def reason_of(error: BaseException) -> str:
    """Returns what went wrong in one line: the system's own words, where torch has put others over them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            name = "" if cause.filename is None else f" ({cause.filename})"
            return f"{cause.strerror}{name}"
        cause = cause.__cause__ or cause.__context__
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[-1 if type(error).__name__ == "CheckpointException" else 0][:_MAX_CHARACTERS]
