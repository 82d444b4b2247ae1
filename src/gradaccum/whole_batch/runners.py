"""Which runner the options of a `TrainStep` ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from gradaccum.errors import LossError, WindowError
from gradaccum.types import Split
from gradaccum.whole_batch.kept_graphs import KeptGraphs
from gradaccum.whole_batch.layers import LayerOptions, LossRunner, over_layers
from gradaccum.whole_batch.two_pass import TwoPass
from gradaccum.window.fillers import FilledRunner
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.plain import Plain
from gradaccum.window.runner import Runner
from gradaccum.window.weights import WeightsFunction

Combine = Literal["concat", "sum"]


def choose_runner(
    model: Any,
    models: Sequence[nn.Module],
    *,
    loss_fn: Callable[[Any, Any], Any] | None,
    forward: Callable[[Any, Any], Any] | None,
    batch_loss: Callable[[Any, Any], Any] | None,
    combine: Combine,
    kept_graphs: int | None,
    split: Split,
    weights: WeightsFunction | None,
    layers: LayerOptions,
    ranks: OverRanks | None,
) -> Runner:
    """The runner for a loss of each micro-batch, or for one of the whole batch.

    Args:
        model: what the user's functions are called with.
        models: all modules, also those of the loss.
        loss_fn: see `TrainStep`, like the others.
        forward: see there.
        batch_loss: see there.
        combine: see there.
        kept_graphs: see there.
        split: what cuts batches.
        weights: see there.
        layers: what layers over the batch need.
        ranks: the processes that train together; None where there is one.

    Raises:
        LossError: the options do not say which loss is meant, or say it twice.
        WindowError: ``kept_graphs`` is no count.
    """
    if forward is None and batch_loss is None:
        function = _callable(loss_fn, "loss_fn", "loss_fn(model, micro_batch) that returns the loss")
        if combine != "concat" or kept_graphs is not None:
            raise LossError(
                f"combine={combine!r} and kept_graphs={kept_graphs!r} say how the whole batch's outputs are had for a "
                "loss over all of them; loss_fn sees one micro-batch after another. Pass forward= and batch_loss= in "
                "place of loss_fn."
            )
        plain = LossRunner(
            run_one=lambda micro_batch: function(model, micro_batch),
            make=lambda run_one: _in_step(Plain(loss_of=run_one, split=split, weights=weights), run_one, ranks),
        )
        return over_layers(plain, layers, models, split=split, weights=weights)
    if loss_fn is not None:
        raise LossError(
            "loss_fn was given, and forward= or batch_loss= too. Which of the two is the loss? loss_fn sees a "
            "micro-batch at a time; forward and batch_loss, together, a loss over the whole batch's outputs. Pass the "
            "one or the others."
        )
    output_of = _callable(forward, "forward", "forward(model, micro_batch) that returns the outputs")
    loss_of = _callable(batch_loss, "batch_loss", "batch_loss(outputs, batch) that returns the whole batch's loss")
    if weights is not None:
        raise LossError(
            "weights= counts what the means of a micro-batch's loss are over, and batch_loss has the whole batch: "
            "its means are over all of it already. Leave weights= out."
        )
    if combine not in ("concat", "sum"):
        raise LossError(
            f'combine={combine!r}: outputs are joined along the samples ("concat"), or they are statistics and are '
            'added up ("sum").'
        )
    if kept_graphs is not None and (type(kept_graphs) is not int or kept_graphs < 0):
        raise WindowError(
            f"kept_graphs={kept_graphs!r}: it is how many micro-batches' graphs are kept from the first pass to the "
            "second, an int of at least 0, or None for as many as fit. The gradient does not depend on it."
        )
    kept = KeptGraphs(models, at_most=kept_graphs)
    sums = combine == "sum"
    two_pass = LossRunner(
        run_one=lambda micro_batch: output_of(model, micro_batch),
        make=lambda run_one: TwoPass(
            output_of=run_one, batch_loss=loss_of, split=split, sums=sums, models=models, kept=kept
        ),
        batch_loss=loss_of,
        sums=sums,
        keeps_graphs=kept_graphs is not None,
    )
    return over_layers(two_pass, layers, models, split=split, weights=weights)


def _in_step(plain: Plain, loss_of: Callable[[Any], Any], ranks: OverRanks | None) -> Runner:
    if ranks is None or not ranks.runs_collectives:
        return plain
    return FilledRunner(runner=plain, loss_of=loss_of)


def _callable(function: Any, name: str, form: str) -> Callable[[Any, Any], Any]:
    if callable(function):
        return function
    if function is None and name != "loss_fn":
        other = "batch_loss" if name == "forward" else "forward"
        raise LossError(
            f"{other}= was given without {name}=. A loss over the whole batch needs both: forward runs on each "
            f"micro-batch, batch_loss on the outputs of all. Pass a function {form}."
        )
    raise LossError(
        f"{name} is a {type(function).__name__}, and is called for every micro-batch. Pass a function {form}."
    )
