"""The options of a `TrainStep` that say how micro-batches are run, checked, and the runner that they ask for.

    loss_fn                        Plain      each micro-batch has a loss: forward and backward, one after another
    forward=, batch_loss=          TwoPass    the loss sees all outputs: two passes
    lockstep=, batch_norm="exact"  Lockstep   layers see all micro-batches: side by side, for either kind of loss

Two kinds of BatchNorm statistics are no runner but a scope around one: fixed groups (`GhostBatch`) and "frozen".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from gradaccum.errors import LossError, OptionError, UnsupportedError, WindowError
from gradaccum.split.by_samples import cuts_anywhere, split_by_groups, split_by_samples
from gradaccum.types import Activations, GhostBatch, Rows, Split
from gradaccum.whole_batch.signatures import check_loss_fn
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.closures import closed_over
from gradaccum.window.fillers import FilledRunner
from gradaccum.window.option_names import check_flag
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.runner import Plain, Ran, Runner
from gradaccum.window.weights import WeightsFunction

if TYPE_CHECKING:
    from gradaccum.whole_batch.outputs import Combination

BatchNorm = Literal["micro", "exact", "frozen"] | GhostBatch
Combine = Literal["concat", "sum"]

ADVICE = (
    "In lockstep the activations of all micro-batches are kept, so smaller micro-batches save little. What can help "
    'first: activations="host" (they wait in host memory) or "recompute" (blocks run again in the backward); '
    'batch_norm="frozen" or ga.GhostBatch(n) need no lockstep.'
)
"""What to do where not even a single sample fits."""


Wrapper = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How the micro-batches of a batch are to be run; each field is an option of `TrainStep`.

    Raises:
        LossError: the options do not say which loss is meant, or say it twice.
        WindowError: an option has none of its values.
    """

    loss_fn: Callable[[Any, Any], Any] | None
    forward: Callable[[Any, Any], Any] | None
    batch_loss: Callable[[Any, Any], Any] | None
    combine: Combine
    kept_graphs: int | None
    weights: WeightsFunction | None
    batch_norm: BatchNorm
    lockstep: bool
    activations: Activations

    def __post_init__(self) -> None:
        check_flag("lockstep", self.lockstep)
        self._check_layers()
        if self.forward is None and self.batch_loss is None:
            self._check_loss_of_micro_batches()
        else:
            self._check_loss_of_batch()

    @property
    def is_lockstep(self) -> bool:
        """Whether the micro-batches of a batch run side by side, from layer to layer."""
        return self.lockstep or self.batch_norm == "exact"

    def wrapped(self, around: Wrapper, *, around_batch_loss: Wrapper | None = None) -> RunnerOptions:
        """The same options, with something around each of the user's functions; a wrapper returns None for None."""
        batch_loss = self.batch_loss if around_batch_loss is None else around_batch_loss(self.batch_loss)
        functions = {"loss_fn": around(self.loss_fn), "forward": around(self.forward), "batch_loss": batch_loss}
        return dataclasses.replace(self, **functions)

    def split(self, split: Split | None, *, max_rows: int | None) -> Split:
        """The user's way to cut a batch, or the one that these options need.

        Raises:
            WindowError: groups cannot be kept together.
        """
        if split is not None and not all(callable(getattr(split, name, None)) for name in ("plan", "cut", "largest")):
            raise OptionError(
                f"split={split!r} is of type {type(split).__name__}, which cannot cut a batch. Pass "
                "ga.split_by_samples(), ga.split_by_cost(cost, max_cost), or an object with the methods of ga.Split."
            )
        if not isinstance(self.batch_norm, GhostBatch):
            return split_by_samples() if split is None else split
        if split is not None and not cuts_anywhere(split):
            raise WindowError(
                f"{self.batch_norm!r} takes BatchNorm's statistics over consecutive samples of the batch, and split= "
                'keeps or packs them otherwise: groups would be cut apart. Leave split= out, or use batch_norm="exact".'
            )
        if max_rows is not None and max_rows < self.batch_norm.samples:
            raise WindowError(
                f"micro_batch_size={max_rows} is less than the groups of {self.batch_norm!r}, whose statistics are "
                f"taken over {self.batch_norm.samples} samples at once. Pass micro_batch_size="
                f"{self.batch_norm.samples} or more, or smaller groups."
            )
        return split_by_groups(self.batch_norm, split)

    def check_measures_noise(self, split: Split) -> None:
        """Checks that the first micro-batch has a gradient of its own, of samples that are as good as any.

        Raises:
            UnsupportedError: it has not.
        """
        if self.batch_loss is None and not self.is_lockstep and cuts_anywhere(split):
            return
        raise UnsupportedError(
            "noise_scale=True compares the gradient of the first micro-batch with the batch's, and here that is not "
            "the gradient of a random part of it: samples are coupled (batch_loss=, lockstep), or split= chooses which "
            "of them come first (those of like length, say). The figure would be biased. Leave noise_scale= out, or "
            "measure with loss_fn and ga.split_by_samples() for a while."
        )

    def _check_layers(self) -> None:
        if self.batch_norm not in ("micro", "exact", "frozen") and not isinstance(self.batch_norm, GhostBatch):
            raise WindowError(
                f"batch_norm={self.batch_norm!r}: it says what BatchNorm's statistics are taken over, the whole batch "
                '("exact"), the running ones ("frozen"), groups of n samples (ga.GhostBatch(n)), or each micro-batch '
                '("micro"), which is not the whole batch\'s gradient.'
            )
        if self.activations not in get_args(Activations):
            raise WindowError(
                f"activations={self.activations!r}: what the backward needs waits for it on the device "
                '("device"), in host memory ("host"), or is computed again ("recompute"). The gradient is the same.'
            )
        if self.activations == "recompute" and isinstance(self.batch_norm, GhostBatch):
            raise WindowError(
                f'activations="recompute" with batch_norm={self.batch_norm!r}: blocks are run again in the backward, '
                "where nobody cuts their BatchNorm's samples into groups. Use "
                'batch_norm="exact", or activations="host".'
            )

    def _check_loss_of_micro_batches(self) -> None:
        _check_callable(self.loss_fn, "loss_fn", "loss_fn(model, micro_batch) that returns the loss")
        assert self.loss_fn is not None
        check_loss_fn(self.loss_fn)
        if self.combine != "concat" or self.kept_graphs is not None:
            raise LossError(
                f"combine={self.combine!r} and kept_graphs={self.kept_graphs!r} say how the whole batch's outputs are "
                "had for a loss over all of them; loss_fn sees one micro-batch after another. Pass forward= and "
                "batch_loss= in place of loss_fn."
            )

    def _check_loss_of_batch(self) -> None:
        if self.loss_fn is not None:
            raise LossError(
                "loss_fn was given, and forward= or batch_loss= too. Which of the two is the loss? loss_fn sees a "
                "micro-batch at a time; forward and batch_loss, together, a loss over the whole batch's outputs. Pass "
                "the one or the others."
            )
        _check_callable(self.forward, "forward", "forward(model, micro_batch) that returns the outputs")
        _check_callable(self.batch_loss, "batch_loss", "batch_loss(outputs, batch) that returns the batch's loss")
        if self.weights is not None:
            raise LossError(
                "weights= counts what the means of a micro-batch's loss are over, and batch_loss has the whole batch: "
                "its means are over all of it already. Leave weights= out."
            )
        if self.combine not in get_args(Combine):
            raise LossError(
                f'combine={self.combine!r}: outputs are joined along the samples ("concat"), or they are statistics '
                'and are added up ("sum").'
            )
        if self.kept_graphs is None:
            return
        if type(self.kept_graphs) is not int or self.kept_graphs < 0:
            raise WindowError(
                f"kept_graphs={self.kept_graphs!r}: it is how many micro-batches' graphs are kept from the first pass "
                "to the second, an int of at least 0, or None for as many as fit. The gradient does not depend on it."
            )
        if self.is_lockstep:
            raise LossError(
                "kept_graphs= says how many micro-batches' graphs are kept, and in lockstep all of them are. Leave "
                'it out; activations="host" or "recompute" say where they are kept.'
            )


