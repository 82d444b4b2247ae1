"""The layers by name, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradaccum as ga
from gradaccum.whole_batch.batch_norm.find import Layers, batch_norms, refuse_compiled, refuse_synchronised
from gradaccum.whole_batch.batch_norm.intercept import Call


def call_of(layer: nn.modules.batchnorm._BatchNorm) -> Call:
    return Call(
        input=torch.zeros(2, layer.num_features), running_mean=layer.running_mean, running_var=layer.running_var,
        weight=layer.weight, bias=layer.bias, momentum=0.1, eps=1e-5,
    )  # fmt: skip


def test_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2, affine=False)))
    untracked = nn.BatchNorm1d(2, track_running_stats=False)
    layers = Layers([model, nn.Sequential(untracked), nn.BatchNorm1d(3)])
    assert layers.name(call_of(model[1][0])) == "0.1.0"
    assert layers.name(call_of(model[1][1])) == "0.1.1"
    assert layers.name(call_of(untracked)) == "1.0"
    assert Layers([untracked]).name(call_of(untracked)) == "BatchNorm1d"
    nameless = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    assert layers.name(call_of(nameless)) == "a batch norm of 5 channels"
    assert layers.may_have(call_of(nameless))
    assert not layers.may_have(call_of(nn.BatchNorm1d(2)))
    assert layers.of(call_of(nn.BatchNorm1d(2))) is None
    assert len(batch_norms([model, untracked])) == 3


def test_keys_tell_layers_apart() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    layers = Layers([nn.Sequential(one, other)])
    assert layers.key(call_of(one)) == layers.key(call_of(one)) != layers.key(call_of(other))


def test_compiled_parts_without_batch_norm_are_fine() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].compile(backend="eager")
    refuse_compiled([model], wanted="this")
    model[1].compile(backend="eager")
    with pytest.raises(ga.UnsupportedError, match=r"this has to see .* '1' is run by torch.compile"):
        refuse_compiled([model], wanted="this")


def test_layers_that_synchronise_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(2))
    refuse_synchronised([model])
    two = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(torch, "distributed", two)
    with pytest.raises(ga.UnsupportedError, match="between 2 processes by itself"):
        refuse_synchronised([model])
    refuse_synchronised([nn.BatchNorm1d(2)])
    refuse_synchronised([model.eval()])
