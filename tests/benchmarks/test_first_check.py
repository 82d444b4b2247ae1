"""The cost of the check is that of a few samples: both jobs pass it, and the ratio is of one run."""

from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize("name", ["gpt", "pictures"])
def test_both_jobs_are_checked_and_exact(script: ModuleType, name: str) -> None:
    model, loss, (inputs, targets) = script.gpt(1, 64) if name == "gpt" else script.pictures(8)
    batch = (inputs[:, :8], targets[:, :8]) if name == "gpt" else (inputs[..., :32, :32], targets)
    step = script.make_step((model, loss, batch))
    step(batch)
    assert step._accumulation.plan_line.evidence == "exact (checked on 5 + 3 samples)"


def test_the_ratio_is_of_one_run(script: ModuleType) -> None:
    model = torch.nn.Linear(3, 1)
    job = model, lambda m, x: m(x).square().mean(), torch.randn(script.ROWS, 3)
    found = script.cost(job, 1)
    assert found["share"] == pytest.approx(found["check_seconds"] / found["update_seconds"] / script.UPDATES)
