"""The processes that train one model together, and what they exchange: messages, objects, sums.

What decides how the Python code goes on (did anybody fail, who has no data left) is exchanged between hosts, so that no
device is waited for: the default group of ``torchrun`` has gloo beside NCCL. Where a group has NCCL alone, the exchange
goes over the device, which waits for it once an update.
"""

from __future__ import annotations

import math
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
from gradaccum.sync.messages import Message, Outcome, check_fit

_OF_A_SUM = 1e-9  # float64 sums of equal numbers on unlike processors; seeds that differ do so in the first digits


class Ranks:
    """The processes between which gradients add up.

    They are one group; or several, one for each dimension of their mesh, over which sums are taken one after another.
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
        self._whereabouts: list[Whereabouts] = []

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Exchanges integers, by rank, equally many on every process."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._control)
        for group in self._groups:
            theirs = [torch.empty_like(mine) for _ in range(group.size())]
            with self._watched():
                dist.all_gather(theirs, mine, group=group)
            mine = torch.cat(theirs)
        return mine.view(self.size, len(numbers)).tolist()

    def exchange_objects(self, mine: Any) -> list[Any]:
        """Exchanges anything that can be pickled, by rank; for what is rare, since it takes two collectives."""
        everything = [mine]
        for group in self._groups:
            theirs: list[Any] = [None] * group.size()
            with self._watched():
                dist.all_gather_object(theirs, everything, group=group)
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
        self, message: Message, *, num_terms: int, num_uses: int, error: BaseException | None = None
    ) -> list[Message]:
        """Exchanges messages, by rank, and makes sure that they fit together; ``error`` is why this process failed.

        Raises:
            RankError: another process failed, and this one did not; or the messages are not for the same thing.
        """
        rows = self.exchange(message.to_numbers(num_terms=num_terms, num_uses=num_uses))
        messages = [Message.from_numbers(row, num_terms=num_terms, num_uses=num_uses) for row in rows]
        if not any(one.outcome == Outcome.FAILED for one in messages):
            check_fit(messages)
            return messages
        errors = self.exchange_objects(None if error is None else faults.description(error))
        if message.outcome != Outcome.FAILED:
            reported = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)
            raise RankError(
                f"This process (rank {self.rank} of {self.size}) is fine, and another failed. {reported}. The batch's "
                "gradient is not complete without it: no update was made on any process."
            )
        return messages

    def check_same_model(self, model: int, parameters: Sequence[Tensor]) -> None:
        """Checks, before anything else is exchanged, that all processes start from the same model and parameters.

        Compared are the checksum of a model and the parameters that every process has whole. Where each process runs
        is exchanged with them, so that `fault` can say later who is gone.

        Raises:
            RankError: the models differ, or the parameters that they start from.
        """
        comparable = [parameter for parameter in parameters if parameter.device.type != "mps"]  # mps has no float64
        checksum = sum(parameter.detach().double().sum().item() for parameter in comparable) if comparable else None
        found = self.exchange_objects((Whereabouts.own(), model, checksum))
        self._whereabouts = [whereabouts for whereabouts, _, _ in found]
        if len({theirs for _, theirs, _ in found}) > 1:
            raise RankError(
                "The processes have different models: names, shapes or dtypes of their parameters differ. Their "
                "gradients cannot be added up. Build the same model on every process."
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
        try:
            yield
        except RuntimeError as error:  # c10d's errors are RuntimeErrors of some kind; OutOfMemoryError is one too
            if isinstance(error, (torch.OutOfMemoryError, RankError)):
                raise
            raise self.fault(error) from error

    def fault(self, error: BaseException) -> RankError:
        """The error to raise after a collective has failed."""
        known = self._whereabouts
        who = faults.found(known, own_rank=self.rank) if known else "it was gone before the first update"
        return RankError(
            f"This process (rank {self.rank} of {self.size}) waited for another that does not answer: {who}. No update "
            "was made; what was saved last is where to go on from. The transport says: "
            f"{faults.description(error)[:200]}"
        )
