"""Steps that all processes take together: if one of them fails in a step, all of them hear of it in that step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gradaccum.errors import GradAccumError, StateError
from gradaccum.sync.messages import Caller, Kind, Message, Outcome
from gradaccum.sync.ranks import Ranks

Made = TypeVar("Made")
_MAX_CHARACTERS = 500


class Together:
    """The processes that save and load together: those of the step, or all where no step says otherwise.

    Each step begins with a message of the library's own, so that a process which is somewhere else (in an update, say)
    is told, and tells this one.

    Args:
        of_step: the processes that train together with this one; None to find them.
        updates: how many updates there were when saving or loading began.
    """

    def __init__(self, of_step: Ranks | None, *, updates: int, kind: Kind = Kind.SAVING) -> None:
        has_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._ranks = of_step
        if has_group and of_step is None:
            world = dist.group.WORLD
            assert world is not None
            self._ranks = Ranks((world,), torch.device("cpu"))
        self._header = Message(Outcome.FINE, kind, updates, 0, Caller.CHECKPOINT, dist.get_rank() if has_group else 0)
        self.rank, self.size = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.size)

    def everywhere(self, step: Callable[[], Made], *, doing: str) -> list[Made]:
        """Takes a step on every process, and returns what each made of it, by rank.

        Raises:
            RankError: another process does something else, and is told so too.
            StateError: it failed on some process; every process raises one that names it. An error of this library is
                raised as it is where it happened.
        """
        made: Any = None
        error: BaseException | None = None
        try:
            made = step()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as failed:  # noqa: BLE001 - torch.distributed.checkpoint's errors are no Exceptions
            error = failed
        mine = (self._header.sender, made, None if error is None else reason_of(error))
        everything: list[Any] = [mine]
        if self._ranks is not None:
            self._ranks.agree(self._header)
            everything = self._ranks.exchange_objects(mine)
        if isinstance(error, GradAccumError):
            raise error
        failures = [f"rank {other}: {reason}" for other, _, reason in everything if reason is not None]
        if failures:
            where = "; ".join(failures) if self._ranks is not None else everything[0][2]
            raise StateError(f"{doing} failed: {where}. The run stands where it stood.") from error
        return [one for _, one, _ in everything]

    def on_first(self, step: Callable[[], Made], *, doing: str) -> Made:
        """Takes a step on the first process alone, and returns on every process what it made there.

        Raises:
            StateError: see `everywhere`.
        """
        made: Any = self.everywhere(lambda: step() if self.rank == 0 else None, doing=doing)[0]
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
