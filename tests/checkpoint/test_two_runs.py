"""A folder belongs to one run: nothing that was just saved is removed, and no other run is gone on from in silence."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradaccum as ga
from gradaccum.checkpoint import files
from ranks import SRC


class Job:
    def __init__(self, folder: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        self.model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.step = ga.TrainStep(self.model, optimizer, lambda m, x: m(x).square().mean(), micro_batch_size=2)
        self.checkpoint = ga.Checkpoint(
            folder, keep=keep, keep_every=keep_every, model=self.model, optimizer=optimizer, train_step=self.step
        )

    def train(self, updates: int) -> list[Path]:
        saved: list[Path] = []
        for _ in range(updates):
            self.step(torch.randn(4, 3))
            saved.append(self.checkpoint.save())
        return saved


def updates_in(folder: Path) -> list[int]:
    return sorted(map(files.updates_of, files.newest_first(folder)))


def test_a_new_run_in_the_folder_of_an_old_one(tmp_path: Path) -> None:
    Job(tmp_path).train(10)
    new = Job(tmp_path)
    with pytest.raises(ga.StateError, match=r"update-000000010-\w+.pt, which this run has neither .* at update 1\."):
        new.train(1)
    assert updates_in(tmp_path) == [8, 9, 10]
    # What the message says to type, both ways.
    new.checkpoint.load()
    new.train(1)
    assert updates_in(tmp_path) == [9, 10, 11]
    Job(tmp_path / "own").train(1)


def test_two_runs_at_once(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.train(2)
    second = Job(tmp_path)
    second.checkpoint.load()
    second.train(1)
    with pytest.raises(ga.StateError, match="update-000000003"):
        first.train(1)
    assert updates_in(tmp_path) == [1, 2, 3]


def test_an_older_one_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a loss spike, say: what came later is set aside, not removed."""
    saved = Job(tmp_path, keep=5).train(5)
    again = Job(tmp_path, keep=5)
    assert again.checkpoint.load(saved[1]) == saved[1]
    assert again.step.updates == 2
    with caplog.at_level(logging.INFO, logger="gradaccum"):
        torch.manual_seed(1)  # or update 3 would be the same, bit for bit
        again.train(1)
    assert "3 checkpoints of later updates" in caplog.text
    assert updates_in(tmp_path) == [1, 2, 3]
    assert len(list(tmp_path.glob("aside-*"))) == 3
    other = Job(tmp_path)
    other.checkpoint.load()
    assert torch.equal(other.model.weight, again.model.weight)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path / "folder")
    (path,) = job.train(1)
    with pytest.raises(ga.StateError, match="is no checkpoint: its name carries"):
        job.checkpoint.load(path.rename(tmp_path / "best.pt"))
    with pytest.raises(ga.StateError, match="is not whole: it is not there"):
        job.checkpoint.load(path)
    with pytest.raises(ga.StateError, match="is a file, and checkpoints are kept in a folder"):
        Job(tmp_path / "best.pt")


def test_torn_ones_take_no_place(tmp_path: Path) -> None:
    saved = Job(tmp_path).train(4)
    for path in saved[2:]:
        path.write_bytes(b"half")
    again = Job(tmp_path, keep=2)
    assert again.checkpoint.load() == saved[1]
    again.train(2)
    assert [files.is_whole(path) for path in files.newest_first(tmp_path)] == [True, True]


def test_every_nth_stays(tmp_path: Path) -> None:
    Job(tmp_path, keep=2, keep_every=5).train(13)
    assert updates_in(tmp_path) == [5, 10, 12, 13]
    with pytest.raises(ga.StateError, match="keep_every=0"):
        Job(tmp_path, keep_every=0)


def test_a_later_format(tmp_path: Path) -> None:
    files.write(tmp_path, 1, lambda path: torch.save({"checkpoint format": 3}, path))
    with pytest.raises(ga.StateError, match="has format 3, and this version of gradaccum reads up to 2"):
        Job(tmp_path).checkpoint.load()


def test_a_state_that_does_not_fit(tmp_path: Path) -> None:
    ga.Checkpoint(tmp_path, model=nn.Linear(3, 2)).save()
    with pytest.raises(
        ga.StateError, match=r"(?s)The state of model in .* does not fit: RuntimeError: .*size mismatch"
    ):
        ga.Checkpoint(tmp_path, model=nn.Linear(3, 1)).load()


def test_numpy_draws_go_on(tmp_path: Path) -> None:
    checkpoint = ga.Checkpoint(tmp_path, model=nn.Linear(1, 1))
    checkpoint.save()
    drawn = np.random.rand(3)
    checkpoint.load()
    assert (np.random.rand(3) == drawn).all()


_NO_SPACE = """
import resource, signal, sys, torch, gradaccum as ga
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
checkpoint = ga.Checkpoint(sys.argv[1], model=torch.nn.Linear(200, 200))
try:
    checkpoint.save()
except ga.StateError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no limit for the size of a file")
def test_what_the_system_says(tmp_path: Path) -> None:
    """A disk that is full is said in the system's words, and leaves nothing behind."""
    assert resource.RLIMIT_FSIZE is not None
    command = [sys.executable, "-c", _NO_SPACE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(SRC)})
    assert "Saving failed: File too large" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That is told, and no reason to end a run."""
    remove = files.remove

    def refuse(path: Path) -> None:
        if path.name.startswith("update-"):
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    job = Job(tmp_path, keep=2)
    job.train(2)
    monkeypatch.setattr(files, "remove", refuse)
    (saved,) = job.train(1)
    assert saved.exists()
    assert "older checkpoints could not be removed: Permission denied" in caplog.text
