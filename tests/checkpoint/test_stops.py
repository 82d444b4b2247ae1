"""A signal to one process: all save at the same update and leave, and a run that goes on is bit for bit undisturbed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga
from ranks import results_of, run_ranks

ROWS = 37
UPDATES = 9


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def job(
    rank: int, world_size: int, folder: str, how: str, stops_at: int | None
) -> tuple[list[Tensor], int, list[bool]]:
    """Trains to the end, or until a signal comes while the body of an update is running."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = TensorDataset(torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1)))
    trains: Any
    objects: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if how == "train step":
        trains = objects["train_step"] = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=2)
    else:
        trains = objects["accumulator"] = ga.Accumulator(model, optimizer, micro_batches=2)
    batch_size = 8 if how == "train step" else 4
    sampler = objects["sampler"] = ga.GlobalBatchSampler(len(data), batch_size, rank=rank, world_size=world_size)
    checkpoint = ga.Checkpoint(folder, on_signal=signal.SIGTERM, **objects)
    checkpoint.load()
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.collate(data), generator=torch.Generator())
    stops: list[bool] = []

    def body() -> None:
        if trains.updates == stops_at and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stops.append(checkpoint.stops)
        (Path(folder) / f"body {rank} {trains.updates}").touch()

    while trains.updates < UPDATES:
        if how == "train step":
            for batch in loader:
                trains(batch)
                body()
        elif how == "windows":
            for window in trains.windows(loader):
                for batch in window:
                    trains.backward(ga.Loss.mean(loss_fn(model, batch), over=len(batch[0])))
                body()
        else:
            items = trains.over(loader)  # as in a progress bar, held by a name
            for batch in items:
                if trains.backward(ga.Loss.mean(loss_fn(model, batch), over=len(batch[0]))):
                    body()
    return [parameter.detach().clone() for parameter in model.parameters()], trains.updates, stops


@pytest.mark.parametrize(("world_size", "how"), [(1, "train step"), (1, "over"), (2, "train step"), (2, "windows")])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, world_size: int, how: str) -> None:
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    for folder in (stopped, undisturbed):
        folder.mkdir()
    for one in run_ranks(job, world_size, str(stopped), how, 3):
        assert one.status == 0, one.stderr
        assert one.result is None
        assert "Traceback" not in one.stderr
    # It was known at once on one process; on several at the next update, whose body was run on all of them.
    last = 3 if world_size == 1 and how != "train step" else 4 - (world_size == 1)
    assert {path.name for path in stopped.glob("body*")} == {
        f"body {rank} {update}" for rank in range(world_size) for update in range(1, last + 1)
    }
    (saved,) = stopped.glob("update-*")
    assert saved.name.startswith(f"update-{last:09}")
    resumed = results_of(job, world_size, str(stopped), how, None)
    whole = results_of(job, world_size, str(undisturbed), how, None)
    for (parameters, updates, stops), (others, others_updates, _) in zip(resumed, whole, strict=True):
        assert updates == others_updates
        assert not any(stops)
        assert all(map(torch.equal, parameters, others))


def test_what_cannot_stop_is_told(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ga.StateError, match="none is among the objects"):
        ga.Checkpoint(tmp_path, model=model, on_signal=signal.SIGTERM)
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn)
    with pytest.raises(ga.StateError, match="cannot be handled"):
        ga.Checkpoint(tmp_path, train_step=step, on_signal=signal.SIGKILL)
