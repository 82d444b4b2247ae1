"""The option ``fused``."""

from __future__ import annotations

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


def test_everywhere_takes_every_matrix() -> None:
    assert choice(True).may_pay(weight(1, 1))
    assert choice(True).may_pay(weight(2, 3, 4))
    assert choice(True).pays(weight(1, 1), 10**9)


@pytest.mark.parametrize("fused", ["auto", True])
def test_vectors_and_kernels_are_never_taken(fused: FusedOption) -> None:
    assert not choice(fused).may_pay(weight(1 << 30))
    assert not choice(fused).may_pay(weight(1024, 1024, 3, 3))


def test_auto_takes_large_weights_that_see_few_rows() -> None:
    on_host = nn.Parameter(torch.empty(768, 768))
    assert choice("auto").may_pay(on_host)
    assert choice("auto").pays(on_host, 1024)
    assert not choice("auto").pays(on_host, 16_384)
    assert not choice("auto").may_pay(nn.Parameter(torch.empty(512, 512)))


def test_auto_does_not_take_the_matrices_of_lora() -> None:
    assert not choice("auto").may_pay(nn.Parameter(torch.empty(16, 4096)))
    assert not choice("auto").may_pay(weight(64, 8192))


def test_auto_takes_larger_ones_on_devices() -> None:
    assert not choice("auto").may_pay(weight(4096, 4096))
    assert choice("auto").may_pay(weight(8192, 8192))


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
