"""A micro-step with additions and one without: gradients add up in the one, and are put back by the other."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from scripts import benchmark


@pytest.fixture(scope="module")
def additions() -> Iterator[ModuleType]:
    with benchmark("additions") as module:
        yield module


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_one_adds_and_the_other_does_not(additions: ModuleType) -> None:
    model = additions.small().double()
    torch.set_default_dtype(torch.float64)
    loops = additions.loops_of(model, 2, 8)
    first = gradients(model)
    loops["without additions"]()
    torch.testing.assert_close(gradients(model), first, rtol=0, atol=0)
    loops["a micro-step"]()
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in first])


def test_the_shape_is_resnet_50s(additions: ModuleType) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in additions.resnet_50().parameters()) == 25_557_032


def test_what_is_written(
    additions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "additions.json"
    arguments = ["--small", "--images", "1", "--sides", "8", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["additions.py", *arguments])
    additions.main()
    result = json.loads(path.read_text(encoding="utf-8"))["sides"]["8"]["1"]
    assert result["share"] == result["the additions alone"]["ratio"]
    assert "1 of   8 x   8 pixels" in capsys.readouterr().out
