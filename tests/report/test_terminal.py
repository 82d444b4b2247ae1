import io

import pytest

from gradaccum.report.terminal import console, print_error, progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_go_to_stdout_and_numbers_get_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("loss 1.5")
    assert capsys.readouterr() == ("loss 1.5\n", "")


def test_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("It did not run.")
    assert capsys.readouterr() == ("", "gradaccum: It did not run.\n")


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Training", total=2, unit="updates") as advance:
        advance()
        advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_bar_on_stderr_of_a_terminal(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _Terminal()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress("Training", total=2, unit="updates") as advance:
        advance()
    assert capsys.readouterr().out == ""
    if kind == "dumb":
        assert terminal.getvalue() == ""
    else:
        assert "Training" in terminal.getvalue()
        assert "1/2" in terminal.getvalue()


def test_the_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", _Terminal())
    with pytest.raises(ZeroDivisionError), progress("Training", total=2, unit="updates"):
        1 / 0  # noqa: B018
