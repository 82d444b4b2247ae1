"""What a loss function may return: a loss, a plain mean, or a dict of these; anything else says what to return."""

from typing import Any

import pytest
import torch

import gradaccum as ga
from gradaccum.losses.normaliser import SINGLE
from gradaccum.losses.terms import as_terms

X = torch.ones(3, requires_grad=True)
ITEM = "The term 'lm'"


def as_loss(loss: Any, **options: Any) -> ga.Loss:
    return as_terms(loss, **options)[SINGLE]


def mean() -> torch.Tensor:
    return (X * 2).mean()


def test_a_loss_stays_what_it_is() -> None:
    loss = ga.Loss.sum(mean(), over=7)
    assert as_loss(loss, samples=3) is loss
    assert as_loss(loss, samples=None) is loss


def test_a_plain_tensor_is_a_mean_over_the_samples() -> None:
    loss = as_loss(mean(), samples=3)
    assert (loss.weight, loss.is_mean) == (3, True)


def test_a_plain_tensor_is_a_mean_over_what_weights_say() -> None:
    assert as_loss(mean(), samples=3, weights={"": 17}).weight == 17
    assert as_loss(mean(), samples=None, weights={"": 17}).weight == 17
    assert as_terms({"aux": mean()}, samples=3, weights={"lm": 17})["aux"].weight == 3


def test_a_dict_has_its_terms_in_order() -> None:
    terms = as_terms({"lm": mean(), "aux": ga.Loss.sum(mean(), over=9)}, samples=3)
    assert list(terms) == ["lm", "aux"]
    assert [term.weight for term in terms.values()] == [3, 9]


def test_weights_go_to_their_terms() -> None:
    terms = as_terms({"lm": mean(), "aux": mean()}, samples=3, weights={"lm": 11, "aux": 0})
    assert [term.weight for term in terms.values()] == [11, 0]


@pytest.mark.parametrize("zero", [0, 0.0], ids=repr)
def test_a_weight_of_zero_needs_no_graph(zero: Any) -> None:
    assert as_loss(ga.Loss.sum(torch.zeros(()), over=zero), samples=3).weight == 0
    assert as_loss(torch.tensor(float("nan")), samples=0).weight == 0, "a micro-batch of no samples"


def test_a_count_of_zero_in_a_tensor_needs_no_graph_either() -> None:
    as_loss(ga.Loss.sum(torch.zeros(()), over=torch.tensor(0)), samples=3)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        pytest.param(2.5, " is a float, which has no graph.*before .item", id="item"),
        pytest.param(None, " is a NoneType, which has no graph", id="forgotten return"),
        pytest.param((1, 2), " is a tuple of 2: int, int.*for several terms a dict", id="tuple"),
        pytest.param(X * 2, r" has shape \(3,\); a gradient needs a scalar.*over=losses.numel", id="not reduced"),
        pytest.param(
            torch.tensor(2.0), " has no graph: it does not depend on anything that requires a gradient", id="detached"
        ),
        pytest.param(ga.Loss.sum(torch.tensor(2.0), over=2), " has no graph", id="detached Loss"),
        pytest.param(ga.Loss.sum(torch.tensor(2.0)), " has no graph", id="detached sum"),
        pytest.param(torch.tensor(2), " has no graph", id="integer"),
    ],
)
def test_what_is_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(ga.LossError, match="The loss" + message):
        as_loss(loss, samples=3)
    with pytest.raises(ga.LossError, match=ITEM + message):
        as_terms({"aux": mean(), "lm": loss}, samples=3)


def test_a_plain_tensor_where_samples_are_unknown() -> None:
    with pytest.raises(
        ga.LossError, match=r"The loss is a plain tensor.*samples is not known here.*Return ga.Loss.mean"
    ):
        as_loss(mean(), samples=None)
    with pytest.raises(ga.LossError, match=f"{ITEM} is a plain tensor"):
        as_terms({"lm": mean()}, samples=None)


def test_a_dict_of_nothing() -> None:
    with pytest.raises(ga.LossError, match=r"empty dict.*at least one term"):
        as_terms({}, samples=3)


def test_a_dict_in_a_dict() -> None:
    with pytest.raises(ga.LossError, match=f"{ITEM} is a dict, which has no graph"):
        as_terms({"lm": {"inner": mean()}}, samples=3)
