"""The command line in this process, and a training to point it at."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradaccum.cli import main


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """What it printed, without line breaks."""
        return " ".join(self.out.split())

    @property
    def error(self) -> str:
        """What it complained of, without line breaks."""
        return " ".join(self.err.split())


Command = Callable[..., Done]


@pytest.fixture
def gradaccum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line with some arguments."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["gradaccum", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return Done(caught.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
import gradaccum as ga

def loss_fn(model, micro_batch):
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

def job(rows=32):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
    batch = torch.randn(rows, 8), torch.randint(0, 10, (rows,))
    return ga.Job(model, loss_fn, batch, torch.optim.AdamW(model.parameters()), 16)

def exact():
    return ga.Job(nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 10)), loss_fn, job(14).batch)

def inexact():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    return ga.Job(model, loss_fn, job(14).batch, micro_batch_size=4)

def deep():
    blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 500, 10))
    batch = torch.randn(4, 500, 32), torch.randint(0, 10, (4,))
    return ga.Job(model, loss_fn, batch, torch.optim.SGD(model.parameters(), lr=0.1))

def coupled():
    return ga.Job(
        nn.Linear(8, 4), None, torch.randn(14, 8), forward=lambda model, x: model(x),
        batch_loss=lambda outputs, batch: (outputs @ outputs.t()).logsumexp(1).mean(),
    )

def mistaken():
    return ga.Job(nn.Linear(8, 4), lambda model, x: model(x), torch.randn(14, 8))
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Path of a file with training runs."""
    path = tmp_path / "training_for_commands.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(path)
