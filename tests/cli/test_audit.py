"""``gradaccum audit``: what it prints, what it writes, and with what status it exits."""

import sys
from pathlib import Path

import pytest

from gradaccum.cli import main

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
import gradaccum as ga

def batch():
    return torch.randn(14, 8), torch.randint(0, 10, (14,))

def loss_fn(model, micro_batch):
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

def exact():
    return ga.Job(nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 10)), loss_fn, batch())

def inexact():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    return ga.Job(model, loss_fn, batch(), micro_batch_size=4)

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
    path = tmp_path / "training_for_audit.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradaccum", "audit", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


def test_exact(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:exact") == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = " ".join(out.split())
    assert "Exact: the accumulated gradient is the whole batch's" in text
    assert "against micro-batches of 8, 6; in float64." in text  # 8 by default


def test_inexact(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:inexact") == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert "against micro-batches of 4, 4, 3, 3" in text  # the job's own size
    assert "Not exact: the accumulated gradient is off by" in text
    assert "1. batch-norm: " in text
    assert "Where: 1 Why: BatchNorm normalises each micro-batch" in text
    assert 'batch_norm="exact"' in text


def test_the_size(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:inexact", "--micro-batch-size", "5") == 1
    assert "against micro-batches of 5, 5, 4" in " ".join(capsys.readouterr().out.split())


def test_a_loss_over_the_batch(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, f"{target}:coupled") == 0


def test_the_page(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "audit.html"
    assert run(monkeypatch, f"{target}:inexact", "--html", str(page)) == 1
    text = page.read_text(encoding="utf-8")
    for expected in ("Is it exact?", "What each does to the gradient by itself", "batch-norm, 1", "biased", "Price: "):
        assert expected in text
    for link in ("<script", "src=", "href="):  # it needs nothing else
        assert link not in text
    assert "Page: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{target}:gone",), "has no function 'gone'"),
        (("{target}:mistaken",), "a gradient needs a scalar"),
        (("{target}:exact", "--html", "gone/audit.html"), "there is no folder gone"),
        (("{target}:exact", "--micro-batch-size", "0"), "Invalid value for '--micro-batch-size'"),
        ((), "Missing argument 'TARGET'"),
    ],
)
def test_what_could_not_run(
    arguments: tuple[str, ...], message: str, target: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(monkeypatch, *(argument.format(target=target) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())


def test_the_help_tells_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 if accumulation is exact, 1 if it is not, 2 if the audit could not run." in out
    for option in ("--html FILE", "--micro-batch-size N"):
        assert option in out
