"""``gradaccum audit``: what it prints, what it writes, and with what status it exits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture
def audit(gradaccum: Command, target: str) -> Command:
    """Audits one function of the source."""
    return lambda function, *arguments: gradaccum("audit", f"{target}:{function}", *arguments)


def test_exact(audit: Command) -> None:
    done = audit("exact")
    assert (done.status, done.err) == (0, "")
    assert "Exact: the accumulated gradient is the whole batch's" in done.text
    assert (
        "against micro-batches of 8, 6 (uneven, since equal ones hide errors); in float64." in done.text
    )  # 8 by default


def test_inexact(audit: Command) -> None:
    done = audit("inexact")
    assert (done.status, done.err) == (1, "")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "against micro-batches of 4, 4, 3, 3" in done.text  # the job's own size
    assert "Not exact: the accumulated gradient is off by" in done.text
    assert "1. batch-norm: " in done.text
    assert "Where: module 1 (BatchNorm1d) Why: BatchNorm normalises each micro-batch" in done.text
    assert 'batch_norm="exact"' in done.text


def test_the_size_and_a_loss_over_the_batch(audit: Command) -> None:
    done = audit("inexact", "--micro-batch-size", "5")
    assert done.status == 1
    assert "against micro-batches of 5, 5, 4" in done.text
    assert audit("coupled").status == 0


def test_the_page(audit: Command, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    done = audit("inexact", "--html", page)
    assert done.status == 1
    assert "Page: " in done.out
    text = page.read_text(encoding="utf-8")
    for expected in ("Is it exact?", "1. batch-norm: ", "by itself", 'class="bar bad"', "biased", "<b>Price:</b>"):
        assert expected in text
    assert "module <code>1 (BatchNorm1d)</code>" in text
    assert "<code>ga.TrainStep(model, optimizer, loss_fn, batch_norm=&#34;exact&#34;)</code>" in text
    for link in ("<script", "src=", "href="):  # it needs nothing else
        assert link not in text