def _check_callable(function: Any, name: str, form: str) -> None:
    if callable(function):
        return
    if function is None and name != "loss_fn":
        other = "batch_loss" if name == "forward" else "forward"
        raise LossError(
            f"{other}= was given without {name}=. A loss over the whole batch needs both: forward runs on each "
            f"micro-batch, batch_loss on the outputs of all. Pass a function {form}."
        )
    raise LossError(
        f"{name} is a {type(function).__name__}, and is called for every micro-batch. Pass a function {form}."
    )


def choose_runner(
    options: RunnerOptions, model: Any, models: Sequence[nn.Module], *, split: Split, ranks: OverRanks | None
) -> Runner:
    """The runner that the options ask for; what it is made of is imported here, where it is asked for.

    Args:
        options: of the `TrainStep`.
        model: what the user's functions are called with.
        models: all modules, also those of the loss.
        split: what cuts batches.
        ranks: the processes that train together; None where there is one.
    """
    function: Any = options.loss_fn if options.batch_loss is None else options.forward
    run_one: Callable[[Any], Any] = functools.partial(function, model)
    scope: Callable[[], AbstractContextManager[None]] | None = None
    others: Callable[[], Sequence[nn.Module]] = functools.cache(lambda: closed_over(function, models))
    if isinstance(options.batch_norm, GhostBatch):
        from gradaccum.whole_batch.batch_norm.ghost import Ghosts

        ghosts = Ghosts(models, options.batch_norm, is_replayed=options.batch_loss is not None)
        run_one, scope = ghosts.forward(run_one, split=split), ghosts.held
    elif options.batch_norm == "frozen":
        from gradaccum.whole_batch.batch_norm.layers import frozen

        scope = functools.partial(frozen, models, others=others)
    if options.batch_loss is not None and options.combine == "sum":
        from gradaccum.whole_batch.outputs import summable

        run_one = summable(run_one)
    if not options.is_lockstep:
        runner = _one_after_another(options, run_one, models, split, ranks)
        return _scoped(_scoped(runner, _waiting(options, models)), scope)
    # A batch that is not cut needs no lockstep; over processes it runs in lockstep all the same.
    from gradaccum.whole_batch.batch_norm.exact import Whole
    from gradaccum.whole_batch.lockstep.lockstep import Lockstep

    is_exact = options.batch_norm == "exact"
    whole = Whole(models)
    uncut = _one_after_another(options, whole.forward(run_one) if is_exact else run_one, models, split, ranks=None)
    in_lockstep = Lockstep(
        models=models,
        run_one=run_one,
        batch_loss=options.batch_loss,
        combination=_combination(options.combine),
        uncut=_scoped(uncut, whole.held if is_exact else None),
        split=split,
        weights=options.weights,
        is_exact=is_exact,
        activations=options.activations,
        others=others,
    )
    return _scoped(in_lockstep, scope)


