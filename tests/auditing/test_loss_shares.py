"""Shares solved from gradients: on outputs and on parameters alike, and what they turn out to be."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from gradaccum.auditing import loss_shares
from gradaccum.auditing.audit_run import AS_IT_IS, Runs
from gradaccum.auditing.loss_shares import LossFinding, find_loss_shares
from gradaccum.checking.pieces import pieces

SIZES = [5, 4, 4]

CASES = {
    "samples": (zoo.mlp, zoo.classes, zoo.vectors, "samples"),
    "targets": (zoo._TOKENS, zoo.tokens, zoo.sequences, "targets that are not ignored"),
    "a mask": (zoo._TOKENS, zoo.masked_mean, zoo.sequences, "what it was divided by"),
    "class weights": (zoo.mlp, zoo.weighted, zoo.vectors, "the sum of class weights"),
    "smoothed": (zoo.mlp, zoo.weighted_smoothed, zoo.vectors, "the sum of class weights"),
    "a sum": (zoo.mlp, zoo.plain_sum, zoo.vectors, "a plain sum"),
    "told": (zoo._TOKENS, zoo.tokens_told, zoo.sequences, "what it says"),
    "a penalty besides": (zoo.mlp, zoo.penalised, zoo.vectors, "samples"),
}


def shares_of(model: nn.Module, loss: zoo.LossFunction, batch: object, sizes: Sequence[int] = SIZES) -> LossFinding:
    found = find_loss_shares(Runs(zoo.task(model, loss, batch), is_double=True), pieces(sizes), AS_IT_IS)
    assert found is not None
    return found


@pytest.fixture(params=["outputs", "parameters"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "parameters":
        monkeypatch.setattr(loss_shares, "_solve_on_outputs", lambda *_: None)
    return request.param


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(("model", "loss", "batch", "over"), CASES.values(), ids=CASES.keys())
def test_what_a_loss_is_a_mean_over(model: Any, loss: zoo.LossFunction, batch: Any, over: str) -> None:
    found = shares_of(model(), loss, batch())
    assert (found.is_coupled, found.over) == (False, over)
    assert found.residual < 1e-12


def test_the_shares_themselves() -> None:
    batch = zoo.sequences()
    found = shares_of(zoo._TOKENS(), zoo.tokens, batch)
    counts = torch.stack([(part != -100).sum() for part in batch[1].split(SIZES)]).double()
    assert found.shares == pytest.approx((counts / counts.sum()).tolist(), rel=1e-12)


@pytest.mark.parametrize("loss", [zoo.dice, zoo.hardest, zoo.root], ids=["dice", "hardest", "root"])
def test_losses_that_couple_samples(loss: zoo.LossFunction, where: str) -> None:
    found = shares_of(zoo.mlp(), loss, zoo.vectors(), [4, 3, 3, 3])
    assert found.is_coupled
    assert (found.shares is not None) == (loss is zoo.root)  # of which only the size depends on the others
    assert (found.output_gradients is not None) == (where == "outputs")


def test_too_few_parameters_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_shares, "_solve_on_outputs", lambda *_: None)
    model = nn.Linear(zoo.FEATURES, 1, bias=False)
    task = zoo.task(model, lambda model, batch: model(batch[0]).square().mean().sqrt(), zoo.vectors())
    assert find_loss_shares(Runs(task, is_double=True), pieces([3, 3, 3, 4]), AS_IT_IS) is None
