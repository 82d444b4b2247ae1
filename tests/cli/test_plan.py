"""``gradaccum plan``: what it prints, what it writes, and with what status it exits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def plan(gradaccum: Command, target: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Plans one function of the source."""
    monkeypatch.setattr("gradaccum.fit.probe._SECONDS_PER_SIZE", 0.0)
    return lambda function, *arguments: gradaccum("plan", f"{target}:{function}", *arguments)


def test_a_plan(plan: Command) -> None:
    done = plan("job", "--memory", "1GiB")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line.split()[:2] for line in lines if " yes" in line]
    assert table == [[str(size), str(32 // size)] for size in (1, 2, 4, 8, 16, 32)]
    assert "A batch of 32 samples, measured on cpu, budget 1 GiB." in done.text
    assert "Accumulation is not needed: the whole batch of 32 fits" in done.text
    assert "The job's own micro_batch_size=16 takes" in done.text
    assert done.text.count("yes, take this") == 1
    assert "micro-batch pieces peak fits seconds samples/s" in done.text


def test_an_estimate(plan: Command) -> None:
    done = plan("job", "--memory", "28KiB", "--estimate", "--device", "cpu")
    assert done.status == 0
    assert "estimated for cpu, budget 28 KiB" in done.text
    assert "is the largest that fits" in done.text
    assert "micro-batch pieces peak fits" in done.text
    assert "seconds" not in done.text, "nothing was timed"
    assert "The job's own micro_batch_size=16 takes 32.4 KiB and does not fit." in done.text


def test_nothing_fits(plan: Command) -> None:
    done = plan("job", "--memory", "1KiB", "--estimate")
    assert done.status == 1
    assert "Accumulation cannot help: parameters, gradients and optimizer state alone take" in done.text
    assert "take this" not in done.text


def test_a_loss_over_the_batch(plan: Command) -> None:
    done = plan("coupled")
    assert done.status == 0
    assert "Note: No optimizer was passed" in done.text


def test_the_page(plan: Command, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    done = plan("job", "--memory", "1GiB", "--html", page)
    assert done.status == 0
    assert "Page: " in done.out
    text = page.read_text(encoding="utf-8")
    for expected in ("What fits: ", "budget 1 GiB", "samples/s", "Accumulation is not needed", "take this"):
        assert expected in text
    assert text.count('<span class="bar plain"') == 2 * 6, "peak and speed of six sizes"


def test_other_ways_that_fit(plan: Command, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    done = plan("deep", "--memory", "5MiB", "--estimate", "--html", page)
    assert "Ways that fit, the cheapest first: recomputed blocks: " in done.text
    text = page.read_text(encoding="utf-8")
    assert '<h2 class="plain">Ways that fit, the cheapest first:</h2>' in text
    assert '<p class="plain"><code>ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=' in text
