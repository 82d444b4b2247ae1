"""The options that choose a runner: what is refused at construction, who warns, what the plan line says."""

import logging
from typing import Any

import pytest

import gradaccum as ga
from normed import classes_loss, make_batches, make_network, sgd

FORWARD: dict[str, Any] = {
    "loss_fn": None,
    "forward": lambda model, x: model(x),
    "batch_loss": lambda y, x: y.square().mean(),
}


def made(**options: Any) -> ga.TrainStep:
    model = make_network("residual")
    return ga.TrainStep(model, sgd(model), **{"loss_fn": classes_loss, **options})


MEANINGLESS = [
    ({"batch_norm": "whole"}, "batch_norm='whole': it says what BatchNorm's statistics are taken over"),
    ({"batch_norm": 32}, "batch_norm=32"),
    ({"batch_norm": "exact", "activations": "disk"}, "activations='disk': what the backward needs"),
    ({"batch_norm": ga.GhostBatch(4), "activations": "recompute"}, "nobody cuts their BatchNorm's samples into groups"),
    ({**FORWARD, "kept_graphs": -1}, "kept_graphs=-1"),
]
UNCLEAR = [
    ({"loss_fn": None}, "loss_fn is a NoneType"),
    ({"loss_fn": None, "forward": FORWARD["forward"]}, "forward= was given without batch_loss="),
    ({"loss_fn": None, "batch_loss": FORWARD["batch_loss"]}, "batch_loss= was given without forward="),
    ({**FORWARD, "batch_loss": 3}, "batch_loss is a int"),
    ({**FORWARD, "loss_fn": classes_loss}, "Which of the two"),
    ({**FORWARD, "weights": len}, "weights= counts"),
    ({**FORWARD, "combine": "mean"}, "combine='mean'"),
    ({"combine": "sum"}, "loss_fn sees one micro-batch"),
    ({"kept_graphs": 2}, "loss_fn sees one micro-batch"),
    ({**FORWARD, "kept_graphs": 2, "batch_norm": "exact"}, "in lockstep all of them are"),
]


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [*((ga.WindowError, *row) for row in MEANINGLESS), *((ga.LossError, *row) for row in UNCLEAR)],
)
def test_options_that_mean_nothing_are_refused(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**options)


@pytest.mark.parametrize("lockstep", [False, True])
def test_statistics_of_micro_batches_warn_and_name_the_remedies(lockstep: bool) -> None:
    with pytest.warns(ga.BatchNormWarning, match=r'batch_norm="exact" .* "frozen" .* ga.GhostBatch\(n\)'):
        made(micro_batch_size=4, lockstep=lockstep)(make_batches(1)[0])


@pytest.mark.parametrize("batch_norm", ["exact", "frozen", ga.GhostBatch(4)], ids=str)
def test_the_others_do_not_and_say_exact(batch_norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gradaccum")
    made(micro_batch_size=4, batch_norm=batch_norm)(make_batches(1)[0])
    # two groups of five samples are more than one micro-batch
    is_grouped = isinstance(batch_norm, ga.GhostBatch)
    assert ("not checked: groups of 5 samples" if is_grouped else "| exact (checked on ") in caplog.text


def test_sizes_are_not_compared_by_time_in_lockstep() -> None:
    step = made(batch_norm="exact")
    sizes = [step(batch).micro_batch_size for batch in make_batches(4)]
    assert sizes == [13] * 4
