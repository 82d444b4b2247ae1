"""A run that is killed and goes on ends where the undisturbed one does."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga
from gradaccum.checkpoint import files
from oracle import assert_same_gradients
from ranks import SRC, TESTS, results_of
from wrapping import full_tensor, wrapped

SECONDS = 300


class Parts:
    """A training run in a state of its own, made anew after each stop."""

    def __init__(self, folder: Path, *, micro_batch_size: int = 2, wrap: Any = None) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(23, 4, dtype=torch.float64)
        data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
        self.plain = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 1)).double()
        self.model: nn.Module = self.plain if wrap is None else wrap(self.plain)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.5)
        self.step = ga.TrainStep(
            self.model, self.optimizer, loss_fn, micro_batch_size=micro_batch_size, scheduler=self.scheduler
        )
        self.sampler = ga.GlobalBatchSampler(23, 5)
        # A generator of its own: a loader draws from it whenever an iteration begins, and one begins after each stop.
        collate = self.sampler.collate(data)
        self.loader = DataLoader(data, batch_sampler=self.sampler, collate_fn=collate, generator=torch.Generator())
        self.history = History()
        saved: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        saved |= {"train_step": self.step, "sampler": self.sampler, "history": self.history}
        self.checkpoint = ga.Checkpoint(folder, **saved)

    def train(self, updates: int) -> None:
        while self.step.updates < updates:
            for batch in self.loader:
                update = self.step(batch)
                self.history.losses.append(update.loss.item())
                self.history.samples.append(self.step.samples)
                self.checkpoint.save()
                if self.step.updates == updates:
                    return

    def parameters(self) -> dict[str, Tensor]:
        return {name: full_tensor(parameter).detach().clone() for name, parameter in self.plain.named_parameters()}

    def assert_same(self, whole: Parts, *, tolerance: float) -> None:
        assert_same_gradients(self.parameters(), whole.parameters(), tolerance=tolerance)
        assert_same_history(self.history.state_dict(), whole, tolerance=tolerance)


def assert_same_history(history: dict[str, Any], whole: Parts, *, tolerance: float) -> None:
    assert history["samples"] == whole.history.samples
    assert all(abs(a - b) <= tolerance for a, b in zip(history["losses"], whole.history.losses, strict=True))


class History:
    """What was trained with, in order; saved and loaded with the rest, as a log would be."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.samples: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "samples": list(self.samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.samples = state["losses"], state["samples"]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Parts(tmp_path / "whole")
    whole.train(13)
    for updates in (4, 5, 6, 9, 13):  # an epoch has 5
        again = Parts(tmp_path / "stopped")
        again.checkpoint.load()
        again.train(updates)
    again.assert_same(whole, tolerance=0.0)
    assert again.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert len(files.newest_first(tmp_path / "stopped")) == 3


