"""All loops that are timed against each other make the same update."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oracle import EXACT


def make_job(script: ModuleType) -> Any:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    return script.Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        micro_batches=script.pieces(batch, 3),
    )


def trained(job: Any, loop: Any, updates: int = 2) -> torch.Tensor:
    """The parameters after some updates, which are then undone."""
    start = copy.deepcopy(job.model.state_dict())
    for _ in range(updates):
        loop()
    flat = torch.cat([parameter.detach().flatten().clone() for parameter in job.model.parameters()])
    job.model.load_state_dict(start)
    return flat


def test_ours_and_the_textbook_loop_are_the_whole_batch(script: ModuleType) -> None:
    job = make_job(script)
    whole = trained(job, script.textbook(job.cut(12)))
    for loop in (script.textbook(job), script.accumulator(job, fused=True), script.train_step(job, 3)):
        torch.testing.assert_close(trained(job, loop), whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["accelerate", "fabric"])
def test_peers_make_the_same_update_on_a_shared_job(
    name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # importing lightning sets it, and leaves it
    pytest.importorskip({"fabric": "lightning"}.get(name, name))
    job = make_job(script)
    ours, theirs = script.accumulator(job), getattr(script, name)(job)
    expected = trained(job, script.textbook(job))
    for loop in (theirs, ours, theirs):
        torch.testing.assert_close(trained(job, loop), expected, rtol=0, atol=EXACT)


def test_a_peer_that_is_not_installed_is_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PEERS", {"Accelerate": "nobody_has_this"})
    assert script.peers() == {}
    assert capsys.readouterr().out == "Accelerate is not installed: left out\n"
