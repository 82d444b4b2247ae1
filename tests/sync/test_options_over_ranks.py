"""Options about gradients that several processes cannot have: refused on each of them when they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga
from gradaccum.errors import UnsupportedError
from ranks import results_of

OPTIONS: list[dict[str, Any]] = [{"persistent_gradients": True}]


def check_options(rank: int, world_size: int) -> int:
    for options in OPTIONS:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def train_step(model: Any = model, optimizer: Any = optimizer, **given: Any) -> ga.TrainStep:
            return ga.TrainStep(model, optimizer, lambda model, x: model(x).mean(), micro_batch_size=2, **given)

        with pytest.raises(UnsupportedError, match=f"{next(iter(options))}=.* with several processes"):
            train_step(**options)
        train_step(sync="never", **options)(torch.ones(5, 2))
    return rank


def test_they_are_refused_unless_each_process_trains_for_itself() -> None:
    assert results_of(check_options, 2) == [0, 1]