def test_a_torn_one_is_noticed_and_the_one_before_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(tmp_path)
    parts.train(2)
    newest, before = files.newest_first(tmp_path)
    content = newest.read_bytes()
    # Every length of such a file in `test_files`; here what the whole way makes of some, the ends among them.
    for length in (0, 1, 2, 63, len(content) // 2, len(content) - 22, len(content) - 1):
        newest.write_bytes(content[:length])
        caplog.clear()
        again = Parts(tmp_path)
        assert again.checkpoint.load() == before
        assert again.step.updates == 1
        assert "is not whole any more" in caplog.text
    before.write_bytes(b"")
    with pytest.raises(ga.StateError, match="None of the 2 checkpoints"):
        Parts(tmp_path).checkpoint.load()


def test_where_the_loader_has_read_ahead(tmp_path: Path) -> None:
    """An accumulator looks one micro-batch ahead; the sampler is saved where training stands."""
    parts = Parts(tmp_path)
    accumulator = ga.Accumulator(parts.model, parts.optimizer, micro_batches=2)
    checkpoint = ga.Checkpoint(tmp_path / "own", accumulator=accumulator, sampler=parts.sampler)
    for batch in accumulator.over(parts.loader):
        if accumulator.backward(loss_fn(parts.model, batch)) and accumulator.updates == 1:
            checkpoint.save()
        elif accumulator.updates == 1:
            with pytest.raises(ga.StateError, match="A window is open"):
                checkpoint.save()
    sampler = ga.GlobalBatchSampler(23, 5)
    ga.Checkpoint(tmp_path / "own", sampler=sampler, accumulator=accumulator).load()
    assert sampler.state_dict()["updates"] == 2
    assert sampler.state_dict()["samples"] == 10


def test_what_does_not_fit(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.train(1)
    with pytest.raises(ga.StateError, match=r"holds the state of .*not all of what is to be loaded \(model, ema\)"):
        ga.Checkpoint(tmp_path, model=parts.model, ema=copy.deepcopy(parts.model)).load()
    for objects, message in (
        ({"seed": 7}, "nothing to save of seed"),
        ({}, "nothing to save of nothing"),
        ({"keep": 1, "model": parts.model}, "keep=1"),
    ):
        with pytest.raises(ga.StateError, match=message):
            ga.Checkpoint(tmp_path, **objects)
    assert ga.Checkpoint(tmp_path / "empty", model=parts.model).load() is None


def test_nothing_but_data_is_loaded(tmp_path: Path) -> None:
    """A checkpoint that would run code is refused by torch."""
    path = files.write(tmp_path, 1, lambda partial: torch.save({"model": Parts}, partial))
    assert files.is_whole(path)
    with pytest.raises(ga.StateError, match="nothing of it was run or loaded"):
        ga.Checkpoint(tmp_path, model=nn.Linear(1, 1)).load()


# --------------------------------------------------------------------------------------------------- several processes
def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def resumes(rank: int, world_size: int, folder: str, how: str, updates: int) -> Any:
    def wrap(model: nn.Module) -> nn.Module:
        return fully_shard(no_dropout(model)) if how == "FSDP2" else wrapped(no_dropout(model), how)

    parts = Parts(Path(folder), wrap=wrap, micro_batch_size=1 + world_size)
    parts.checkpoint.load()
    parts.train(updates)
    return parts.parameters(), parts.history.state_dict()


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_goes_on_with_another_number_of_processes(tmp_path: Path, how: str) -> None:
    whole = Parts(tmp_path / "whole", wrap=no_dropout)
    whole.train(7)
    for world_size, updates in ((2, 3), (1, 7)):
        results = results_of(resumes, world_size, str(tmp_path / "stopped"), how, updates)
    for parameters, history in results:
        assert_same_gradients(parameters, whole.parameters())
        assert_same_history(history, whole, tolerance=1e-12)


# --------------------------------------------------------------------------------------------------------------- kills
# A process of its own that trains in forked children, since a fork costs nothing once torch has been imported; they
# are killed after a random time. Each kill is in another phase of training and saving.
_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_checkpoint
import torch.distributed as dist
folder, what, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
is_equal = what == "equal"
wrap = None if is_equal else test_checkpoint.no_dropout
chance = random.Random(0)

warm = test_checkpoint.Parts(folder / "warm")  # what torch imports when it is first asked for
warm.checkpoint.save()
warm.checkpoint.load()

def run(size, updates, kill, rank, world_size):
    child = os.fork()
    if child:
        return child
    if world_size > 1:
        store = dist.FileStore(str(folder.parent / f"store-{{kill}}"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    parts = test_checkpoint.Parts(folder, micro_batch_size=size, wrap=wrap)
    parts.checkpoint.load()
    parts.train(updates)
    os._exit(0)

def newest():
    return max((path.name for path in folder.glob("update-*")), default="")

for kill in range(kills):
    before = newest()
    world_size = chance.randint(1, 3) if what == "processes" else 1
    size = 2 if is_equal else chance.randint(1, 5)
    children = [run(size, 10**9, kill, rank, world_size) for rank in range(world_size)]
    while newest() == before:  # each gets one update further at least, however busy the machine is
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.03))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
parts = test_checkpoint.Parts(folder, micro_batch_size=2, wrap=wrap)
parts.checkpoint.load()
print(parts.step.updates)
"""


@pytest.mark.parametrize("sizes", ["equal", "changing", "processes"])
def test_killed_twenty_times(tmp_path: Path, sizes: str) -> None:
    wrap, tolerance = (None, 0.0) if sizes == "equal" else (no_dropout, 1e-12)
    script = _KILLER.format(tests=str(TESTS), here=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), sizes, "20"]
    environment = {"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    updates = int(done.stdout)
    assert updates >= 20  # in several epochs
    killed = Parts(tmp_path / "killed", wrap=wrap)
    killed.checkpoint.load()
    assert killed.step.updates == updates

    whole = Parts(tmp_path / "whole", wrap=wrap)
    whole.train(updates)
    killed.assert_same(whole, tolerance=tolerance)
