"""One window after another: what both ways of training share.

A window is opened, gets losses, and is closed into an update, or discarded. Who decides about its boundary, the user's
loop or the batch in hand, is not known here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.gradients.casts import KeptCasts
from gradaccum.gradients.dot_grad import DotGrad
from gradaccum.gradients.options import GradientOptions
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.meaning import SampleMeans
from gradaccum.losses.normalise import Normaliser, weighs_nothing
from gradaccum.losses.seeds import Seeds
from gradaccum.losses.terms import as_named, expect_rows, no_gradient, seeded, without_value
from gradaccum.sync.detect import Sync
from gradaccum.types import Update
from gradaccum.window import guards
from gradaccum.window.over_ranks import OverRanks, over_ranks
from gradaccum.window.parameters import Trained
from gradaccum.window.plan_line import Telling
from gradaccum.window.totals import Counters
from gradaccum.window.update import Updater
from gradaccum.window.window_result import Counted, loss_of, update_of

logger = logging.getLogger("gradaccum")
_DEFAULT = GradientOptions()


class Accumulation:
    """Adds up the gradients of a window's micro-batches and makes the update from them.

    Args:
        model: one module or a sequence of them.
        optimizer: one optimizer or a sequence of them; their parameters must be the models'.
        clip_norm: see `Updater`.
        scheduler: one or a sequence of them, advanced once an update; None for none.
        scaler: see `Updater`.
        gradients: how they add up.
        couples_batch_norms: whether BatchNorm in training mode sees single micro-batches.
        sync: see `detect`.

    Attributes:
        counters: what went into updates so far.
        ranks: the processes that train together with this one; None where there are none.
        is_open: whether a window is open.
        open_samples: rows added to the open window so far, as far as they could be seen.
        casts: those of weights under autocast, kept while a window is open.
        telling: what is said about the run.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        clip_norm: float | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        gradients: GradientOptions = _DEFAULT,
        couples_batch_norms: bool = True,
        sync: Sync = "auto",
    ) -> None:
        self._options = gradients
        self._trained = Trained(model, optimizer)
        self.models, self.optimizers = self._trained.models, self._trained.optimizers
        self.ranks: OverRanks | None = over_ranks(self.models, sync, self._trained.named)
        has_ranks = self.ranks is not None
        gradients.check_rest(self.optimizers, clip_norm=clip_norm, has_scaler=scaler is not None, has_ranks=has_ranks)
        self._is_plain = scaler is None and not has_ranks and not gradients.into_momentum
        self._look_at_parameters()
        self._schedulers = guards.as_list(scheduler)
        self._updater = Updater(
            self.optimizers,
            clip_norm=clip_norm,
            schedulers=self._schedulers,
            scaler=scaler,
            narrow=None if gradients.accumulate_dtype is None else lambda: self._gradients.narrow(),
            stepping=(lambda: self._gradients.stepping()) if gradients.into_momentum else None,
        )
        if self.ranks is not None and self.ranks.shards:
            self._updater.total_norm = self.ranks.total_norm
        self._means = SampleMeans()
        self._normaliser: Normaliser | None = None
        self.is_open = self._is_for_user = False
        self._seeds = Seeds()
        self.open_samples, self._last_total = 0, 0.0
        self.telling = Telling(couples_batch_norms=couples_batch_norms)
        self._sizes: list[int | None] = []
        self.counters = Counters()
        self.casts = KeptCasts()

    @property
    def open_micro_batches(self) -> int:
        """Micro-batches added to the open window so far."""
        return len(self._sizes)

    def device(self) -> torch.device:
        """Where the first model's first parameter is."""
        return self._gradients.parameters[0].device

    def tell(self, sizes: Sequence[int | None], *, updates_per_epoch: int | None = None, is_final: bool = True) -> None:
        """See `Telling.tell`."""
        self.telling.tell(sizes, self.models, self.ranks, updates_per_epoch=updates_per_epoch, is_final=is_final)

    def no_calls_by_hand(self) -> AbstractContextManager[None]:
        """While held, stepping, zeroing or scheduling by hand inside a window are errors."""
        ours, count = self._updater, lambda: self.open_micro_batches
        return guards.no_calls_by_hand(
            self.optimizers, self._schedulers, open_micro_batches=count, is_ours=lambda: ours.is_stepping
        )

    def with_others(self) -> AbstractContextManager[Any]:
        """While held, other processes hear of an error here, and engines leave gradients to us."""
        return nullcontext() if self.ranks is None else self.ranks.trained_with()

    def open(
        self,
        *,
        totals: Mapping[str, Weight] | None = None,
        first_share: tuple[int, int] = (1, 1),
        samples: int = 0,
        pieces: int = 0,
        is_done: bool = False,
    ) -> None:
        """Starts a window; see `Normaliser` and `OverRanks.begin` for what may be known of it ahead on this process.

        Raises:
            MisuseError: a gradient is left over from something else.
        """
        if self._trained.has_changed():
            self._trained.find()
            self._look_at_parameters()
        self._rows_ahead = samples if pieces else 0
        self._gradients.begin(is_for_update=not (self._is_for_user or weighs_nothing(totals)))
        last, expected = self._last_total, None
        if self.ranks is not None:
            about = {"update": self.counters.updates + 1, "samples": samples, "pieces": pieces}
            totals, expected = self.ranks.begin(totals, **about, last_total=last, is_done=is_done)
            first_share = first_share[0], first_share[1] * self.ranks.ranks.size
        last = 0.0 if pieces else last  # what a resumed run does not know, and a batch in hand does not need
        self._normaliser = Normaliser(
            seeds=self._seeds, totals=totals, first_share=first_share, at_least=last, expected=expected
        )
        self.is_open = True
        self._asks_nothing = self._is_plain and not (self._looks_for_foreign or self._means.is_looking)
        self._is_on_cuda = self._gradients.parameters[0].is_cuda
        if self._is_on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device())
        self._started = time.perf_counter()
        if self.ranks is None or not self.ranks.shards:  # casts of whole weights, on every process, for a window
            self.casts.hold()

    def look_for_foreign_leaves(self) -> None:
        """Has the backwards of the next window looked through for parameters of other models."""
        # Shards are leaves of no graph: FSDP2 brings their gradients over from whole parameters of its own.
        self._looks_for_foreign = self.ranks is None or not self.ranks.shards
        self._asks_nothing = False

    def add(self, loss: Any, *, samples: int | None, weights: Mapping[str, Weight] | None = None) -> None:
        """Runs the backward of one micro-batch's loss, with its share of the whole.

        Args:
            loss: `Loss`, 0-d tensor, or a dict of these by name.
            samples: rows of the micro-batch; None where unknown.
            weights: what plain tensors of the loss are means over, where the user has said so.

        A loss that is refused, or a backward that fails, discards the window: what it had added up is not known.
        """
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before anything is added to it"
        try:
            again = normaliser.seeds_again(loss, samples) if self._asks_nothing and weights is None else None
            if again is not None:
                self._gradients.add((loss,), again)
            else:
                if self._gradients.momentum is not None and self._gradients.momentum.is_open:
                    expect_rows(normaliser, loss, samples, weights, rows=self._rows_ahead)
                roots, seeds = seeded(normaliser, loss, samples, weights)
                if self._means.is_looking and samples is not None:
                    self._means.check_all(loss, samples, weights or {})
                if roots:
                    self._run_backward(normaliser, roots, seeds)
                elif self.ranks is not None:
                    self.ranks.backward_of_nothing()
        except BaseException:
            before = self.discard()
            if before:
                logger.warning("a window was discarded with its first %d micro-batches: the next one raised", before)
            raise
        self._sizes.append(samples)  # `count`, without a call
        self.open_samples += samples or 0

    def add_together(
        self,
        losses: Sequence[tuple[Any, int, Mapping[str, Weight] | None]],
        *,
        also: Sequence[Tensor] = (),
        is_shared: bool = False,
    ) -> None:
        """Runs one backward over all losses of one window, whose totals are known by now; counts no micro-batches.

        Args:
            losses: each as for `add`, the rows it is over, and its weights.
            also: leaves besides the parameters that get gradients.
            is_shared: whether every process has the same losses, which count once.
        """
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before anything is added to it"
        try:
            terms = [as_named(loss, samples, weights) for loss, samples, weights in losses]
            for loss, samples, weights in losses if self._means.is_looking else ():
                self._means.check_all(loss, samples, weights or {})
            counts_here = self.ranks is None or self.ranks.is_first or not is_shared
            if not counts_here:
                terms = [without_value(losses_of_one) for losses_of_one in terms]
            normaliser.expect_all_of(terms, added_up=None if self.ranks is None else self.ranks.totals)
            several = [one for losses_of_one in terms for one in normaliser.seeds(losses_of_one)]
            if several:
                roots, seeds = zip(*several, strict=True)
                self._run_backward(normaliser, roots, seeds, also=also, only=None if counts_here else also)
        except BaseException:
            self.discard()
            raise

    def push(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Runs the backward of outputs whose gradients are known, as they are: seeded and scaled already."""
        if outputs:
            graph = self._gradients.look_for_foreign_leaves(outputs) if self._looks_for_foreign else None
            self._gradients.add(tuple(outputs), tuple(gradients), graph=graph)

    def count(self, samples: int | None) -> None:
        """Counts a micro-batch that went into the window."""
        self._sizes.append(samples)
        self.open_samples += samples or 0

    def close(self) -> Update:
        """The update from what has been added."""
        update = self.close_with_others()
        assert update is not None, "a window closed here is closed everywhere"
        return update

    def close_with_others(self, *, is_done: bool = False, drops_incomplete: bool = False) -> Update | None:
        """The update from what has been added here and on other processes; None where all are done, or it was dropped.

        Args:
            is_done: this process has no more windows, and only takes part in those of others.
            drops_incomplete: whether there is no update where some process is done.
        """
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before it is closed"
        try:
            self.casts.release()
            counted = self._counted(normaliser, self._optimized, is_done=is_done)
            if counted.is_over or (counted.is_incomplete and drops_incomplete):
                self.discard()
                return None
            return self._close(normaliser, counted)
        except BaseException:  # no window stays half-open: the next one would find its gradients
            self.discard()
            raise

    def _close(self, normaliser: Normaliser, counted: Counted) -> Update:
        normaliser.check_totals()
        parameters = self._gradients.filled(self._optimized)
        grad_norm = None
        if normaliser.is_empty:
            skipped: bool | Tensor = True
            logger.warning(
                "update %d was skipped: the weight of its batch is 0, there is nothing to learn from",
                self.counters.updates + 1,
            )
        elif not parameters:
            raise no_gradient(self._optimized)
        else:
            assert self._gradients.momentum is None or counted.correction is None, "totals were known ahead"
            applied = self._updater.apply(parameters, counted.correction)
            grad_norm, skipped = applied.grad_norm, applied.skipped
            if skipped is True:
                logger.warning("update %d was skipped: its gradient is not finite", self.counters.updates + 1)
                self._gradients.skip()
        return self._finish(normaliser, counted, grad_norm, skipped)

    def _counted(self, normaliser: Normaliser, parameters: Sequence[nn.Parameter], *, is_done: bool = False) -> Counted:
        """What the window had in all; gradients of other processes are added up here."""
        if self.ranks is not None:
            return self.ranks.settle(normaliser, parameters, sizes=self._sizes, is_done=is_done)
        return Counted.of(self._sizes, normaliser.correction)

    def close_into_grad(self, aside: Sequence[Tensor | None]) -> Loss:
        """Leaves the window's gradient in ``.grad``, added to what had been set ``aside``; makes no update."""
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before it is closed"
        self.casts.release()
        counted = self._counted(normaliser, self._gradients.parameters)
        normaliser.check_totals()
        parameters = self._gradients.filled(self._gradients.parameters)
        if not parameters and not normaliser.is_empty:
            raise no_gradient(self._optimized)
        self._updater.unscale_into_grad(parameters, counted.correction)
        self._gradients.narrow()
        self.put_back(aside)
        loss = loss_of(normaliser)
        self._means.window_closed()
        self._reset()
        return loss

    def discard(self) -> int:
        """Throws the open window away, and tells how many micro-batches it had."""
        lost = self.open_micro_batches
        self.casts.release()
        self._gradients.clear()
        self._means.window_discarded()
        self._reset()
        return lost

    def state_dict(self) -> dict[str, int]:
        """The counters; refused while a window is open."""
        return self.counters.state_dict(open_micro_batches=self.open_micro_batches, open_samples=self.open_samples)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting from a state; refused while a window is open."""
        self.counters.load_state_dict(state, open_micro_batches=self.open_micro_batches)

    def set_aside(self) -> list[Tensor | None]:
        """Takes gradients that are there away, for `close_into_grad` to put back."""
        self._is_for_user = True
        return self._gradients.set_aside()

    def put_back(self, aside: Sequence[Tensor | None]) -> None:
        """Puts gradients back that were set aside for a window that came to nothing."""
        self._is_for_user = False
        self._gradients.put_back(aside)

    def _finish(
        self, normaliser: Normaliser, counted: Counted, grad_norm: Tensor | None, skipped: bool | Tensor
    ) -> Update:
        self.counters.updates += 1
        self.counters.micro_batches += counted.micro_batches
        self.counters.samples += self.open_samples if counted.samples is None else counted.samples
        update = update_of(
            normaliser,
            counted,
            index=self.counters.updates,
            grad_norm=grad_norm,
            skipped=skipped,
            seconds=time.perf_counter() - self._started,
            peak_bytes=torch.cuda.max_memory_allocated(self.device()) if self._is_on_cuda else None,
        )
        self._gradients.clear(keeps_memory=len(self._sizes) > 1)
        self._last_total = update.weight if isinstance(update.weight, (int, float)) else 0.0
        self._reset()
        self._means.window_closed()
        self._looks_for_foreign = False
        return update

    def _run_backward(
        self,
        normaliser: Normaliser,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        *,
        also: Sequence[Tensor] = (),
        only: Sequence[Tensor] | None = None,
    ) -> None:
        scaler = self._updater.loss_scale
        if self.ranks is not None and self.ranks.boost is not None:
            seeds = tuple(seed * self.ranks.boost for seed in seeds)
        if scaler is not None:
            seeds = tuple(scaler.scale(seed) for seed in seeds)
        graph = self._gradients.look_for_foreign_leaves(roots) if self._looks_for_foreign else None
        rescale = normaliser.take_rescale()
        if rescale is not None:
            self._gradients.multiply(rescale)
        self._gradients.add(roots, seeds, also=also, only=only, graph=graph)

    def _reset(self) -> None:
        self._normaliser = None
        self.is_open = False
        self._sizes, self.open_samples = [], 0

    def _look_at_parameters(self) -> None:
        named = self._trained.named
        if self.ranks is not None:
            self.ranks.look_at(named)
        self._gradients = DotGrad(named, self._options, optimizers=self.optimizers)
        self._optimized = self._trained.optimized
        self.look_for_foreign_leaves()
