"""One window after another: the algorithm that both ways of training share.

    open     what is known of the window ahead: its total weight, or the share of it that the first micro-batch is
    add      loss -> (sum, weight w_b) -> seed w_b / E -> backward, which adds  (w_b / E) grad l_b  to ``.grad``
    settle   the sums, weights and gradients of all processes; what is left to multiply by is E / W
    close    finite? clip, step, schedule: an `Update`. Or `close_into_grad`, which steps nothing; or `discard`

Who decides where a window ends, the user's loop or the batch in hand, is not known here. E and W are explained in
`losses/normaliser`, the sum over processes in `over_ranks`, the step in `update`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normaliser import Normaliser, weighs_nothing
from gradaccum.losses.terms import as_terms, no_gradient, without_value
from gradaccum.types import Update
from gradaccum.window import guards
from gradaccum.window.loss_reading import LossReading
from gradaccum.window.loss_scale import check_stays_scaled, refuse_scaled
from gradaccum.window.options import Options
from gradaccum.window.over_ranks import OverRanks, over_ranks
from gradaccum.window.parameter_hooks import ParameterHooks
from gradaccum.window.parameters import Parameters
from gradaccum.window.plan_line import PlanLine
from gradaccum.window.run_counts import RunCounts
from gradaccum.window.window_result import WindowResult, loss_of, update_of

logger = logging.getLogger("gradaccum")
_DEFAULTS = Options()


class Accumulation:
    """Adds up the gradients of a window's micro-batches and makes the update from them.

    Attributes:
        ranks: the processes that train together with this one; None where there are none.
        open_samples: rows added to the open window so far, as far as they could be seen.
        means: reads what the losses are means over; ``warns_of_unknown`` as there.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        options: Options = _DEFAULTS,
        *,
        couples_batch_norms: bool = True,
        warns_of_unknown: bool = False,
        is_look: bool = False,
    ) -> None:
        self._options = options
        self._parameters = Parameters(model, optimizer)
        self.models, self.optimizers = self._parameters.models, self._parameters.optimizers
        # A look at a few rows before training is this process's own, and finds by trying what means are over.
        self.ranks: OverRanks | None = None
        if not is_look:
            self.ranks = over_ranks(self.models, options.sync, self._parameters.named)
        options.check_with(self.optimizers, has_ranks=self.ranks is not None)
        self._look_at_parameters()
        self._updater = options.updater(self.optimizers, narrow=lambda: self._gradients.narrow())
        if self.ranks is not None and self.ranks.shards:
            self._updater.total_norm = self.ranks.total_norm
        self._normaliser: Normaliser | None = None
        self._sizes: list[int | None] = []
        self.open_samples, self._last_total = 0, 0.0
        self._is_for_user = False
        self._is_first_backward = True
        self._hooks = ParameterHooks()
        self.plan_line = PlanLine(self.models, self.ranks, couples_batch_norms=couples_batch_norms)
        # Between processes buffers are broadcast and parameters gathered, which looks like a change.
        watches_state = self.ranks is None and not is_look
        self.reading = LossReading(
            self.models, self.plan_line, not is_look, watches_state=watches_state, warns_of_unknown=warns_of_unknown
        )
        self.counts = RunCounts()

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._normaliser is not None

    @property
    def open_micro_batches(self) -> int:
        """Micro-batches added to the open window so far."""
        return len(self._sizes)

    def device(self) -> torch.device:
        """The device of the first model's first parameter."""
        return self._gradients.parameters[0].device

    def no_calls_by_hand(self) -> AbstractContextManager[None]:
        """Context manager in which stepping, zeroing or scheduling by hand inside a window are errors."""
        return guards.no_calls_by_hand(
            self.optimizers,
            self._options.schedulers,
            open_micro_batches=lambda: self.open_micro_batches,
            is_ours=lambda: self._updater.is_stepping,
        )

    def with_others(self) -> AbstractContextManager[Any]:
        """Context manager in which other processes hear of an error here, and engines leave gradients to us."""
        return nullcontext() if self.ranks is None else self.ranks.trained_with()

    def read_all_graphs(self) -> None:
        """See `GradientSum.read_all`."""
        self._gradients.read_all()

    # ------------------------------------------------------------------------------------------------------------ open

    def open(
        self,
        *,
        totals: Mapping[str, Weight] | None = None,
        first_share: tuple[int, int] = (1, 1),
        samples: int = 0,
        pieces: int = 0,
        is_done: bool = False,
    ) -> None:
        """Starts a window.

        Args:
            totals: see `Normaliser`.
            first_share: see `Normaliser`; of this process's window.
            samples: rows that this process has in the window, where they are known.
            pieces: micro-batches that this process has in the window; 0 where unknown.
            is_done: whether this process has no window of its own any more; see `OverRanks.begin`.

        Raises:
            MisuseError: a gradient is left over from something else.
        """
        self._find_parameters()
        self._hooks.look(self._parameters.named, is_whole=pieces == 1 and self.ranks is None)
        self._gradients.begin(is_for_update=not (self._is_for_user or weighs_nothing(totals)))
        expected = None
        if self.ranks is not None:
            totals, expected = self.ranks.begin(
                totals,
                update=self.counts.updates + 1,
                samples=samples,
                pieces=pieces,
                last_total=self._last_total,
                is_done=is_done,
            )
            first_share = first_share[0], first_share[1] * self.ranks.ranks.size
        self._normaliser = Normaliser(
            totals=totals,
            first_share=first_share,
            # A batch in hand needs no guess; and a resumed run, which has none, is to make the same bits.
            at_least=0.0 if pieces else self._last_total,
            expected=expected,
        )
        # With autocast round the whole loop, torch keeps casts of the parameters from before the last update.
        torch.clear_autocast_cache()
        if self.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device())
        self.reading.window_begins()
        if self._updater.loss_scale is not None:
            self._updater.loss_scale.begin(self.device())
        self._started = time.perf_counter()

    # ------------------------------------------------------------------------------------------------------------- add

    def add(self, loss: Any, *, samples: int | None, weights: Mapping[str, Weight] | None = None) -> None:
        """Runs the backward of one micro-batch's loss, with its share of the whole.

        A loss that is refused, or a backward that fails, discards the window: what it had added up is not known.

        Args:
            loss: `Loss`, 0-d tensor, or a dict of these by name.
            samples: rows of the micro-batch; None where unknown.
            weights: what plain tensors of the loss are means over, where the user has said so.
        """
        normaliser = self._opened()
        try:
            several = normaliser.seeds(as_terms(loss, samples, weights))
            self.reading.has_run(loss, samples, weights, [root for root, _ in several])
            if several:
                self._run_backward(several)
            elif self.ranks is not None:
                self.ranks.backward_of_nothing()
        except BaseException:
            before = self.discard()
            if before:
                logger.warning("a window was discarded with its first %d micro-batches: the next one raised", before)
            raise
        self.count(samples)

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
        normaliser = self._opened()
        try:
            terms = [as_terms(loss, samples, weights) for loss, samples, weights in losses]
            for loss, samples, weights in losses:
                self.reading.has_run(loss, samples, weights)
            counts_here = self.ranks is None or self.ranks.is_first or not is_shared
            if not counts_here:
                terms = [without_value(losses_of_one) for losses_of_one in terms]
            normaliser.expect_all_of(terms, added_up=None if self.ranks is None else self.ranks.totals)
            several = [one for losses_of_one in terms for one in normaliser.seeds(losses_of_one)]
            if several:
                self._run_backward(several, also=also, only=None if counts_here else also)
        except BaseException:
            self.discard()
            raise

    def push(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Runs the backward of outputs whose gradients are known, seeded and scaled already."""
        if outputs:
            self._gradients.add(tuple(outputs), tuple(gradients), reads=True)

    def count(self, samples: int | None) -> None:
        """Counts a micro-batch that went into the window."""
        self._sizes.append(samples)
        self.open_samples += samples or 0

    def _run_backward(
        self,
        several: Sequence[tuple[Tensor, Tensor]],
        *,
        also: Sequence[Tensor] = (),
        only: Sequence[Tensor] | None = None,
    ) -> None:
        roots, seeds = zip(*several, strict=True)
        if self._is_first_backward:
            refuse_scaled(roots, is_scaled_here=self._updater.loss_scale is not None)
            self._is_first_backward = False
        if self.ranks is not None and self.ranks.boost is not None:
            seeds = tuple(seed * self.ranks.boost for seed in seeds)
        if self._updater.loss_scale is not None:
            seeds = tuple(self._updater.loss_scale.scale(seed) for seed in seeds)
        rescale = self._opened().take_rescale()
        if rescale is not None:
            self._gradients.multiply(rescale)
        self._gradients.add(roots, seeds, also=also, only=only)
        self._hooks.check()

    # --------------------------------------------------------------------------------------------------- settle, close

    def _settle(self, parameters: Sequence[nn.Parameter], *, is_done: bool = False) -> WindowResult:
        """What the window had in all; gradients of other processes are added up here."""
        normaliser = self._opened()
        if self.ranks is not None:
            return self.ranks.settle(normaliser, parameters, sizes=self._sizes, is_done=is_done)
        return WindowResult.of(self._sizes, normaliser.correction)

    def close(self) -> Update:
        """The update from what has been added."""
        update = self.close_with_others()
        assert update is not None, "a window closed here is closed everywhere"
        return update

    def close_with_others(self, *, is_done: bool = False, drops_incomplete: bool = False) -> Update | None:
        """The update from what has been added here and on other processes; None where all are done, or it was dropped.

        With ``is_done`` this process has no more windows, and only takes part in those of others; with
        ``drops_incomplete`` there is no update where some process is done.
        """
        try:
            result = self._settle(self._parameters.optimized, is_done=is_done)
            if result.is_over or (result.is_incomplete and drops_incomplete):
                self.discard()
                return None
            return self._close(self._opened(), result)
        except BaseException:  # no window stays half-open: the next one would find its gradients
            self.discard()
            raise

    def _close(self, normaliser: Normaliser, result: WindowResult) -> Update:
        normaliser.check_totals()
        self.reading.window_complete(len(self._sizes))
        parameters = self._gradients.filled(self._parameters.optimized)
        grad_norm: Tensor | None = None
        skipped: bool | Tensor = True
        index = self.counts.updates + 1
        if normaliser.is_empty:
            logger.warning("update %d was skipped: the weight of its batch is 0, there is nothing to learn from", index)
        elif not parameters:
            raise no_gradient(self._parameters.optimized)
        else:
            grad_norm, skipped = self._updater.apply(parameters, result.correction)
            if skipped is True:
                logger.warning("update %d was skipped: its gradient is not finite", index)
        update = update_of(
            normaliser,
            result,
            index=index,
            grad_norm=grad_norm,
            skipped=skipped,
            seconds=time.perf_counter() - self._started,
            peak_bytes=torch.cuda.max_memory_allocated(self.device()) if self.device().type == "cuda" else None,
        )
        self.counts.add(result.micro_batches, self.open_samples if result.samples is None else result.samples)
        self._gradients.clear(keeps_memory=len(self._sizes) > 1)
        self._last_total = update.weight if isinstance(update.weight, (int, float)) else 0.0
        self.reading.window_closed()
        self._reset()
        return update

    def close_into_grad(self, aside: Sequence[Tensor | None], *, unscales: bool = True) -> Loss:
        """Leaves the window's gradient in ``.grad``, added to what had been set ``aside``; makes no update.

        With ``unscales`` a loss scale is divided out again.
        """
        normaliser = self._opened()
        result = self._settle(self._gradients.parameters)
        normaliser.check_totals()
        self.reading.window_complete(len(self._sizes))
        parameters = self._gradients.filled(self._gradients.parameters)
        if not parameters and not normaliser.is_empty:
            raise no_gradient(self._parameters.optimized)
        self._updater.into_grad(parameters, result.correction, unscales=unscales)
        self._gradients.narrow()
        self.put_back(aside)
        if unscales and self._updater.loss_scale is not None:
            self._updater.loss_scale.mark_unscaled()
        loss = loss_of(normaliser)
        self.reading.window_closed()
        self._reset()
        return loss

    def discard(self) -> int:
        """Throws the open window away, and returns how many micro-batches it had."""
        lost = self.open_micro_batches
        self._gradients.clear()
        self.reading.window_discarded()
        self._reset()
        return lost

    def set_aside(self, *, unscales: bool = True) -> list[Tensor | None]:
        """Takes gradients that are there away, for `close_into_grad` to put back."""
        self._find_parameters()
        if not unscales:
            check_stays_scaled(self._updater.loss_scale, self._options.scaler, self.optimizers)
        self._is_for_user = True
        return self._gradients.set_aside()

    def put_back(self, aside: Sequence[Tensor | None]) -> None:
        """Puts gradients back that were set aside for a window that came to nothing."""
        self._is_for_user = False
        self._gradients.put_back(aside)

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, int]:
        """The counts; refused while a window is open."""
        return self.counts.state_dict(open_micro_batches=self.open_micro_batches, open_samples=self.open_samples)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting from a state; refused while a window is open."""
        self.counts.load_state_dict(state, open_micro_batches=self.open_micro_batches)

    def _opened(self) -> Normaliser:
        assert self._normaliser is not None, "a window is opened before anything is added to it"
        return self._normaliser

    def _reset(self) -> None:
        self._normaliser = None
        self._sizes, self.open_samples = [], 0

    def _find_parameters(self) -> None:
        """Looks for the parameters anew where the optimizers have been given others."""
        if self._parameters.has_changed():
            self._parameters.find()
            self._look_at_parameters()

    def _look_at_parameters(self) -> None:
        named = self._parameters.named
        if self.ranks is not None:
            self.ranks.look_at(named)
        has_shards = self.ranks is not None and self.ranks.shards
        self._gradients = self._options.gradient_sum(named, has_shards=has_shards)
