"""The loops on the smallest job: those that make updates make the same ones."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from oracle import SINGLE
from scripts import benchmark


@pytest.fixture(scope="module")
def overhead() -> Iterator[ModuleType]:
    with benchmark("overhead") as module:
        yield module


def test_all_loops_train_alike(overhead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "PASSES", 2)
    trained: dict[str, Tensor] = {}
    for name in ("textbook", "textbook_that_cuts", "accumulator", "train_step"):
        made, original = [], overhead.job
        monkeypatch.setattr(overhead, "job", lambda made=made, original=original: made.append(original()) or made[-1])
        getattr(overhead, name)(overhead.data())
        monkeypatch.setattr(overhead, "job", original)
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in made[0][0].parameters()])
    for name, parameters in trained.items():
        torch.testing.assert_close(parameters, trained["textbook"], rtol=SINGLE, atol=SINGLE, msg=name)


def test_what_is_written(
    overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "overhead.json"
    monkeypatch.setattr(overhead, "PASSES", 1)
    monkeypatch.setattr(overhead, "PEERS", dict.fromkeys(overhead.PEERS, "nobody_has_this"))
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--rounds", "1", "--json", str(path)])
    overhead.main()
    loops = json.loads(path.read_text(encoding="utf-8"))["loops"]
    assert set(loops) == set(overhead.LOOPS) - set(overhead.PEERS)
    assert all(set(of) == {"microseconds", "ratio"} for of in loops.values())
    assert loops["textbook loop"]["ratio"] == 1
    assert "of the textbook loop that cuts" in capsys.readouterr().out
