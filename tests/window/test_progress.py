"""The progress bar moves inside a window and ends at its total."""

import functools
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gradaccum as ga
from gradaccum.window.progress import ProgressBar
from pairs import X, Y, make_accumulator, make_step, pairs, squares


@pytest.fixture
def _drawn_at_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto

    monkeypatch.setattr(tqdm.auto, "tqdm", functools.partial(tqdm.auto.tqdm, mininterval=0, miniters=0, ncols=80))


def update(loss: float = 0.25) -> Any:
    return SimpleNamespace(loss=torch.tensor(loss))


def positions(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"([0-9.]+)(?:/[0-9?]+)? updates", text)]


@pytest.mark.usefixtures("_drawn_at_every_change")
def test_it_moves_inside_a_window_and_ends_at_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(total=3, description="train")
    for _ in range(3):
        for done in (1, 2, 3, 4):
            bar.inside(done, 4)
        bar.updated(update())
    assert bar._bar.n == 3
    bar.close()

    out, drawn = capsys.readouterr()
    assert out == "", "what a program prints is the program's"
    found = positions(drawn)
    assert found == sorted(found), "it never goes back"
    assert {0.2, 0.5, 0.8, 1.0, 2.5, 3.0} <= set(found), drawn
    assert found[-1] == 3.0
    assert "train" in drawn
    assert "100%" in drawn
    assert "3.0/3 updates [" in drawn
    assert "loss=0.25" in drawn.replace(" ", "")
    assert drawn.endswith("\n"), "and is closed"


@pytest.mark.parametrize("total", [1, 7, 391])
@pytest.mark.usefixtures("_drawn_at_every_change", "capsys")
def test_the_position_is_exact(total: int) -> None:
    """Thirds are no binary fractions: added up, they would end beside the total."""
    bar = ProgressBar(total=total)
    for i in range(total):
        for done in (1, 2, 3):
            bar.inside(done, 3)
        assert i < bar._bar.n < i + 1
        bar.updated(update())
        assert bar._bar.n == i + 1
    bar.close()


@pytest.mark.usefixtures("_drawn_at_every_change")
def test_a_window_that_is_not_yet_closed_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(total=2)
    bar.inside(4, 4)
    assert 0.98 < bar._bar.n < 1
    bar.inside(5, 4)
    bar.inside(0, 0)
    assert 0 <= bar._bar.n < 1
    bar.close()
    assert "2.0/2" not in capsys.readouterr().err


@pytest.mark.usefixtures("_drawn_at_every_change")
@pytest.mark.parametrize("total", [None, 4])
def test_closed_where_it_stands_and_closed_twice(total: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(total=total)
    bar.inside(1, 2)
    bar.updated(update(1e-9))
    bar.close()
    bar.close()
    drawn = capsys.readouterr().err
    assert positions(drawn)[-1] == 1.0
    assert " 25%" in drawn if total else "%" not in drawn
    assert "loss=1e-9" in drawn.replace("1e-09", "1e-9")
    bar.inside(1, 2)  # a window that goes on after the bar has ended draws nothing
    bar.updated(update())
    assert capsys.readouterr().err == ""


def test_the_loss_is_read_at_the_bars_own_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it waits for the device, so it is not done for every update, but for the last."""
    bar, clock, read = ProgressBar(total=101), SimpleNamespace(now=0.0), []

    class Update:
        @property
        def loss(self) -> torch.Tensor:
            read.append(bar._updates)
            return torch.tensor(1.0)

    monkeypatch.setattr(bar._bar, "_time", lambda: clock.now)  # no test waits
    bar._bar.last_print_t = bar._bar.start_t = 0.0
    for _ in range(101):
        clock.now += 0.03
        bar.updated(Update())  # type: ignore[arg-type]
    bar.close()
    assert 20 <= len(read) <= 31, "3 seconds at one read each 0.1 seconds"
    assert read[-1] == 101, "which is not due by itself"
    assert "101.0/101" in capsys.readouterr().err


def test_a_disabled_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``TQDM_DISABLE=1`` in the environment: such a bar has neither a clock nor an interval."""
    import tqdm.auto

    monkeypatch.setattr(tqdm.auto, "tqdm", functools.partial(tqdm.auto.tqdm, disable=True))
    bar = ProgressBar(total=2)
    for _ in range(2):
        bar.inside(1, 2)
        bar.updated(update())
    bar.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["tqdm", "tqdm.auto"])
def test_without_tqdm(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "tqdm":
        monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    with pytest.raises(ga.MissingExtraError, match=r"tqdm, which is not installed\. Type: pip install tqdm") as raised:
        ProgressBar(total=3)
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value.__cause__, ImportError)


# ---------------------------------------------------------------------------------------------------- in both pipelines
def test_a_train_step_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, step = make_step(progress=3)
    for _ in range(3):
        step((X, Y))
    step.close()
    assert positions(capsys.readouterr().err)[-1] == 3.0


@pytest.mark.parametrize("has_length", [True, False])
def test_a_pass_has_one_of_its_own(capsys: pytest.CaptureFixture[str], has_length: bool) -> None:
    model, _, accumulator = make_accumulator(micro_batches=2, progress=True)
    loader = pairs(4, 4, 4, 4, 4)
    for _ in range(2):
        for batch in accumulator.over(loader if has_length else iter(loader)):
            accumulator.backward(squares(model, batch))
        drawn = capsys.readouterr().err
        assert positions(drawn)[-1] == 3.0
        assert ("3.0/3 updates" in drawn) == has_length


@pytest.mark.parametrize("make", [make_step, make_accumulator])
def test_without_tqdm_it_is_said_at_construction(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    size = {"micro_batches": 2} if make is make_accumulator else {}
    with pytest.raises(ga.MissingExtraError, match=r"Type: pip install tqdm \(the extra 'progress'"):
        make(**size, progress=True)
