"""How a step runs one batch: checked, cut, its draws keyed, piece by piece into an open window, again where it must be.

What is shared with other ways to run micro-batches is in `whole_batch`, what finds their size in `fit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from gradaccum.checking.check_once import CheckOnce
from gradaccum.checking.step_to_check import StepToCheck
from gradaccum.errors import WindowError
from gradaccum.losses.loss import Weight
from gradaccum.split.asked import rows_in
from gradaccum.sync.detect import is_sharded
from gradaccum.types import Randomness, Rows, Split, num_rows
from gradaccum.whole_batch.runners import ADVICE, RunnerOptions, choose_runner
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.compiled import any_number_of_rows
from gradaccum.window.profile_ranges import is_profiled, with_forwards
from gradaccum.window.weights import weights_by_name

if TYPE_CHECKING:
    from gradaccum.fit.transaction import Fitting
    from gradaccum.randomness.sample_draws import SampleDraws


class BatchRun:
    """Adds the gradients of whole batches to windows of an accumulation.

    Args:
        accumulation: which has the windows.
        model: what the user's functions are called with.
        models: all modules, also those of the loss.
        options: how micro-batches are run.
        split: how a batch is cut.
        max_rows: the largest number of rows of a micro-batch; None where that is found while training.
        check: see `TrainStep`.
        randomness: see `TrainStep`.

    Attributes:
        fitting: finds the size of micro-batches; None where it was given.
        draws: random draws by sample; None where torch draws.
        inside: called with the micro-batches that have run and how many there are; None for nobody.

    Raises:
        WindowError: an option has none of its values.
    """

    def __init__(
        self,
        accumulation: Accumulation,
        model: Any,
        models: Sequence[nn.Module],
        options: RunnerOptions,
        *,
        split: Split,
        max_rows: int | None,
        check: str,
        randomness: Randomness,
    ) -> None:
        if randomness not in get_args(Randomness):
            raise WindowError(
                f"randomness={randomness!r}: dropout and other draws are a function of each sample's place in the "
                'batch ("sample"), the same however the batch is cut, or torch\'s next numbers ("torch").'
            )
        self._accumulation, self._split, self._max_rows = accumulation, split, max_rows
        self._model, self._models, self._options = model, models, options
        self._weights = options.weights
        self.inside: Callable[[int, int], None] | None = None
        to_check = StepToCheck(
            models=models,
            model=model,
            optimizers=accumulation.optimizers,
            options=options,
            split=split,
            coupled_batch_norms=accumulation.plan_line.coupled_layers,
        )
        self._check = CheckOnce(accumulation, to_check, check=check)
        self._any_rows = any_number_of_rows(models, options.loss_fn, options.forward)
        if self._any_rows is not None:
            options = options.wrapped(self._any_rows.marking)
        self.draws: SampleDraws | None = None
        if randomness == "sample":
            from gradaccum.randomness.sample_draws import SampleDraws  # where it is asked for

            self.draws = SampleDraws(
                model,
                models,
                accumulation.optimizers,
                split=split,
                is_lockstep=options.is_lockstep,
                is_compiled=self._any_rows is not None,
            )
            options = options.wrapped(self.draws.forward, around_batch_loss=self.draws.once)
            accumulation.plan_line.also = ["random draws by sample"]
        cuts = split if self.draws is None else self.draws
        runner = choose_runner(options, model, models, split=cuts, ranks=accumulation.ranks)
        self._runner = runner if self.draws is None else self.draws.around(runner)
        self.fitting: Fitting | None = None
        if max_rows is None:
            from gradaccum.fit.transaction import Fitting, no_common_size  # where it is asked for

            ranks = accumulation.ranks  # parts of FSDP2's lie on those that agree on sizes
            together = ranks.ranks.size if ranks is not None and ranks.runs_collectives else 1
            if any(map(functools.partial(is_sharded, beyond=together), models)):
                raise no_common_size()
            self.fitting = Fitting(
                split,
                accumulation,
                by_time=options.batch_loss is None and not options.is_lockstep,
                advise=self._advise,
                agree=bool if accumulation.ranks is None else accumulation.ranks.agree,
            )

    def run(self, batch: Any, *, is_for_user: bool) -> None:
        """Opens a window and adds the batch's gradient to it; leaves none open if that fails.

        With ``is_for_user`` no update is made of it.
        """
        if self.draws is not None:
            self.draws.begin(is_for_user=is_for_user)
        totals = None if self._weights is None else weights_by_name(self._weights(batch))
        if self.fitting is None:
            if self._accumulation.ranks is not None and not rows_in(self._split, batch):
                pieces: Sequence[Rows] = []  # an empty share of a batch that other processes have
            else:
                pieces = self._split.plan(batch, self._split.largest(batch), max_rows=self._max_rows)
            self._check.before_run(batch, pieces)
            self._run_pieces(batch, pieces, totals=totals)
            return
        fitting = self.fitting
        self._check.before_run(batch, None)
        fitting.run(
            batch,
            lambda pieces, ran: self._run_pieces(batch, pieces, totals=totals, ran=ran, is_final=fitting.is_settled),
        )

    def _advise(self, batch: Any) -> str:
        """What to do where not even a single sample of a batch fits."""
        options = self._options
        if options.is_lockstep:
            return ADVICE
        if self._accumulation.ranks is not None:  # others would not run what is tried here
            return ""
        from gradaccum.fit.planner import first_that_fits
        from gradaccum.fit.workload import Workload

        workload = Workload.checked(
            self._model,
            options.loss_fn,
            batch,
            forward=options.forward,
            batch_loss=options.batch_loss,
            optimizer=self._accumulation.optimizers,
            split=self._split,
        )
        return first_that_fits(workload)

    def _run_pieces(
        self,
        batch: Any,
        pieces: Sequence[Rows],
        *,
        totals: dict[str, Weight] | None,
        ran: Callable[[int], None] | None = None,
        is_final: bool = True,
    ) -> None:
        accumulation = self._accumulation
        sizes = [num_rows(piece) for piece in pieces]
        if self._any_rows is not None:
            self._any_rows.expect(sizes, is_final=is_final)
        accumulation.plan_line.announce(sizes, is_final=is_final)
        accumulation.open(
            totals=totals,
            first_share=(sizes[0], sum(sizes)) if sizes else (1, 1),
            samples=sum(sizes),
            pieces=len(sizes),
        )
        if ran is not None:
            ran(0)

        def has_run(done: int) -> None:
            if ran is not None:
                ran(done)
            if self.inside is not None:
                self.inside(done, len(sizes))

        try:
            runner = with_forwards(self._runner) if is_profiled() else self._runner
            runner.run(accumulation, batch, pieces, ran=has_run)
        except BaseException:
            accumulation.discard()
            raise
