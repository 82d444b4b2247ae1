"""The option ``fused``."""

from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga
from gradaccum.errors import ParameterError
from gradaccum.gradients.fused.backward import FusedBackward
from gradaccum.gradients.fused.choice import Choice, FusedOption, choice_of
from gradaccum.gradients.graph import read_graph


def choice(fused: FusedOption) -> Choice:
    chosen = choice_of(fused)
    assert chosen is not None
    return chosen


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def test_off_is_no_choice() -> None:
    assert choice_of(False) is None


@pytest.mark.parametrize(
    ("fused", "parameter", "may_pay"),
    [
        pytest.param(True, weight(1, 1), True, id="everywhere: a matrix"),
        pytest.param(True, weight(2, 3, 4), True, id="everywhere: matrices"),
        pytest.param(True, weight(1 << 30), False, id="everywhere: a vector"),
        pytest.param(True, weight(1024, 1024, 3, 3), False, id="everywhere: a kernel"),
        pytest.param("auto", weight(1 << 30), False, id="a vector"),
        pytest.param("auto", weight(1024, 1024, 3, 3), False, id="a kernel"),
        pytest.param("auto", nn.Parameter(torch.empty(768, 768)), True, id="large on the host"),
        pytest.param("auto", nn.Parameter(torch.empty(512, 512)), False, id="small on the host"),
        pytest.param("auto", nn.Parameter(torch.empty(16, 4096)), False, id="LoRA on the host"),
        pytest.param("auto", weight(64, 8192), False, id="LoRA on a device"),
        pytest.param("auto", weight(4096, 4096), False, id="large for a host, on a device"),
        pytest.param("auto", weight(8192, 8192), True, id="large on a device"),
    ],
)
def test_which_weights_may_pay(fused: FusedOption, parameter: nn.Parameter, may_pay: bool) -> None:
    assert choice(fused).may_pay(parameter) == may_pay


def test_for_how_many_rows_it_pays() -> None:
    on_host = nn.Parameter(torch.empty(768, 768))
    assert choice("auto").pays(on_host, 1024)
    assert not choice("auto").pays(on_host, 16_384)
    assert choice(True).pays(weight(1, 1), 10**9)


def test_auto_leaves_a_micro_batch_of_many_rows_to_torch() -> None:
    model = nn.Linear(1024, 512, bias=False)
    fused = FusedBackward(model.parameters(), choice("auto"))
    for rows, is_taken in ((2, True), (2049, False)):
        roots = (model(torch.ones(rows, 1024)).sum(),)
        assert (fused.plan(roots, None, read_graph(roots)) is not None) == is_taken


def test_a_model_without_candidates_is_not_looked_at() -> None:
    model = nn.Linear(2, 1)
    assert not FusedBackward(model.parameters(), choice("auto")).has_candidates


@pytest.mark.parametrize("fused", ["always", None, 1.5])
def test_anything_else_is_refused(fused: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ParameterError, match=r'"auto".*True.*False'):
        ga.Accumulator(model, torch.optim.SGD(model.parameters()), micro_batches=2, fused=fused)
