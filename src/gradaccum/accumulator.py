"""Your own loop: the loader yields micro-batches, the accumulator makes the updates."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.gradients.fused.choice import FusedOption
from gradaccum.gradients.given_backward import BackwardFunction
from gradaccum.losses.loss import Weight
from gradaccum.sync.detect import Sync
from gradaccum.types import Update
from gradaccum.window import guards
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.compiled import any_number_of_rows
from gradaccum.window.fillers import SharedPasses
from gradaccum.window.looking_ahead import Follower, LookingAhead
from gradaccum.window.option_names import COUNTS, check_function, explains_arguments
from gradaccum.window.options import Options
from gradaccum.window.parameters import refuse_closures
from gradaccum.window.progress import PassBar
from gradaccum.window.run_counts import HasCounts
from gradaccum.window.samples import SamplesFunction, not_counted, said_samples, sample_counter
from gradaccum.window.weights import WeightsFunction, totals_of_window, weights_by_name
from gradaccum.window.window_size import Schedule, WindowSize, check_tail

Item = TypeVar("Item")
Tail = Literal["step", "drop", "carry"]


class Accumulator(HasCounts):
    """Makes one exact update from several micro-batches of a loop that stays yours.

    Exactly one of ``batch_size`` and ``micro_batches`` says how long a window is; either may be a function of the
    update it is for (1, 2, ...), to change it while training.

    Args:
        model: one module or a sequence of them. Only their parameters get gradients.
        optimizer: one optimizer or a sequence of them, of the models' parameters.
        micro_batches: how many of the loader's micro-batches make an update.
        batch_size: how many samples make an update; the micro-batches must add up to it, but for the last ones.
        samples: ``samples(micro_batch)`` returns how many samples it has. Needed where they cannot be seen (lists of
            tensors, packed sequences, parts of unlike length) and ``batch_size`` or a plain loss counts them.
        tail: what becomes of an incomplete last window: applied with its true weight ("step"), thrown away ("drop"),
            or continued by the next pass ("carry").
        weights: ``weights(micro_batch)`` counts what the means of the loss are taken over: a number for one loss, a
            dict by name for several terms. Then ``over()`` reads a window ahead to know the totals, and holds it.
        clip_norm: largest 2-norm of the whole gradient, over all models; None to not clip.
        scheduler: a learning-rate scheduler or a sequence of them, advanced once for each update made.
        scaler: ``torch.amp.GradScaler`` for fp16, shared or not. `backward` takes the loss, not ``scaler.scale(loss)``.
        before_step: called without arguments once an update, right before the optimizer, when ``.grad`` holds the
            batch's own gradient, normalised, unscaled and clipped: for clipping by value, logging and changes. Step
            pre-hooks of the optimizer see the same.
        fused: whether weight gradients are added up in place, by one GEMM with beta = 1 and no temporary: "auto" where
            it pays, True wherever it is right, False nowhere. The sum is the same.
        accumulate_dtype: ``torch.float32`` adds the gradients of bf16 and fp16 parameters up in fp32, rounded once when
            the optimizer takes them; None in their own dtype, which loses 2% of them at 256 micro-batches.
        persistent_gradients: gradients keep their memory from window to window: for backwards that are replayed CUDA
            graphs (``torch.compile(mode="reduce-overhead")``), where torch is silently wrong without it.
        progress: a bar counted in updates for each pass, which also moves inside a window.
        sync: when gradients are added up over processes: "auto" for what costs no memory (once an update; in every
            backward for FSDP2), "last" for once an update, "every", or "never" to train for itself. ``batch_size``
            counts the samples of all processes, of which each passes an even share.
        backward: what runs each micro-batch's backward, where that is not torch's own: ``accelerator.backward``,
            ``fabric.backward``, a function. It is called ``backward(root, gradient=seed)``, once a micro-batch, and
            must end in ``root.backward(gradient=seed)``; several terms are joined to one root. What it divides or
            multiplies the root by on the way is undone, a loss scale too: that one belongs into ``scaler``. Gradients
            are not added up in place then.

    Raises:
        ParameterError: optimizer and model do not belong together, nothing is trainable, or an option is no option.
        WindowError: sizes below 1, both sizes or none, or an unknown tail.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(
        ...     torch.utils.data.TensorDataset(torch.randn(23, 3), torch.randn(23, 1)), batch_size=5
        ... )
        >>> accumulator = ga.Accumulator(model, optimizer, batch_size=10)
        >>> for x, y in accumulator.over(loader):
        ...     update = accumulator.backward(F.mse_loss(model(x), y))
        ...     if update:
        ...         print(update.index, update.samples)
        1 10
        2 10
        3 3
    """

    @explains_arguments("Write batch_size={0}, a number of samples, or micro_batches={0}, of the loader's items.")
    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        micro_batches: Schedule | None = None,
        batch_size: Schedule | None = None,
        samples: SamplesFunction | None = None,
        tail: Tail = "step",
        weights: WeightsFunction | None = None,
        clip_norm: float | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        before_step: Callable[[], Any] | None = None,
        fused: FusedOption = "auto",
        accumulate_dtype: torch.dtype | None = None,
        persistent_gradients: bool = False,
        progress: bool = False,
        sync: Sync = "auto",
        backward: BackwardFunction | None = None,
    ) -> None:
        self._size = WindowSize(micro_batches, batch_size)
        self._counts_samples = self._size.counts_samples
        check_function("weights", weights, COUNTS)
        self._count = sample_counter(samples)
        check_tail(tail, has_weights=weights is not None)
        options = Options(
            clip_norm=clip_norm,
            scheduler=scheduler,
            scaler=scaler,
            before_step=before_step,
            fused=fused,
            accumulate_dtype=accumulate_dtype,
            persistent_gradients=persistent_gradients,
            sync=sync,
            backward=backward,
        )
        self._accumulation = Accumulation(model, optimizer, options, warns_of_unknown=True)
        self._counts = self._accumulation.counts
        self._passes = SharedPasses(self._accumulation, tail=tail, counts_ahead=weights is not None)
        self._fills = self._passes.fills
        refuse_closures(self._accumulation.optimizers)
        self._any_rows = any_number_of_rows(self._accumulation.models)
        self._tail, self._weights = tail, weights
        self._bar = PassBar(is_wanted=progress)
        self._pass: weakref.ref[LookingAhead[Any]] | None = None
        self._target_of_all: int | None = None
        self._target, self._updates_before_pass = 1, 0
        # The micro-batch that over() has handed out last: rows, whether it is the last, what its means are over.
        self._samples: int | None = None
        self._counted: dict[str, Weight] | None = None
        self._is_last = self._awaits_backward = False
        # What a pass had read ahead of a bare iterator, and that iterator.
        self._unused: deque[Any] = deque()
        self._unused_of: Any = None
        # Held while a window is open outside of a pass.
        self._outside = ExitStack()

    def over(self, micro_batches: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches of one pass, as the loader yields them; knows one ahead which is the last.

        Leaving the loop early discards a half window, with a warning. A loop over a pass that has ended is a new pass
        over the same loader. One item is read ahead, so a loader must neither fill the memory of an item again with the
        next nor compute its items with the model: both are errors. To have two accumulators follow one pass, hand
        the pass of the one to the other: ``discriminator.over(generator.over(loader))``.

        Args:
            micro_batches: a ``DataLoader`` or any iterable, with a length or without.

        Raises:
            MisuseError: a window that was begun outside of a pass is still open. In the loop: the loader cannot be read
                ahead, or the pass was ended by another one.
            WindowError: with ``tail="drop"`` the pass is too short for a single window.
        """
        self._leave_pass()
        follower = Follower(
            pass_begins=self._pass_begins,
            micro_batch_begins=self._micro_batch_begins,
            micro_batch_ends=self._micro_batch_ends,
            pass_ends=self._pass_ends,
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

    def backward(self, loss: Any, *, samples: int | None = None) -> Update | None:
        """Adds the micro-batch's share to the gradient; makes the update when the window is complete.

        Outside of a pass, ``samples`` says what a plain loss or ``batch_size`` needs to know, and an incomplete last
        window is closed by `flush`.

        Args:
            loss: `Loss`; or a 0-d tensor, the mean over the micro-batch's samples; or a dict of these by name.
            samples: how many samples the micro-batch has, outside of a pass; in one, `over` has counted them.

        Returns:
            None inside a window; the update when this was its last micro-batch.

        Raises:
            LossError: not a scalar, no graph, or a mean whose weight is unknown. The window is discarded.
            MisuseError: called twice for a micro-batch, or its gradients were changed by hand.
        """
        accumulation = self._accumulation
        if not self._awaits_backward:
            self._begin_outside_of_a_pass(samples)
        elif samples is not None:
            self._samples = said_samples(samples, counted=self._samples if self._counts_samples else None)
        self._awaits_backward = False
        if accumulation.ranks is None:
            accumulation.add(loss, samples=self._samples, weights=self._counted)
        else:
            with accumulation.ranks.report_errors():
                if self._passes.is_filler:
                    self._passes.backward_of_filler()
                else:
                    accumulation.add(loss, samples=self._samples, weights=self._counted)
        done = accumulation.open_samples if self._counts_samples else accumulation.open_micro_batches
        self._bar.inside(done, self._target)
        is_complete = done == self._target or (self._is_last and self._tail == "step")
        if self._fills:
            is_complete = (is_complete or self._passes.is_filler) and self._passes.closes
        return self._close() if is_complete else None

    def flush(self) -> Update | None:
        """Applies an incomplete window with its true weight: one that was carried, or begun outside of a pass.

        Returns:
            The update, or None where nothing had been added.
        """
        if self._active_pass() is not None:
            raise guards.flush_inside()
        return self._close() if self._accumulation.open_micro_batches else None

    def discard(self) -> int:
        """Throws the open window away: its micro-batches are in no update, and the next one starts a new window.

        Inside of a pass, a micro-batch that was handed out and had no backward yet is left out as well.

        Returns:
            How many micro-batches had been added to it; 0 where none was open.
        """
        self._awaits_backward = False
        self._outside.close()
        return self._accumulation.discard() if self._accumulation.is_open else 0

    def state_dict(self) -> dict[str, int]:
        """The counters, in samples and updates; model, optimizer, scheduler and scaler have states of their own."""
        return self._accumulation.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on counting where ``state_dict()`` was taken."""
        self._accumulation.load_state_dict(state)

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
        self._updates_before_pass = self.updates
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
            if lost and self.updates == self._updates_before_pass:
                raise self._size.too_short(lost, samples=lost_samples, target=self._target)
        elif lost:
            guards.tell_lost(lost, lost_samples)

    def __del__(self) -> None:
        accumulation: Accumulation | None = getattr(self, "_accumulation", None)
        if accumulation is not None and accumulation.open_micro_batches:
            samples = accumulation.open_samples
            self._outside.close()
            guards.tell_lost(accumulation.discard(), samples)

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
        size = self._size.at(self.updates + 1)
        target = self._passes.share(size) if self._counts_samples else size
        self._target_of_all = target if self._size.is_fixed else None
        return target

    def _close(self) -> Update | None:
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
