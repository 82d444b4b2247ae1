"""The entry point: what it says, and with what status it exits."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradaccum as ga

Command = Callable[..., Any]


def test_version(gradaccum: Command) -> None:
    done = gradaccum("--version")
    assert (done.status, done.out) == (0, f"gradaccum {ga.__version__}, torch {torch.__version__}\n")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_the_commands(option: str, gradaccum: Command) -> None:
    done = gradaccum(option)
    assert done.status == 0
    for expected in ("demo", "audit", "plan", "bench", "--version"):
        assert expected in done.out


HELP = {
    "demo": ("0 if the library is exact, 1 if it is not, 2 if the demo could not run.", "--plot FILE"),
    "audit": ("0 if accumulation is exact, 1 if it is not, 2 if the audit could not run.", "--html FILE"),
    "plan": ("0 if a micro-batch fits, 1 if none does, 2 if the plan could not be made.", "--estimate,--device DEVICE"),
    "bench": ("0, or 2 if it could not run.", "--json FILE"),
}
MORE = {"audit": ",--micro-batch-size N", "plan": ",--memory SIZE,--html FILE"}


@pytest.mark.parametrize("command", HELP)
def test_help_tells_the_exit_status(command: str, gradaccum: Command) -> None:
    done, (exit_status, options) = gradaccum(command, "--help"), HELP[command]
    assert done.status == 0
    assert f"Exit status: {exit_status}" in done.text
    assert "..." not in gradaccum("-h").text.replace("[ARGS]...", ""), "no summary is cut"
    if command in MORE:
        assert "def job(): model" in done.text
    for option in (options + MORE.get(command, "")).split(","):
        assert option in done.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "nonsense"),
        ("demo --nonsense", "nonsense"),
        ("audit", "Missing argument 'TARGET'"),
        ("audit {target}:gone", "has no function 'gone'"),
        ("audit {target}:mistaken", "a gradient needs a scalar"),
        ("audit {target}:exact --micro-batch-size 0", "Invalid value for '--micro-batch-size'"),
        ("plan", "Missing argument 'TARGET'"),
        ("plan gone.py:job", "There is no file"),
        ("plan {target}:gone", "has no function 'gone'"),
        ("plan {target}:job --memory 24", "memory='24' is no size"),
        ("plan {target}:mistaken --memory 1GiB", "needs a scalar"),
        ("plan {target}:job --device cuda --memory 1GiB", "(--estimate on the command line), which needs no device"),
        ("plan {target}:job --device cudda --memory 1GiB", "device='cudda' is no device of torch"),
    ],
)
def test_a_wrong_command_could_not_run(arguments: str, message: str, target: str, gradaccum: Command) -> None:
    done = gradaccum(*arguments.format(target=target).split())
    assert (done.status, done.out) == (2, "")
    assert message in done.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(RuntimeError("something broke"), "RuntimeError: something broke\n", id="a crash is no bad news"),
        pytest.param(ga.WindowError("It is wrong."), "gradaccum: It is wrong.\n", id="ours, without a traceback"),
    ],
)
def test_an_error_could_not_run(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, gradaccum: Command
) -> None:
    def fail(**_: object) -> bool:
        raise error

    monkeypatch.setattr(importlib.import_module("gradaccum.cli.demo"), "run_demo", fail)
    done = gradaccum("demo")
    assert done.status == 2
    assert done.err.endswith(message)
    assert ("Traceback" in done.err) is not isinstance(error, ga.GradAccumError)


def test_an_error_of_the_users_begins_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradaccum: Command
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_job.py").write_text("def job():\n    return number('four')\n\nnumber = int\n", encoding="utf-8")
    done = gradaccum("audit", f"{tmp_path}/their_job.py:job")
    assert done.status == 2
    first, line, *_ = done.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert line == f'  File "{tmp_path}/their_job.py", line 2, in job'
    assert "typer" not in done.err
    (tmp_path / "their_slip.py").write_text("def job(:\n", encoding="utf-8")
    done = gradaccum("audit", f"{tmp_path}/their_slip.py:job")
    assert done.status == 2
    assert done.err.startswith(f'  File "{tmp_path}/their_slip.py", line 1\n')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --plot a.docx", "a picture ends in .png, .svg, .pdf"),
        ("demo --plot a", "a picture ends in .png, .svg, .pdf"),
        ("demo --plot no/such/a.png", "there is no folder no/such"),
        ("audit a.py:f --html no/such/a.html", "there is no folder no/such"),
        ("plan a.py:f --html no/such/a.html", "there is no folder no/such"),
        ("bench --json no/such/a.json", "there is no folder no/such"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, gradaccum: Command
) -> None:
    for command in ("demo", "audit", "plan", "bench"):
        module = importlib.import_module(f"gradaccum.cli.{command}")
        monkeypatch.setattr(module, f"run_{command}", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setenv("COLUMNS", "200")
    done = gradaccum(*arguments.split())
    assert (done.status, done.out) == (2, "")
    assert message in done.error


@pytest.mark.parametrize(
    ("arguments", "module", "what", "extra"),
    [
        ("demo", "typer", "command line", "cli"),
        ("demo", "rich", "command line", "cli"),
        ("demo --plot a.png", "matplotlib", "option --plot", "plot"),
        ("audit a.py:f --html a.html", "jinja2", "option --html", "cli"),
        ("plan a.py:f --html a.html", "jinja2", "option --html", "cli"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(
    arguments: str, module: str, what: str, extra: str, monkeypatch: pytest.MonkeyPatch, gradaccum: Command
) -> None:
    monkeypatch.setattr(importlib.import_module("gradaccum.cli.demo"), "tasks", lambda: pytest.fail("the work began"))
    monkeypatch.delitem(sys.modules, "gradaccum.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    done = gradaccum(*arguments.split())
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"gradaccum: The {what} needs {module!r}, which is not installed. Type: pip install {module}; it is in the "
        f"extra {extra!r} of this package.\n"
    )
