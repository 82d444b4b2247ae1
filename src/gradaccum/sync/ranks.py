"""The processes that train one model together, and the few things they tell each other.

What decides how the Python code goes on (did anybody fail, who has no data left) is exchanged between hosts, so that no
device is waited for: the default group of ``torchrun`` has gloo beside NCCL. Where a group has NCCL alone, the exchange
goes over the device, which waits for it once an update.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradaccum.errors import RankError
from gradaccum.sync import faults
from gradaccum.sync.faults import Whereabouts

FINE, OUT_OF_MEMORY, FAILED = 0, 1, 2
"""How it went for one process; of several the largest counts."""


def bits_of(number: float) -> int:
    """A float as the integer of its 64 bits, which travels among integers without rounding."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def number_of(bits: int) -> float:
    """The float again."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]


class Ranks:
    """The processes between which gradients add up.

    Args:
        groups: one group of all of them; or several, one for each dimension of their mesh, over which sums are taken
            one after another.
        device: where the model is.
    """

    def __init__(self, groups: Sequence[ProcessGroup], device: torch.device) -> None:
        self._groups = tuple(groups)
        self.device = device
        types = {device_type.type for group in groups for device_type in group._device_types}
        self._control = torch.device("cpu") if "cpu" in types else device
        self.size = 1
        self.rank = 0
        for group in self._groups:
            self.rank += self.size * group.rank()
            self.size *= group.size()
        self._whereabouts: list[Whereabouts] | None = None

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every process has said, by rank; each says equally many numbers.

        Raises:
            RankError: another process has gone.
        """
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._control)
        for group in self._groups:
            theirs = [torch.empty_like(mine) for _ in range(group.size())]
            with self.watched():
                dist.all_gather(theirs, mine, group=group)
            mine = torch.cat(theirs)
        return mine.view(self.size, len(numbers)).tolist()

    def exchange_objects(self, said: Any) -> list[Any]:
        """The same for anything that can be pickled; only where what is said is seldom new."""
        everything = [said]
        for group in self._groups:
            theirs: list[Any] = [None] * group.size()
            with self.watched():
                dist.all_gather_object(theirs, everything, group=group)
            everything = [one for several in theirs for one in several]
        return everything

    def add_up(self, tensor: Tensor) -> None:
        """Adds a tensor up over all processes, in place."""
        for group in self._groups:
            with self.watched():
                dist.all_reduce(tensor, group=group)

    def start_adding_up(self, tensor: Tensor) -> list[Any]:
        """The same, without waiting for the last group; what is returned has ``wait()``."""
        *before, last = self._groups
        for group in before:
            with self.watched():
                dist.all_reduce(tensor, group=group)
        with self.watched():
            return [dist.all_reduce(tensor, group=last, async_op=True)]

    def heed(self, codes: Sequence[int], code: int, error: BaseException | None = None) -> int:
        """Agrees on how it went, once all processes have said so; the largest code of all.

        Args:
            codes: of all processes, by rank: `FINE`, `OUT_OF_MEMORY` or `FAILED`.
            code: of this one.
            error: why this process failed.

        Raises:
            RankError: another process failed, and this one did not.
        """
        worst = max(codes)
        if worst == FAILED:
            messages = self.exchange_objects(None if error is None else faults.in_words(error))
            if code != FAILED:
                told = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)
                raise RankError(
                    f"This process (rank {self.rank} of {self.size}) is fine, and another failed. {told}. The batch's "
                    "gradient is not complete without it: no update was made on any process."
                )
        return worst

    def introduce(self, about: Any) -> list[Any]:
        """Has the processes know each other: exchanged once, with something to compare."""
        said = self.exchange_objects((Whereabouts.own(), about))
        self._whereabouts = [where for where, _ in said]
        return [one for _, one in said]

    def watched(self) -> _Watched:
        """While held, a collective that fails because another process has gone says which."""
        return _Watched(self)

    def fault(self, error: BaseException) -> RankError:
        """The error to raise after a collective has failed."""
        known = self._whereabouts or []
        who = faults.found(known, own_rank=self.rank) if known else "it was gone before the first update"
        return RankError(
            f"This process (rank {self.rank} of {self.size}) waited for another that does not answer: {who}. No update "
            f"was made; what was saved last is where to go on from. The transport says: {faults.in_words(error)[:200]}"
        )


class _Watched:
    """A context manager; a class, since it is entered several times an update."""

    __slots__ = ("_ranks",)

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # What c10d raises is a RuntimeError of some kind; torch.OutOfMemoryError is one too.
        if isinstance(error, RuntimeError) and not isinstance(error, (torch.OutOfMemoryError, RankError)):
            raise self._ranks.fault(error) from error
