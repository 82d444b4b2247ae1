"""A micro-step with additions and one without: gradients add up in the one, and are put back by the other."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_one_adds_and_the_other_does_not(script: ModuleType) -> None:
    model = script.small().double()
    torch.set_default_dtype(torch.float64)
    loops = script.loops_of(model, 2, 8)
    first = gradients(model)
    loops["without additions"]()
    torch.testing.assert_close(gradients(model), first, rtol=0, atol=0)
    loops["a micro-step"]()
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in first])


def test_the_shape_is_resnet_50s(script: ModuleType) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in script.resnet_50().parameters()) == 25_557_032


def test_what_is_written(results_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = results_of("--small --images 1 --sides 8 --rounds 1")["sides"]["8"]["1"]
    assert result["share"] == result["the additions alone"]["ratio"]
    assert "1 of   8 x   8 pixels" in capsys.readouterr().out
