"""A window while it is open: what is known of it ahead, and the backwards that add up in it.

    open     what is known of the window ahead: its total weight, or the share of it that the first micro-batch is
    add      loss -> (sum, weight w_b) -> seed w_b / E -> backward, which adds  (w_b / E) grad l_b  to ``.grad``
    discard  nothing of it stays

What becomes of the sum is said in `accumulation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import MisuseError, UnsupportedError
from gradaccum.losses.loss import Weight
from gradaccum.losses.normaliser import Normaliser, weighs_nothing
from gradaccum.losses.terms import as_terms, without_value
from gradaccum.sync.detect import is_sharded, refuse_late_group, total_norm_of_shards
from gradaccum.sync.messages import Caller
from gradaccum.window import guards
from gradaccum.window.loss_reading import LossReading
from gradaccum.window.loss_scale import refuse_scaled
from gradaccum.window.noise_scale import NoiseScale
from gradaccum.window.options import Options
from gradaccum.window.over_ranks import OverRanks, over_ranks
from gradaccum.window.parameter_hooks import ParameterHooks
from gradaccum.window.parameters import Parameters
from gradaccum.window.plan_line import PlanLine
from gradaccum.window.profile_ranges import stage
from gradaccum.window.run_counts import RunCounts
from gradaccum.window.seconds import Seconds
from gradaccum.window.stopping import Stopping

logger = logging.getLogger("gradaccum")
_DEFAULTS = Options()


class OpenWindow:
    """The open window of some models and optimizers, one after another.

    Attributes:
        ranks: the processes that train together with this one; None where there are none.
        open_samples: rows added to the open window so far, as far as they could be seen.
        stopping: whether this run is to save and to leave; None where no signal can ask for it.
        plan_line: says what is to come, and what is known of it.
        clock: where the time of an update goes.
        reading: reads the losses; ``warns_of_unknown`` as there.
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
        caller: Caller = Caller.ACCUMULATOR,
    ) -> None:
        self._options = options
        self._parameters = Parameters(model, optimizer)
        self.models, self.optimizers = self._parameters.models, self._parameters.optimizers
        # A look at a few rows before training is this process's own, and finds by trying what means are over.
        self.ranks: OverRanks | None = None
        if not is_look:
            self.ranks = over_ranks(self.models, options, self._parameters.named, caller)
        self.stopping: Stopping | None = None
        has_own = self.ranks is not None and self.ranks.has_own
        options.check_with(self.optimizers, has_ranks=self.ranks is not None, has_own=has_own)
        self._look_at_parameters()
        self._updater = options.updater(self.optimizers, narrow=lambda: self._gradients.narrow())
        self._looks_for_others = torch.distributed.is_available() and not torch.distributed.is_initialized()
        if any(map(is_sharded, self.models)):
            self._updater.total_norm = total_norm_of_shards
        elif self.ranks is not None and has_own:
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
        self._noise_scale = self._measured_noise_scale(options)
        self.clock = Seconds()

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._normaliser is not None

    @property
    def open_micro_batches(self) -> int:
        """Micro-batches added to the open window so far."""
        return len(self._sizes)

    def _waited(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.ranks.waited

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

    def with_others(self, caller: Caller | None = None) -> AbstractContextManager[Any]:
        """Context manager in which other processes hear of an error here, and engines leave gradients to us."""
        return nullcontext() if self.ranks is None else self.ranks.trained_with(caller)

    def read_all_graphs(self) -> None:
        """See `GradientSum.read_all`."""
        self._gradients.read_all()

    def leave_to_check(self, *, was_checked: bool, has_warned: bool) -> None:
        """Leaves to a check before the first update what it has seen and said."""
        self.reading.leave_to_check(was_checked=was_checked)
        self._hooks.warns = not has_warned

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
        try:
            self._gradients.begin(is_for_update=not (self._is_for_user or weighs_nothing(totals)))
        except MisuseError as error:
            guards.add_user_line(error)
            raise
        expected = None
        if self.ranks is None:
            if self._looks_for_others:
                refuse_late_group(self._options.sync)
        else:
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
        if self._noise_scale is not None:
            self._noise_scale.begin()
        self.clock.opened(waited=self._waited())

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
                if self._noise_scale is not None and self._noise_scale.is_due and not self._is_for_user:
                    self._measure_first(self._noise_scale, samples)
            elif self.ranks is not None:
                self.ranks.backward_of_nothing(loss)
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
            if len(losses) > 1:  # one alone is the whole batch's own, whatever it is
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
            with stage("backward"):
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
        try:
            with stage("backward"):
                self._gradients.add(roots, seeds, also=also, only=only)
        except MisuseError as error:
            guards.add_user_line(error)
            raise
        self._hooks.check()

    def _measured_noise_scale(self, options: Options) -> NoiseScale | None:
        if not options.noise_scale:
            return None
        if self._updater.total_norm is not None or (self.ranks is not None and self.ranks.boost is not None):
            raise UnsupportedError(
                "noise_scale=True takes the norm of each process's own first micro-batch, and here gradients lie in "
                "parts on several processes (FSDP2, tensor parallelism), or some are each process's own: the norm "
                "would be that of another batch. It is measured on one process, with plain modules, and with "
                "DistributedDataParallel. Leave noise_scale= out."
            )
        return NoiseScale()

    def _measure_first(self, noise_scale: NoiseScale, samples: int | None) -> None:
        share = self._opened().share_so_far
        norm = self._gradients.norm(self._parameters.optimized)
        scale = None if self._updater.loss_scale is None else self._updater.loss_scale.of_window()
        noise_scale.measure_first(norm if scale is None else norm / scale.to(norm), samples=samples, share=share)

    def discard(self) -> int:
        """Throws the open window away, and returns how many micro-batches it had."""
        lost = self.open_micro_batches
        self._gradients.clear()
        self.reading.window_discarded()
        self._reset()
        return lost

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
