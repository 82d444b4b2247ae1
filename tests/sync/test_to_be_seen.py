"""What is seen of several processes: who waits for whom, ranks in the log, and once what all of them would say."""

import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

import gradaccum as ga
from ranks import results_of
from wrapping import sgd

SLOW = 0.2


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def seen(rank: int, world_size: int) -> dict[str, Any]:
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("gradaccum")
    logger.setLevel(logging.INFO)
    logger.addHandler(Kept())

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if rank == 1:
            time.sleep(SLOW)
        return model(x).square().mean()

    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=4, progress=True, check="off")
    x = torch.randn(4, 3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step(x)
    with profile() as profiled:
        update = step(x)
    model[0].weight.register_hook(lambda g: g * float("inf"))  # type: ignore[index,operator]
    assert step(x).skipped
    step._accumulation.load_state_dict(step.state_dict())
    logger.warning("by itself, 100%% of it: %d", 7)
    return {
        "said": said,
        "warned": [str(one.message) for one in warned if issubclass(one.category, ga.BatchNormWarning)],
        "numbers": update.as_dict(),
        "ranges": {one.key for one in profiled.key_averages() if one.key.startswith("gradaccum.")},
        "has bar": step._bar is not None,
    }


def test_what_is_seen_of_each() -> None:
    first, second = results_of(seen, 2)
    assert first["numbers"]["waiting_seconds"] > 0.8 * SLOW > second["numbers"]["waiting_seconds"]
    assert second["numbers"]["compute_seconds"] > 0.8 * SLOW > first["numbers"]["compute_seconds"]
    for one in (first, second):
        assert one["ranges"] == {"gradaccum.forward", "gradaccum.backward", "gradaccum.reduce", "gradaccum.step"}
    (warning,) = first["warned"]  # one micro-batch on each process couples its samples, too
    assert "normalise each micro-batch (1 here, and those of 1 more processes)" in warning
    assert not second["warned"]
    assert first["has bar"]
    assert not second["has bar"]
    assert second["said"] == ["rank 1: by itself, 100% of it: 7"]
    assert first["said"][-1] == "rank 0: by itself, 100% of it: 7"
    assert first["said"][-2] == "rank 0: update 3 was skipped: its gradient is not finite"
    assert all(line.startswith("rank 0: ") for line in first["said"])
