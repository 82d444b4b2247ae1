"""Batch norms handed over: to whom, from which thread, and that torch is as it was."""

import dataclasses
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.whole_batch.batch_norm.layers import Call, calls, replaced

ORIGINAL = F.batch_norm


class Recorder:
    """Answers with a number, and keeps the calls."""

    def __init__(self, *, knows: bool = True) -> None:
        self.calls: list[tuple[str, Call]] = []
        self.knows = knows

    def first(self, call: Call) -> Tensor:
        self.calls.append(("first", call))
        return torch.full_like(call.input, 1.0)

    def again(self, call: Call) -> Tensor | None:
        self.calls.append(("again", call))
        return torch.full_like(call.input, 2.0) if self.knows else None


X = torch.randn(4, 3)


def test_a_forward_is_handed_over() -> None:
    recorder, layer = Recorder(), nn.BatchNorm1d(3, momentum=0.3, eps=1e-3)
    with replaced(), calls.in_forward(recorder.first):
        assert layer(X)[0, 0] == 1
    ((kind, call),) = recorder.calls
    assert kind == "first"
    assert call.input is X
    assert call.running_mean is layer.running_mean
    assert (call.weight, call.bias) == (layer.weight, layer.bias)
    assert (call.momentum, call.eps) == (0.3, 1e-3)
    assert F.batch_norm is ORIGINAL


def test_evaluation_is_not() -> None:
    recorder, layer = Recorder(), nn.BatchNorm1d(3).eval()
    expected = layer(X)
    with replaced(), calls.in_forward(recorder.first), calls.in_backward(recorder.again):
        assert torch.equal(layer(X), expected)
    assert recorder.calls == []


def test_what_nobody_takes_over_is_torchs() -> None:
    expected = nn.BatchNorm1d(3)(X)
    with replaced():
        assert torch.equal(nn.BatchNorm1d(3)(X), expected)
        stranger = Recorder(knows=False)
        with calls.in_backward(stranger.again):
            assert torch.equal(nn.BatchNorm1d(3)(X), expected)
        assert len(stranger.calls) == 1


def test_the_innermost_backward_that_knows_it() -> None:
    outer, inner = Recorder(), Recorder(knows=False)
    with replaced(), calls.in_backward(outer.again), calls.in_backward(inner.again):
        assert nn.BatchNorm1d(3)(X)[0, 0] == 2
    assert [len(one.calls) for one in (outer, inner)] == [1, 1]


def test_other_threads_forward_is_their_own() -> None:
    recorder = Recorder()
    found: list[Any] = []
    with replaced(), calls.in_forward(recorder.first):
        thread = threading.Thread(target=lambda: found.append(nn.BatchNorm1d(3)(X)))
        thread.start()
        thread.join()
    assert recorder.calls == []
    assert torch.equal(found[0], nn.BatchNorm1d(3)(X))


def test_held_by_two_that_end_in_any_order() -> None:
    one, other = replaced(), replaced()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with calls.in_forward((recorder := Recorder()).first):
        nn.BatchNorm1d(3)(X)
    assert len(recorder.calls) == 1
    other.__exit__(None, None, None)
    assert F.batch_norm is ORIGINAL


def test_somebody_elses_replacement_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return ORIGINAL(*args, **kwargs) * 3

    with replaced():
        monkeypatch.setattr(F, "batch_norm", theirs)
    assert F.batch_norm is theirs


def test_a_wrapper_around_the_replacement_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the replacement, which calls what it has found: the wrapper."""
    with replaced():
        ours = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *args, **kwargs: ours(*args, **kwargs) + 1)
    with replaced(), calls.in_forward((recorder := Recorder()).first):
        layer = nn.BatchNorm1d(3)
        layer(X)
    expected = layer.eval()(X)
    with replaced():
        assert torch.equal(layer(X), expected)
    assert len(recorder.calls) == 1


def test_torchs_own_for_a_call() -> None:
    layer = nn.BatchNorm1d(3)
    expected = nn.BatchNorm1d(3)(X[:2])
    recorder = Recorder()
    with replaced(), calls.in_forward(recorder.first):
        layer(X)
        found = dataclasses.replace(recorder.calls[0][1], input=X[:2], running_mean=None, running_var=None).by_torch()
    assert torch.equal(found, expected)
