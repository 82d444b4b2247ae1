"""The entry point: what it says, and with what status it exits."""

import importlib
import sys

import pytest
import torch

import gradaccum as ga
from gradaccum.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradaccum", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gradaccum {ga.__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help_names_the_commands(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "--version" in out


def test_help_of_the_demo_tells_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "demo", "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 if the library is exact, 1 if it is not, 2 if the demo could not run." in out
    assert "--plot FILE" in out


@pytest.mark.parametrize("arguments", [("nonsense",), ("demo", "--nonsense")])
def test_a_wrong_command_could_not_run(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_a_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "gradaccum.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert run(monkeypatch, "demo") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"gradaccum: The command line needs {module!r}, which is not installed. Type: pip install 'gradaccum[cli]'\n"
    )


def test_a_crash_is_not_taken_for_bad_news(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(**_: object) -> bool:
        raise RuntimeError("something broke")

    monkeypatch.setattr(importlib.import_module("gradaccum.cli.demo.command"), "run_demo", crash)
    assert run(monkeypatch, "demo") == 2
    assert "RuntimeError: something broke" in capsys.readouterr().err


def test_an_error_of_the_library_is_a_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> bool:
        raise ga.WindowError("The window is wrong.")

    monkeypatch.setattr(importlib.import_module("gradaccum.cli.demo.command"), "run_demo", refuse)
    assert run(monkeypatch, "demo") == 2
    assert capsys.readouterr().err == "gradaccum: The window is wrong.\n"