def _waiting(options: RunnerOptions, models: Sequence[nn.Module]) -> Callable[[], AbstractContextManager[None]] | None:
    if options.activations == "device":
        return None
    from gradaccum.whole_batch.activations import find_blocks, waiting

    if options.activations == "recompute":
        find_blocks(models)  # an error at construction
    return lambda: waiting(models, options.activations, next(p for model in models for p in model.parameters()).device)


def _combination(combine: Combine) -> Combination:
    from gradaccum.whole_batch.outputs import CONCAT, SUM

    return {"concat": CONCAT, "sum": SUM}[combine]


def _one_after_another(
    options: RunnerOptions,
    run_one: Callable[[Any], Any],
    models: Sequence[nn.Module],
    split: Split,
    ranks: OverRanks | None,
) -> Runner:
    if options.batch_loss is not None:
        from gradaccum.whole_batch.kept_graphs import KeptGraphs
        from gradaccum.whole_batch.two_pass import TwoPass

        return TwoPass(
            output_of=run_one,
            batch_loss=options.batch_loss,
            split=split,
            combination=_combination(options.combine),
            models=models,
            kept=KeptGraphs(models, at_most=options.kept_graphs),
        )
    plain = Plain(loss_of=run_one, split=split, weights=options.weights)
    needs_fillers = ranks is not None and ranks.runs_collectives
    return FilledRunner(runner=plain, split=split, loss_of=run_one) if needs_fillers else plain


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoped:
    """A runner whose batches run inside of a scope each."""

    runner: Runner
    scope: Callable[[], AbstractContextManager[None]]

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """See `Runner`."""
        with self.scope():
            self.runner.run(accumulation, batch, pieces, ran=ran)


def _scoped(runner: Runner, scope: Callable[[], AbstractContextManager[None]] | None) -> Runner:
    return runner if scope is None else _Scoped(runner=runner, scope=scope)
