"""The loops on the smallest job: those that make updates make the same ones."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import SINGLE


def test_all_loops_train_alike(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PASSES", 2)
    trained: dict[str, Tensor] = {}
    for name in ("textbook", "textbook_that_cuts", "accumulator", "train_step"):
        made, original = [], script.job
        monkeypatch.setattr(script, "job", lambda made=made, original=original: made.append(original()) or made[-1])
        getattr(script, name)(script.data())
        monkeypatch.setattr(script, "job", original)
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in made[0][0].parameters()])
    for name, parameters in trained.items():
        torch.testing.assert_close(parameters, trained["textbook"], rtol=SINGLE, atol=SINGLE, msg=name)


def test_what_is_written(
    script: ModuleType,
    results_of: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "PASSES", 1)
    monkeypatch.setattr(script, "PEERS", dict.fromkeys(script.PEERS, "nobody_has_this"))
    loops = results_of("--rounds 1")["loops"]
    assert set(loops) == set(script.LOOPS) - set(script.PEERS)
    assert all(set(of) == {"microseconds", "ratio"} for of in loops.values())
    assert loops["textbook loop"]["ratio"] == 1
    assert "of the textbook loop that cuts" in capsys.readouterr().out
