"""``gradaccum plan``: what it prints, what it writes, and with what status it exits."""

import sys
from pathlib import Path

import pytest

from gradaccum.cli import main

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
import gradaccum as ga

def job():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
    batch = torch.randn(32, 8), torch.randint(0, 10, (32,))

    def loss_fn(model, micro_batch):
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

    return ga.Job(model, loss_fn, batch, torch.optim.AdamW(model.parameters()), 16)

def coupled():
    model = nn.Linear(8, 4)
    return ga.Job(
        model, None, torch.randn(32, 8), forward=lambda model, x: model(x),
        batch_loss=lambda outputs, batch: (outputs @ outputs.t()).mean(),
    )

def mistaken():
    return ga.Job(nn.Linear(8, 4), lambda model, x: model(x), torch.randn(32, 8))
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "training_for_plan.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("gradaccum.fit.probe._SECONDS_PER_SIZE", 0.0)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradaccum", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


def test_a_plan(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:job", "--memory", "1GiB") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines if " yes " in line] == [
        ["1", "32"], ["2", "16"], ["4", "8"], ["8", "4"], ["16", "2"], ["32", "1"],
    ]  # fmt: skip
    text = " ".join(out.split())
    assert "A batch of 32 samples, measured on cpu, budget 1 GiB." in text
    assert "Accumulation is not needed: the whole batch of 32 fits" in text
    assert "The job's own micro_batch_size=16 takes" in text
    assert text.count("take this") == 1


def test_an_estimate(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:job", "--memory", "28KiB", "--estimate", "--device", "cpu") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "estimated for cpu, budget 28 KiB" in text
    assert "is the largest that fits" in text
    assert "The job's own micro_batch_size=16 takes 32.4 KiB and does not fit." in text


def test_nothing_fits(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, f"{target}:job", "--memory", "1KiB", "--estimate") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "Accumulation cannot help: parameters, gradients and optimizer state alone take" in text
    assert "take this" not in text


def test_a_loss_over_the_batch(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"{target}:coupled") == 0
    assert "Note: No optimizer was passed" in capsys.readouterr().out


def test_the_page(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    assert run(monkeypatch, f"{target}:job", "--memory", "1GiB", "--html", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    for expected in ("What fits: ", "budget 1 GiB", "Samples a second", "Accumulation is not needed", "take this"):
        assert expected in text
    assert "Page: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{target}:gone",), "has no function 'gone'"),
        (("gone.py:job",), "There is no file"),
        (("{target}:job", "--memory", "24"), "memory='24' is no size"),
        (("{target}:mistaken", "--memory", "1GiB"), "needs a scalar"),
        (("{target}:job", "--device", "cuda", "--memory", "1GiB"), "method='measure' runs on the model's own device"),
        (("{target}:job", "--html", "gone/plan.html"), "there is no folder gone"),
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


def test_a_missing_jinja_is_named_before_the_work(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(monkeypatch, f"{target}:job", "--html", str(tmp_path / "a.html")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "gradaccum: The option --html needs 'jinja2', which is not installed. Type: pip install 'gradaccum[cli]'\n"
    )


def test_the_help_tells_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 if a micro-batch fits, 1 if none does, 2 if the plan could not be made." in out
    for option in ("--memory SIZE", "--estimate", "--device DEVICE", "--html FILE"):
        assert option in out
