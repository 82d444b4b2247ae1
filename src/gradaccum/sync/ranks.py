"""The processes that train one model together, and what they exchange: messages, objects, sums.

What decides how the Python code goes on (did anybody fail, who has no data left) is exchanged between hosts, in a group
of the library's own (see `own_group`), so that no device is waited for and nothing is paired with a collective of the
user's. Gradients, outputs and statistics go through the user's group, and only right after messages that agreed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradaccum.errors import RankError
from gradaccum.sync import faults
from gradaccum.sync.faults import Whereabouts
from gradaccum.sync.messages import PREFIX, Kind, Message, Outcome, check_fit
from gradaccum.sync.own_group import own_group

logger = logging.getLogger("gradaccum")
_OF_A_SUM = 1e-9  # float64 sums of equal numbers on unlike processors; seeds that differ do so in the first digits


def name_rank(record: logging.LogRecord) -> bool:
    """Begins a line of the library's log with the rank of the process, where there are several."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        record.msg = f"rank {dist.get_rank()}: {record.msg}"
    return True


class Ranks:
    """The processes between which gradients add up.

    They are one group; or several, one for each dimension of their mesh, over which sums are taken one after another.

    Args:
        groups: see above.
        device: where tensors to be added up lie.
        timeout: seconds that a message may wait for another process; None for what the groups have.

    Attributes:
        furthest_pass: the largest number of passes over a loader in the messages that were exchanged last.
        waited: seconds in collectives so far, those of an engine's own aside.
        reported: who has failed, and how, by the same messages.
    """

    def __init__(self, groups: Sequence[ProcessGroup], device: torch.device, timeout: float | None = None) -> None:
        self._groups = tuple(groups)
        self.device = device
        self._timeout = timeout
        self.name = dist.get_rank()  # among all processes, as users know them
        self.size = 1
        self.rank = 0
        for group in self._groups:
            self.rank += self.size * group.rank()
            self.size *= group.size()
        self.furthest_pass, self.reported = 0, ""
        self.waited = 0.0
        self._whereabouts: list[Whereabouts] = []
        logger.addFilter(name_rank)  # once, however many there are

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Exchanges integers, by rank, equally many on every process."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        for own in self._own_groups():
            has_hosts = any(device_type.type == "cpu" for device_type in own._device_types)
            mine = mine if has_hosts else mine.to(self.device)
            theirs = [torch.empty_like(mine) for _ in range(own.size())]
            with self._watched():
                dist.all_gather(theirs, mine, group=own)
            mine = torch.cat(theirs)
        return mine.view(self.size, len(numbers)).tolist()

    def exchange_objects(self, mine: Any) -> list[Any]:
        """Exchanges anything that can be pickled, by rank; for what is rare, since it takes two collectives."""
        everything = [mine]
        for own in self._own_groups():
            theirs: list[Any] = [None] * own.size()
            with self._watched():
                dist.all_gather_object(theirs, everything, group=own)
            everything = [one for several in theirs for one in several]
        return everything

    def add_up(self, tensor: Tensor) -> None:
        """Adds a tensor up over all processes, in place."""
        self.start_adding_up(tensor)()

    def start_adding_up(self, tensor: Tensor) -> Callable[[], None]:
        """Starts `add_up`; what is returned waits for the last group, the groups before are waited for here."""
        *before, last = self._groups
        for group in before:
            with self._watched():
                dist.all_reduce(tensor, group=group)
        with self._watched():
            work: Any = dist.all_reduce(tensor, group=last, async_op=True)

        def wait() -> None:
            with self._watched():
                work.wait()

        return wait

    def agree(
        self, message: Message, *, num_terms: int = 0, num_uses: int = 0, error: BaseException | None = None
    ) -> list[Message]:
        """Exchanges messages, by rank, and makes sure that they fit together; ``error`` is why this process failed.

        Raises:
            RankError: another process failed, and this one did not; or the messages are not for the same thing.
        """
        numbers = message.to_numbers(num_terms=num_terms, num_uses=num_uses)
        rows = self.exchange(numbers[:PREFIX])
        headers = [Message.from_numbers(row, num_terms=0, num_uses=0) for row in rows]
        self.reported = ""
        self.furthest_pass = max(header.passes for header in headers)
        if not any(header.outcome == Outcome.FAILED for header in headers):
            check_fit(headers)
            if not (num_terms or num_uses):
                return headers
            if len(numbers) > PREFIX:
                rows = [row + rest for row, rest in zip(rows, self.exchange(numbers[PREFIX:]), strict=True)]
            return [Message.from_numbers(row, num_terms=num_terms, num_uses=num_uses) for row in rows]
        errors = self.exchange_objects(None if error is None else faults.description(error))
        failed = [(header.sender, text) for header, text in zip(headers, errors, strict=True) if text]
        self.reported = "; ".join(f"rank {sender}: {text}" for sender, text in failed)
        if message.outcome != Outcome.FAILED:
            raise RankError(
                f"This process (rank {self.name}) is fine, and another failed. {self.reported}. "
                f"{_what_became_of(message, ', '.join(str(sender) for sender, _ in failed))}"
            )
        return headers

    def check_same_model(self, model: int, parameters: Sequence[Tensor]) -> None:
        """Checks, before anything else is exchanged, that all processes start from the same model and parameters.

        Compared are the checksum of a model and the parameters that every process has whole. Where each process runs
        is exchanged with them, so that `fault` can say later who is gone.

        Raises:
            RankError: the models differ, or the parameters that they start from.
        """
        comparable = [parameter for parameter in parameters if parameter.device.type != "mps"]  # mps has no float64
        checksum = sum(_own_sum(parameter) for parameter in comparable) if comparable else None
        found = self.exchange_objects((Whereabouts.own(self.name), model, checksum))
        self._whereabouts = [whereabouts for whereabouts, _, _ in found]
        if len({theirs for _, theirs, _ in found}) > 1:
            raise RankError(
                "The processes have different models: names, shapes or dtypes of their parameters differ. Their "
                "gradients cannot be added up. Build the same model on every process; where there are several, begin "
                "with the same."
            )
        known = [one for _, _, one in found if one is not None and math.isfinite(one)]
        if known and max(known) - min(known) > _OF_A_SUM * (1 + max(map(abs, known))):
            shown = ", ".join(f"{one:.6g}" for one in known[:4])
            raise RankError(
                f"The processes start from different parameters (they add up to {shown}, ...), so each would go on "
                "with a model of its own, whatever their gradients. Call torch.manual_seed with the same number on "
                "every process before the model is made, or wrap it in DistributedDataParallel, which hands out rank "
                "0's."
            )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Context manager in which a collective that fails because another process has gone says which one."""
        since = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # c10d's errors are RuntimeErrors of some kind; OutOfMemoryError is one too
            if isinstance(error, (torch.OutOfMemoryError, RankError)):
                raise
            raise self.fault(error) from error
        finally:
            self.waited += time.perf_counter() - since

    def fault(self, error: BaseException) -> RankError:
        """The error to raise after a collective has failed."""
        known = self._whereabouts
        who = faults.found(known, own_rank=self.name) if known else "it was gone before the first update"
        return RankError(
            f"This process (rank {self.name}) waited for another that does not answer: {who}. What was saved last is "
            f"where to go on from. The transport says: {faults.description(error)[:200]}"
        )

    def _own_groups(self) -> list[ProcessGroup]:
        with self._watched():
            return [own_group(group, self._timeout) for group in self._groups]


def _own_sum(parameter: Tensor) -> float:
    """What a parameter adds up to; with tensor parallelism this process's part of it."""
    own: Any = parameter.detach()
    return (own.to_local() if hasattr(own, "to_local") else own).double().sum().item()


def _what_became_of(message: Message, failed: str) -> str:
    """What the failure of another process means for one that is fine, by where that one is."""
    if message.kind in (Kind.SAVING, Kind.LOADING):
        return f"Nothing was {'saved' if message.kind == Kind.SAVING else 'loaded'} here."
    if message.kind == Kind.STEPPED:
        return (
            f"Update {message.update} has been made on this process, and failed on rank {failed}, in the optimizer, "
            "the scheduler or before_step: from here on their parameters may differ. End the run, and go on from what "
            "was saved last."
        )
    return "The batch's gradient is not complete without it: no update was made on any process."
