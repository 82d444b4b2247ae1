"""The loop of an `Accumulator`: which micro-batch it is at, when a window opens and closes, and what is left over.

What the methods do is said there. Here a pass (`looking_ahead`) tells when a micro-batch is handed out and asked for
again; between the two there is one backward. Outside of a pass the backwards themselves open and close windows.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, TypeVar

from gradaccum.losses.loss import Weight
from gradaccum.types import Update
from gradaccum.window import guards
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.compiled import any_number_of_rows
from gradaccum.window.fillers import SharedPasses
from gradaccum.window.looking_ahead import Follower, LookingAhead
from gradaccum.window.progress import PassBar
from gradaccum.window.samples import SamplesFunction, not_counted, said_samples, sample_counter
from gradaccum.window.update_windows import UpdateWindow, update_windows
from gradaccum.window.weights import WeightsFunction, totals_of_window, weights_by_name
from gradaccum.window.window_size import WindowSize

Item = TypeVar("Item")
Tail = Literal["step", "drop", "carry"]


class OwnLoop:
    """The state of a loop that stays the user's.

    Args:
        accumulation: adds up and makes updates.
        size: of the windows.
        samples: see `Accumulator`, as the others.
        tail: see there.
        weights: see there.
        progress: see there.
    """

    def __init__(
        self,
        accumulation: Accumulation,
        size: WindowSize,
        *,
        samples: SamplesFunction | None,
        tail: Tail,
        weights: WeightsFunction | None,
        progress: bool,
    ) -> None:
        self._size = size
        self._counts_samples = size.counts_samples
        self._count = sample_counter(samples)
        self._accumulation = accumulation
        self._passes = SharedPasses(self._accumulation, tail=tail, counts_ahead=weights is not None)
        self._fills = self._passes.fills
        self._any_rows = any_number_of_rows(self._accumulation.models)
        self._tail = tail
        self._weights = weights
        is_shown = accumulation.ranks is None or accumulation.ranks.is_first
        self._bar = PassBar(is_wanted=progress, is_shown=is_shown)
        self._pass: weakref.ref[LookingAhead[Any]] | None = None
        self._target = 1
        self._target_of_all: int | None = None
        self._updates_before_pass = 0
        self._data_seconds = 0.0  # what the pass had taken for reading at the update before
        # The micro-batch that over() has handed out last: rows, whether it is the last, what its means are over.
        self._samples: int | None = None
        self._counted: dict[str, Weight] | None = None
        self._is_last = self._awaits_backward = False
        # What a pass had read ahead of a bare iterator, and that iterator.
        self._unused: deque[Any] = deque()
        self._unused_of: Any = None
        # Held while a window is open outside of a pass.
        self._outside = ExitStack()

    def window_size(self, update: int) -> dict[str, int]:
        """The size of the window of an update, by the name of the option that says so."""
        return {"batch_size" if self._counts_samples else "micro_batches": self._size.at(update)}

    def over(self, micro_batches: Iterable[Item]) -> Iterator[Item]:
        """One pass; see `Accumulator.over`."""
        self._leave_pass()
        follower = Follower(
            pass_begins=self._pass_begins,
            micro_batch_begins=self._micro_batch_begins,
            micro_batch_ends=self._micro_batch_ends,
            pass_ends=self._pass_ends,
            pass_fails=self._passes.failed,
            wants_again=self._passes.wants_filler if self._fills else None,
            parameters=lambda: (one for model in self._accumulation.models for one in model.parameters()),
        )
        if isinstance(micro_batches, LookingAhead) and micro_batches.is_over:
            micro_batches = micro_batches.items
        if isinstance(micro_batches, LookingAhead) and not micro_batches.has_begun:
            shared: LookingAhead[Item] = micro_batches
            shared.join(follower)
        else:
            # What an earlier pass had read ahead of the same stream is not to be had from it again.
            ahead = self._unused if micro_batches is self._unused_of else None
            shared = LookingAhead(micro_batches, follower, ahead=ahead)
            self._unused, self._unused_of = deque(), micro_batches
        self._pass = weakref.ref(shared)
        if self._any_rows is not None:
            self._any_rows.expect_of(shared.items)
        if self._tail == "drop":
            self._size.check_length(shared.length)
        return shared

    def windows(self, micro_batches: Iterable[Item]) -> Iterator[UpdateWindow[Item]]:
        """One pass by windows; see `Accumulator.windows`."""
        return update_windows(self.over(micro_batches), self._passes, self._accumulation, self._refuse_no_backward)

    def backward(self, loss: Any, samples: int | None) -> Update | None:
        """One micro-batch's share; see `Accumulator.backward`."""
        accumulation = self._accumulation
        if not self._awaits_backward:
            self._begin_outside_of_a_pass(samples)
        elif samples is not None:
            self._samples = said_samples(samples, counted=self._samples if self._counts_samples else None)
        self._awaits_backward = False
        with self._passes.report_errors():
            if self._passes.is_filler:
                self._passes.backward_of_filler(loss)
            else:
                accumulation.add(loss, samples=self._samples, weights=self._counted)
            done = accumulation.open_samples if self._counts_samples else accumulation.open_micro_batches
            self._bar.inside(done, self._target)
            is_complete = done == self._target or (self._is_last and self._tail == "step")
            if self._fills:
                is_complete = (is_complete or self._passes.is_filler) and self._passes.closes
            return self._close() if is_complete else None

    def flush(self) -> Update | None:
        """An incomplete window; see `Accumulator.flush`."""
        if self._active_pass() is not None:
            raise guards.flush_inside()
        with self._passes.report_errors():
            return self._close() if self._accumulation.open_micro_batches else None

    def discard(self) -> int:
        """Throws the open window away; see `Accumulator.discard`."""
        self._awaits_backward = False
        self._outside.close()
        return self._accumulation.discard() if self._accumulation.is_open else 0

    def _leave_pass(self, new: LookingAhead[Any] | None = None) -> None:
        before = self._active_pass()
        if before is not None and before is not new:
            before.cut_short()
        if self._accumulation.open_micro_batches and self._tail != "carry":
            raise guards.left_open(self._accumulation.open_micro_batches)

    def _pass_begins(self, items: LookingAhead[Any]) -> AbstractContextManager[None]:
        """A pass begins: calls by hand are errors until it ends."""
        self._leave_pass(items)
        self._pass = weakref.ref(items)
        self._data_seconds = items.data_seconds
        self._updates_before_pass = self._accumulation.counts.updates
        self._outside.close()
        self._accumulation.read_all_graphs()
        return self._passes.held(self._accumulation.no_calls_by_hand())

    def _micro_batch_begins(self, micro_batch: Any, is_last: bool, items: LookingAhead[Any]) -> None:
        """A micro-batch is handed out; opens a window with it if none is open."""
        samples = self._count(micro_batch)
        accumulation = self._accumulation
        if self._any_rows is not None:
            self._any_rows.marked(micro_batch)
        if self._fills and self._passes.is_filler:
            self._samples, self._is_last, self._awaits_backward = 0, is_last, True
            self._passes.begins(completes=True)
            return
        if not accumulation.is_open:
            self._open(micro_batch, samples, items)
        if self._counts_samples:
            if samples is None:
                raise not_counted(micro_batch)
            self._size.check_fits(samples, before=accumulation.open_samples, target=self._target)
        self._samples = samples
        self._is_last = is_last
        self._counted = None if self._weights is None else weights_by_name(self._weights(micro_batch))
        self._awaits_backward = True
        if self._fills:
            before = accumulation.open_samples if self._counts_samples else accumulation.open_micro_batches
            done = before + ((samples or 0) if self._counts_samples else 1)
            self._passes.begins(completes=is_last or done == self._target)

    def _micro_batch_ends(self) -> None:
        """The next micro-batch is asked for: this one must have had its backward."""
        self._refuse_no_backward()
        self._accumulation.leave_if_agreed()

    def _refuse_no_backward(self) -> None:
        if self._awaits_backward:
            self._awaits_backward = False
            raise guards.no_backward(self._samples)

    def _pass_ends(self, completely: bool, unused: deque[Any]) -> None:
        """The pass is over: no half window stays behind in silence."""
        self._awaits_backward = False
        self._unused = unused
        self._bar.close()
        if self._tail == "carry" and self._accumulation.open_micro_batches:
            self._outside.enter_context(self._accumulation.no_calls_by_hand())
            return
        lost_samples = self._accumulation.open_samples
        lost = self._accumulation.discard() if self._accumulation.is_open else 0
        if completely:
            self._passes.finish()
        if completely and self._tail == "drop":
            if lost and self._accumulation.counts.updates == self._updates_before_pass:
                raise self._size.too_short(lost, samples=lost_samples, target=self._target)
        elif lost:
            guards.tell_lost(lost, lost_samples)

    def __del__(self) -> None:
        accumulation: Accumulation | None = getattr(self, "_accumulation", None)
        if accumulation is not None and accumulation.open_micro_batches:
            samples = accumulation.open_samples
            self._outside.close()
            guards.tell_lost(accumulation.discard(), samples, is_outside=self._pass is None)

    def _open(self, micro_batch: Any, samples: int | None, items: LookingAhead[Any]) -> None:
        target = self._target = self._size_of_next()
        totals = None
        if self._weights is not None:
            totals = totals_of_window(
                self._weights, micro_batch, items.peek, size=target, count=self._count if self._counts_samples else None
            )
        if self._counts_samples:
            share = (samples, target) if samples else (1, 1)
        else:
            share = (1, target)
        expected = self._size.expected(samples, target=target)
        if self._bar.is_due or self._accumulation.plan_line.is_due(expected.sizes):
            self._tell(expected.sizes)
        self._accumulation.clock.data = items.data_seconds - self._data_seconds
        self._accumulation.open(totals=totals, first_share=share, samples=expected.samples)

    def _tell(self, sizes: Sequence[int | None]) -> None:
        """What is to come, before the first window of these sizes."""
        current, updates = self._active_pass(), None
        if current is not None:
            updates = self._size.updates_in(current.length, len(sizes), only_complete=self._tail == "drop")
        if self._bar.is_due and current is not None:
            self._bar.begin(total=updates)
        self._accumulation.plan_line.announce(sizes, updates_per_epoch=updates, reads_loss=True)

    def _size_of_next(self) -> int:
        """Of this process's next window, in the unit it is measured in."""
        if self._target_of_all is not None:
            return self._target_of_all
        size = self._size.at(self._accumulation.counts.updates + 1)
        target = self._passes.share(size) if self._counts_samples else size
        self._target_of_all = target if self._size.is_fixed else None
        return target

    def _close(self) -> Update | None:
        current = self._active_pass()
        if current is not None:
            self._accumulation.clock.data = current.data_seconds - self._data_seconds
            self._data_seconds = current.data_seconds
        update = self._passes.close()
        self._outside.close()
        if update is not None:
            self._bar.updated(update)
        return update

    def _begin_outside_of_a_pass(self, samples: int | None) -> None:
        self._passes.refuse_outside_of_a_pass(guards.user_line)
        if self._active_pass() is not None:
            raise guards.second_backward()
        if samples is None and self._counts_samples:
            raise guards.uncounted_backward()
        self._samples = None if samples is None else said_samples(samples)
        self._is_last, self._counted = False, None
        if not self._accumulation.is_open:
            self._accumulation.leave_if_agreed()
            self._target = self._size_of_next()
        if self._counts_samples and self._samples is not None:
            self._size.check_fits(self._samples, before=self._accumulation.open_samples, target=self._target)
        if not self._accumulation.is_open:
            expected = self._size.expected(self._samples, target=self._target)
            self._accumulation.plan_line.announce(expected.sizes, reads_loss=True)
            self._accumulation.open(first_share=(1, len(expected.sizes)), samples=expected.samples)
            self._outside.enter_context(self._accumulation.no_calls_by_hand())

    def _active_pass(self) -> LookingAhead[Any] | None:
        current = self._pass() if self._pass is not None else None
        return current if current is not None and current.has_begun and not current.is_over else None
