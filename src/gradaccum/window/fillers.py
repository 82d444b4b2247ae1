"""Fillers: what a process runs that has run out of data while others still have some.

Each process counts its own windows and micro-batches. One that has none left still takes part in every update, with
nothing of its own and the sum of all the others. With plain modules and DDP it only has to exchange messages and
gradients. Where every forward waits for all processes (FSDP2), it also has to run as many forwards as they do, on
fillers: a micro-batch that it has had, of this window or an earlier one, or zero rows where it never had any. The loss
of a filler is not used, and its backward starts with gradients of zero at the model's outputs.

With the whole batch in hand, how many micro-batches every process runs is agreed on when the window is opened
(`FilledRunner`). In the user's own loop only the loop can run a forward, so it is handed the last micro-batch again
(`SharedPasses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError, MisuseError, UnsupportedError
from gradaccum.losses.loss import Weight
from gradaccum.split.asked import rows_in, smallest_pieces
from gradaccum.types import Rows, Split, Update, num_rows
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.runner import Ran, Runner
from gradaccum.window.snapshot import Buffers

_NOTHING = nullcontext()


class Fillers:
    """Runs fillers on one row of a batch that this process has had."""

    def __init__(self) -> None:
        self._kept: Any = None

    def keep(self, batch: Any, split: Split) -> None:
        """Takes the smallest piece of a batch that there can be, if it has any."""
        if rows_in(split, batch):
            piece = split.cut(batch, min(smallest_pieces(split, batch), key=num_rows))
            # A clone: a view would keep the whole batch in memory.
            self._kept = tree.map_leaves(piece, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

    def run(
        self, run_one: Callable[[Any], Any], batch: Any, accumulation: Accumulation, *, then: Callable[[Any], None]
    ) -> None:
        """Runs the kept row, or the batch of zero rows where there is none, ``then`` what others wait for.

        That gets what the first returned. Buffers are put back afterwards.

        Raises:
            BatchError: there never was a row, and the model cannot run on none.
        """
        filler = tree.to_device(batch if self._kept is None else self._kept, accumulation.device())
        buffers = Buffers.of(accumulation.models)
        try:
            made = run_one(filler)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            if self._kept is not None:
                raise
            raise BatchError(
                "This process has no samples in its first batch, other processes have, and FSDP2 makes every "
                f"forward wait for all of them; but the model cannot run on zero rows ({type(error).__name__}: "
                f"{error}). Give every process at least one sample of the first batch."
            ) from error
        then(made)
        buffers.restore()


@dataclass(kw_only=True)
class FilledRunner:
    """Runs this process's micro-batches, and then fillers, until all have run as many as the process with most."""

    runner: Runner
    split: Split
    loss_of: Callable[[Any], Any]
    fillers: Fillers = field(default_factory=Fillers)

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """Runs the micro-batches of one batch; see `Runner`."""
        ranks = accumulation.ranks
        assert ranks is not None, "fillers are for processes that train together"
        count = ranks.pieces
        ranks.prepare(is_last=count == 1)

        def has_run(done: int) -> None:
            ran(done)
            ranks.prepare(is_last=done + 1 == count)

        self.runner.run(accumulation, batch, pieces, ran=has_run)
        self.fillers.keep(batch, self.split)
        for index in range(len(pieces), count):
            ranks.prepare(is_last=index + 1 == count)
            self.fillers.run(self.loss_of, batch, accumulation, then=ranks.backward_of_nothing)


