"""An accumulator's passes beside those of other processes: whoever runs out of data still takes part.

Each process counts its own windows. One whose pass has ended while others go on makes their updates with them, from
inside of ``over()``: nothing of its own, the sum of all the others. Where every forward waits for all (FSDP2), it also
has to run forwards, which only the user's loop can do: then its last micro-batch is handed out again, as a filler whose
backward starts with zeros; and so it is inside of a window in which others have more micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from gradaccum.errors import BatchError, MisuseError, UnsupportedError
from gradaccum.losses.loss import Weight
from gradaccum.types import Update
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.over_ranks import OverRanks


class Alone:
    """No other processes: nothing to do, at no cost.

    Attributes:
        close: makes the update of the open window.
    """

    fills = False
    is_filler = False
    closes = True

    def __init__(self, accumulation: Accumulation) -> None:
        self.close: Callable[[], Update | None] = accumulation.close_with_others

    def share(self, batch_size: int) -> int:
        """How many samples of a batch this process passes."""
        return batch_size

    def held(self, watched: AbstractContextManager[None]) -> AbstractContextManager[Any]:
        """What is held while a pass runs."""
        return watched

    def begins(self, *, completes: bool) -> None:
        """A micro-batch is handed out."""

    def backward_of_filler(self) -> None:
        """There are no fillers."""

    def wants_filler(self, is_exhausted: bool, has_any: bool) -> bool:
        """Whether the micro-batch before is to be handed out again."""
        return False

    def refuse_outside_of_a_pass(self, user_line: Callable[[], str]) -> None:
        """Nothing is refused."""

    def finish(self) -> None:
        """After a pass."""


class Together:
    """This process among several.

    Args:
        accumulation: whose windows are closed.
        ranks: the processes.
        drops_incomplete: whether a window to which some process has nothing to add is thrown away.
        counts_ahead: whether the totals of windows are counted before they begin.

    Attributes:
        fills: whether others may have to be waited for by running a micro-batch again.
        is_filler: whether the present micro-batch is one that has been run already.
        closes: whether the open window is closed after the present micro-batch.
    """

    def __init__(
        self, accumulation: Accumulation, ranks: OverRanks, *, drops_incomplete: bool, counts_ahead: bool
    ) -> None:
        self._accumulation = accumulation
        self._ranks = ranks
        self._drops_incomplete = drops_incomplete
        self._no_totals: dict[str, Weight] | None = {} if counts_ahead else None
        self.fills = ranks.runs_collectives
        self.is_filler = False
        self.closes = True
        self._is_complete = False

    def share(self, batch_size: int) -> int:
        """How many samples of a batch this process passes: as many as the others, or one more or less."""
        size, rank = self._ranks.ranks.size, self._ranks.ranks.rank
        share = batch_size // size + (rank < batch_size % size)
        if not share:
            raise UnsupportedError(
                f"batch_size={batch_size} is fewer than {size} processes, so that this one (rank {rank}) never has a "
                "sample of a batch. Use fewer processes, a larger batch, or micro_batches=."
            )
        return share

    def held(self, watched: AbstractContextManager[None]) -> AbstractContextManager[Any]:
        """What is held while a pass runs."""
        self.is_filler, self._is_complete, self.closes = False, False, not self.fills
        held = ExitStack()
        held.enter_context(watched)
        try:
            held.enter_context(self._ranks.taken_over())
        except BaseException:
            held.close()
            raise
        return held.pop_all()

    def begins(self, *, completes: bool) -> None:
        """A micro-batch is handed out; its forward is next.

        Args:
            completes: whether it is the last of this process's in the window; a filler always is.
        """
        if not self.fills:
            return
        self._is_complete = completes or self.is_filler
        self.closes = self._ranks.all_complete(self._is_complete)
        self._ranks.prepare(is_last=self.closes)

    def backward_of_filler(self) -> None:
        """In place of a filler's own backward."""
        self._ranks.backward_of_nothing()

    def wants_filler(self, is_exhausted: bool, has_any: bool) -> bool:
        """Whether the micro-batch before is to be handed out again, asked before the next one is taken.

        Args:
            is_exhausted: whether there is no next one.
            has_any: whether there was one before.
        """
        self.is_filler = False
        if not self.fills:
            return False
        if self._accumulation.is_open:
            self.is_filler = self._is_complete
        elif is_exhausted:
            self._accumulation.open(totals=self._no_totals, is_done=True)
            self.is_filler = not self._ranks.all_are_done
            if not self.is_filler:
                self._accumulation.discard()
            elif not has_any:
                raise BatchError(
                    "This process has no micro-batch in its pass, others have, and FSDP2 makes every forward wait for "
                    "all processes. Give every process at least one micro-batch a pass."
                )
        return self.is_filler

    def refuse_outside_of_a_pass(self, user_line: Callable[[], str]) -> None:
        """Refuses backwards whose forwards have gone through a wrapper that was not taken over.

        Raises:
            MisuseError: the model is wrapped.
        """
        if self._ranks.is_wrapped:
            raise MisuseError(
                f"backward() was called at {user_line()}, outside of over() or a second time for one micro-batch, for "
                "a model that is wrapped for several processes. Its forward has told the wrapper to reduce this "
                "micro-batch by itself. Take the micro-batches from accumulator.over(loader)."
            )

    def close(self) -> Update | None:
        """The update of the open window; None where others had no more, and it is dropped."""
        self._is_complete = False
        return self._accumulation.close_with_others(drops_incomplete=self._drops_incomplete)

    def finish(self) -> None:
        """After a pass: takes part in what the others still have to do."""
        is_over = self.fills
        while not is_over:
            self._accumulation.open(totals=self._no_totals, is_done=True)
            self._accumulation.close_with_others(is_done=True, drops_incomplete=self._drops_incomplete)
            is_over = self._ranks.all_are_done


def together(accumulation: Accumulation, *, tail: str, counts_ahead: bool) -> Together | Alone:
    """Whoever trains together with this process.

    Raises:
        UnsupportedError: windows would be carried over the end of a pass that other processes are still in.
    """
    if accumulation.ranks is None:
        return Alone(accumulation)
    if tail == "carry":
        raise UnsupportedError(
            'tail="carry" with several processes: what one carries into the next pass belongs to a window that others '
            'may have closed. Use tail="step" or "drop".'
        )
    if tail == "drop" and accumulation.ranks.runs_collectives:
        raise UnsupportedError(
            'tail="drop" with FSDP2: what is dropped has been reduced already, micro-batch by micro-batch. Use '
            'tail="step", or let every loader drop its last ones.'
        )
    return Together(accumulation, accumulation.ranks, drops_incomplete=tail == "drop", counts_ahead=counts_ahead)
