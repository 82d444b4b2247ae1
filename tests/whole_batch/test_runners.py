"""The options that choose a runner: what is refused at construction, who warns, what the plan line says."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "whole"}, "batch_norm='whole': it says what BatchNorm's statistics are taken over"),
        ({"batch_norm": 32}, "batch_norm=32"),
        ({"batch_norm": "exact", "activations": "disk"}, "activations='disk': in lockstep"),
        ({"activations": "host"}, "activations='host' says where .* with batch_norm='micro' one micro-batch runs"),
        ({"batch_norm": ga.GhostBatch(4), "activations": "recompute"}, "one micro-batch runs after another"),
        ({**FORWARD, "kept_graphs": -1}, "kept_graphs=-1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ga.WindowError, match=message):
        made(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
    ],
)
def test_losses_that_are_not_clear_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ga.LossError, match=message):
        made(**options)


def test_micro_batches_by_themselves_warn_and_name_the_remedies() -> None:
    with pytest.warns(ga.BatchNormWarning, match=r'batch_norm="exact" .* "frozen" .* ga.GhostBatch\(n\)'):
        made(micro_batch_size=4)(make_batches(1)[0])


@pytest.mark.parametrize("batch_norm", ["exact", "frozen", ga.GhostBatch(4)], ids=str)
def test_the_others_do_not_and_say_exact(batch_norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gradaccum")
    made(micro_batch_size=4, batch_norm=batch_norm)(make_batches(1)[0])
    assert "| exact" in caplog.text


def test_sizes_are_not_compared_by_time_in_lockstep() -> None:
    step = made(batch_norm="exact")
    sizes = [step(batch).micro_batch_size for batch in make_batches(4)]
    assert sizes == [13] * 4


def test_lockstep_with_micro_statistics_still_warns() -> None:
    with pytest.warns(ga.BatchNormWarning):
        made(micro_batch_size=4, lockstep=True)(make_batches(1)[0])
