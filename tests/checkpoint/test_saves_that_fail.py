"""A save or a load that fails on one process is heard of on all, which go on together."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gradaccum as ga
from gradaccum.checkpoint import files
from ranks import results_of


class Failing:
    """Cannot give its state on one rank."""

    def __init__(self, rank: int) -> None:
        self.fails = dist.get_rank() == rank

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise KeyError("moments")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["GRADACCUM_TEST_FOLDER"],)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def job(folder: Path, how: str, **others: Any) -> tuple[ga.TrainStep, ga.Checkpoint]:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 4)
    if how == "FSDP2":
        fully_shard(model)
    elif how == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=2)
    return step, ga.Checkpoint(folder, model=model, optimizer=optimizer, train_step=step, **others)


def fails_and_goes_on(rank: int, world_size: int, folder: str, how: str) -> list[Any]:
    said: list[Any] = []
    root = Path(folder)
    # A file is put where the folder was to be, after the checkpoint had looked.
    step, checkpoint = job(root / "taken", how)
    failing, other = job(root / "state", how, failing=Failing(1))
    third, refusing = job(root / "refused", how)
    if rank == 1:  # what cannot be saved is in one process's optimizer alone
        optimizer = refusing._objects["optimizer"]
        optimizer.param_groups[0]["note"] = Failing
    dist.barrier()
    if rank == 0:
        (root / "taken").write_text("")
    dist.barrier()
    for saving, training in ((checkpoint, step), (other, failing), (refusing, third)):
        training(torch.randn(4, 4))
        begun = time.monotonic()
        with pytest.raises(ga.StateError) as raised:
            saving.save()
        assert time.monotonic() - begun < 20  # and not the process group's timeout
        said.append(str(raised.value))
        said.append(training(torch.randn(4, 4)).index)  # all go on
    return said


@pytest.mark.parametrize("how", ["plain", "FSDP2"])
def test_all_hear_of_it_and_go_on(tmp_path: Path, how: str) -> None:
    for said in results_of(fails_and_goes_on, 2, str(tmp_path), how):
        assert "is a file, and checkpoints are kept in a folder" in said[0]
        assert "rank 1: KeyError: 'moments'" in said[2]
        assert "['param_groups'][0]['note'] is a" in said[4]
        assert said[1] == said[3] == said[5] == 2
    assert not list((tmp_path / "state").glob("*"))


def replaces_the_index(rank: int, world_size: int, folder: str) -> str:
    os.environ["GRADACCUM_TEST_FOLDER"] = f"{folder}/made by code of the file"
    step, checkpoint = job(Path(folder) / "run", "FSDP2")
    step(torch.randn(4, 4))
    path = checkpoint.save()
    if rank == 0:
        (path / ".metadata").write_bytes(pickle.dumps(RunsCode()))
        sums = files.digests(path)
        path.rename(path.with_name(path.name + ".tmp"))
        files.publish(path.with_name(path.name + ".tmp"), 9, sums)
    dist.barrier()
    with pytest.raises(ga.StateError) as raised:
        checkpoint.load()
    return str(raised.value)


def test_the_index_of_shards_runs_no_code(tmp_path: Path) -> None:
    for said in results_of(replaces_the_index, 2, str(tmp_path)):
        assert "asks for posix.mkdir, which is no part of one" in said
    assert not (tmp_path / "made by code of the file").exists()