class SharedPasses:
    """The passes of an accumulator beside those of other processes, if there are any.

    Raises:
        UnsupportedError: windows would be carried over the end of a pass that other processes are still in, or dropped
            after they have been reduced.
    """

    def __init__(self, accumulation: Accumulation, *, tail: str, counts_ahead: bool) -> None:
        self._accumulation = accumulation
        self._ranks = accumulation.ranks
        self._drops_incomplete = tail == "drop"
        self._no_totals: dict[str, Weight] | None = {} if counts_ahead else None
        self.fills = self._ranks is not None and self._ranks.runs_collectives  # micro-batches may be run again
        self.is_filler = False  # the present micro-batch is run again
        self.closes = True  # the open window is closed after the present micro-batch
        self._is_complete = False
        self.last_update: Update | None = None
        self.ends_by_itself = True  # windows of others are made at a pass's end, and not one by one by who asks
        if self._ranks is not None and tail == "carry":
            raise UnsupportedError(
                'tail="carry" with several processes: what one carries into the next pass belongs to a window that '
                'others may have closed. Use tail="step" or "drop".'
            )
        if self.fills and tail == "drop":
            raise UnsupportedError(
                'tail="drop" with FSDP2: what is dropped has been reduced already, micro-batch by micro-batch. Use '
                'tail="step", or let every loader drop its last ones.'
            )

    def share(self, batch_size: int) -> int:
        """How many samples of a batch this process passes: as many as the others, or one more or less."""
        if self._ranks is None:
            return batch_size
        size, rank = self._ranks.ranks.size, self._ranks.ranks.rank
        share = batch_size // size + (rank < batch_size % size)
        if not share:
            raise UnsupportedError(
                f"batch_size={batch_size} is fewer than {size} processes, so that this one (rank {rank}) never has a "
                "sample of a batch. Use fewer processes, a larger batch, or micro_batches=."
            )
        return share

    @contextmanager
    def held(self, watched: AbstractContextManager[None]) -> Iterator[None]:
        """Context manager for a pass, around ``watched``."""
        self.is_filler, self._is_complete, self.closes = False, False, not self.fills
        if self._ranks is not None:
            self._ranks.passes += 1
        with watched, nullcontext() if self._ranks is None else self._ranks.taken_over():
            yield

    def report_errors(self) -> AbstractContextManager[None]:
        """Context manager in which other processes hear of an error here."""
        return _NOTHING if self._ranks is None else self._ranks.report_errors()

    def failed(self, error: BaseException) -> None:
        """Tells the others of an error between two micro-batches: where all of them read messages."""
        if self._ranks is not None:
            self._ranks.tell(error, is_between=True)

    def begins(self, *, completes: bool) -> None:
        """Called before the forward of a micro-batch, which is this process's last in the window or not."""
        if self._ranks is None or not self.fills:
            return
        self._is_complete = completes or self.is_filler
        self.closes = self._ranks.all_complete(self._is_complete)
        self._ranks.prepare(is_last=self.closes)

    def backward_of_filler(self, loss: Any) -> None:
        """Runs in place of a filler's own backward."""
        if self._ranks is not None:
            self._ranks.backward_of_nothing(loss)

    def wants_filler(self, is_exhausted: bool, has_any: bool) -> bool:
        """Whether the micro-batch before, if there is any, is handed out again; asked before the next one is taken."""
        self.is_filler = False
        if self._ranks is None or not self.fills:
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
        if self._ranks is not None and self._ranks.is_wrapped:
            raise MisuseError(
                f"backward() was called at {user_line()}, outside of over() or a second time for one micro-batch, for "
                "a model that is wrapped for several processes. Its forward has told the wrapper to reduce this "
                "micro-batch by itself. Take the micro-batches from accumulator.over(loader)."
            )

    def close(self) -> Update | None:
        """The update of the open window; None where other processes had no more, and it is dropped."""
        self._is_complete = False
        self.last_update = self._accumulation.close_with_others(drops_incomplete=self._drops_incomplete)
        return self.last_update

    def finish(self) -> None:
        """Called after a pass: takes part in what the others still have to do."""
        while self.ends_by_itself and self.take_part():
            pass

    def take_part(self) -> bool:
        """Takes part in one window of others, after this process's own; whether there was one.

        With fillers none is left: the last of them was run when all were done.
        """
        if self._ranks is None or self.fills:
            return False
        self._accumulation.leave_if_agreed()
        with self._ranks.report_errors():
            self._accumulation.open(totals=self._no_totals, is_done=True)
            self.last_update = self._accumulation.close_with_others(
                is_done=True, drops_incomplete=self._drops_incomplete
            )
        return not self._ranks.all_are_done
