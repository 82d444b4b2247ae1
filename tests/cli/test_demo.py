"""``gradaccum demo``: as a user runs it, on small tasks, and whether its judge can say no."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradaccum.cli import demo
from gradaccum.cli.demo import OURS, OURS_IN_FLOAT64, TEXTBOOK, WAYS, WHOLE, Comparison, Task, compare, regression
from gradaccum.report.terminal import Tone

Command = Callable[..., Any]


def test_the_whole_demo_in_a_pipe_that_only_knows_ascii(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    code = "from gradaccum.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, "demo", "--plot", str(picture)]
    environment = {**os.environ, "TERM": "dumb", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")

    lines = done.stdout.splitlines()
    assert any("EXACT: every update is the whole batch's." in line for line in lines)
    headings = [line.rstrip("-").rstrip() for line in lines if line.endswith("---") and not line.startswith(" ")]
    assert headings == ["1,000 samples", "957 samples", "1,000 sequences"]
    verdicts = [line.split() for line in lines if "verdict" in line]
    assert verdicts == [["verdict", "-", word, "exact"] for word in ("same", "drifts", "drifts")]

    losses = [line.split()[3:] for line in lines if "loss, epoch" in line]
    assert len(losses) == 9
    assert all(len(loss.partition(".")[2]) == 10 for row in losses for loss in row)
    for whole, textbook, library in losses[:3]:  # equal to rounding where everything divides
        assert float(textbook) == pytest.approx(float(whole), rel=1e-6)
        assert float(library) == pytest.approx(float(whole), rel=1e-6)
    published = [line.split()[3:] for line in lines if "tutorial, epoch" in line]
    expected = [["0.552948"] * 3, ["0.188646"] * 3, ["0.064521"] * 3]
    assert [[f"{float(loss):.6f}" for loss in row] for row in published] == expected

    text = " ".join(done.stdout.split())
    for word in ('"same": the parameters', '"exact": the same, and', "tutorial: the loss as"):
        assert word in text
    assert max(len(line) for line in lines if not line.startswith("  Picture: ")) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 20_000


# ------------------------------------------------------------------------------------------------------ on a small task
def small(*lengths: int, title: str = "97 samples") -> Task:
    return Task(title=title, text="Few.", samples=regression(list(lengths) or [1] * 97))


def test_good_news_exits_with_0_and_an_inexact_library_with_1(
    monkeypatch: pytest.MonkeyPatch, gradaccum: Command
) -> None:
    monkeypatch.setattr(demo, "tasks", lambda: [small()])
    done = gradaccum("demo")
    assert done.status == 0
    assert "97 samples" in done.out
    assert "tutorial, epoch" not in done.out, "only the published task has the published scale"
    monkeypatch.setitem(demo.WAYS, OURS, demo.WAYS[TEXTBOOK])
    done = gradaccum("demo")
    assert done.status == 1
    assert "NOT EXACT. 97 samples: off by " in done.text
    assert "EXACT: every update" not in done.text


# ------------------------------------------------------------------------------------------------------ what is trained
def test_the_published_setting() -> None:
    published, uneven, sequences = demo.tasks()
    assert (demo.BATCH_SIZE, demo.ACCUM_ITER, demo.EPOCHS) == (40, 4, 3)
    assert [len(task.samples) for task in (published, uneven, sequences)] == [1_000, 957, 1_000]
    x, y = (torch.cat(parts) for parts in zip(*published.samples, strict=True))
    assert torch.equal(y, torch.cat([y for _, y in demo.tasks()[0].samples])), "the same every time"
    noise = y[:, 0] - (x @ torch.tensor([-2.0, 3.4]) + 4.2)
    assert 0.009 < noise.std() < 0.011
    assert x.std(dim=0).allclose(torch.ones(2), atol=0.1)
    lengths = [len(y) for _, y in sequences.samples]
    assert (min(lengths), max(lengths)) == (1, 60)
    assert [len(x) for x, _ in demo._loader(uneven, 40, torch.float32)][-2:] == [40, 37]
    assert [len(x) for x, _ in demo._loader(uneven, 10, torch.float64)][-2:] == [10, 7]


UNEVEN = [small(*[1] * 57), small(*range(1, 58))]  # 40 and 10 + 7


def gradient(batch: tuple[Tensor, Tensor], parameters: Tensor) -> Tensor:
    model = nn.Linear(2, 1, dtype=torch.float64)
    nn.utils.vector_to_parameters(parameters, model.parameters())
    F.mse_loss(model(batch[0]), batch[1]).backward()
    return nn.utils.parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [WHOLE, OURS])
@pytest.mark.parametrize("task", UNEVEN, ids=["samples", "sequences"])
def test_every_update_has_the_whole_batchs_gradient(task: Task, name: str) -> None:
    states = demo.train(task, WAYS[name], torch.float64)
    batches = list(demo._loader(task, demo.BATCH_SIZE, torch.float64)) * demo.EPOCHS
    before = torch.zeros(3, dtype=torch.float64)
    for batch, (seen, after) in zip(batches, states, strict=True):
        torch.testing.assert_close(seen, gradient(batch, before), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(after, before - 0.01 * seen, rtol=1e-14, atol=1e-15)
        before = after


@pytest.mark.parametrize("task", UNEVEN, ids=["samples", "sequences"])
def test_the_textbook_loop_has_the_mean_of_means(task: Task) -> None:
    states = demo.train(task, WAYS[TEXTBOOK], torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    micro_batches = list(demo._loader(task, 10, torch.float64))[:4]
    expected = sum(gradient(micro_batch, zeros) for micro_batch in micro_batches) / 4
    torch.testing.assert_close(states[0, 0], expected, rtol=1e-12, atol=1e-15)


def test_float32_stays_float32() -> None:
    states = demo.train(UNEVEN[0], WAYS[OURS], torch.float32)
    assert torch.equal(states, states.float().double())


def test_an_epochs_loss_is_the_mean_over_its_tokens() -> None:
    comparison = replace(
        compare(UNEVEN[0]),
        tokens=torch.tensor([40, 20] * 3),
        losses={name: torch.tensor([1.0, 4.0, 2.0, 2.0, 0.0, 3.0]) for name in WAYS},
    )
    rows = {row.label: [cell.text for cell in row.cells] for row in demo.table(comparison).rows}
    assert [rows[f"loss, epoch {i}"][0] for i in (1, 2, 3)] == ["2.0000000000", "2.0000000000", "1.0000000000"]


# ---------------------------------------------------------------------------------------------- the judge can say no
@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(small())


def wrong(comparison: Comparison, name: str, column: int, value: float, *, update: int = 2) -> Comparison:
    """With one number that is off."""
    off = comparison.off[name].clone()
    off[update, column] = value
    return replace(comparison, off={**comparison.off, name: off})


@pytest.mark.parametrize(("num_samples", "divides"), [(97, False), (80, True)])
def test_the_library_is_exact_and_the_textbook_loop_only_where_everything_divides(
    num_samples: int, divides: bool
) -> None:
    comparison = compare(small(*[1] * num_samples))
    assert comparison.is_exact()
    assert comparison.is_same(WHOLE)
    assert comparison.is_same(TEXTBOOK) is divides


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        pytest.param(OURS_IN_FLOAT64, 1, 1e-7, id="right, but only to float32"),
        pytest.param(OURS_IN_FLOAT64, 1, 1e-11, id="parameters off by 1e-11 in float64"),
        pytest.param(OURS_IN_FLOAT64, 0, 3.0, id="a gradient four times as large"),
        pytest.param(OURS, 1, 1e-4, id="off by 1e-4 in float32"),
        pytest.param(OURS, 1, float("nan"), id="not a number"),
    ],
)
@pytest.mark.parametrize("update", [0, -1])
def test_one_wrong_update_is_found(name: str, column: int, value: float, update: int, comparison: Comparison) -> None:
    assert not wrong(comparison, name, column, value, update=update).is_exact()


def test_distances_are_relative_to_the_measure(comparison: Comparison) -> None:
    measure = demo.train(comparison.task, WAYS[WHOLE], torch.float64)
    textbook = demo.train(comparison.task, WAYS[TEXTBOOK], torch.float32)
    expected = (textbook[-1, 1] - measure[-1, 1]).norm() / measure[-1, 1].norm()
    assert float(comparison.off[TEXTBOOK][-1, 1]) == pytest.approx(float(expected), rel=1e-12)


def test_the_table(comparison: Comparison) -> None:
    table = demo.table(comparison)
    rows = {row.label: [cell.text for cell in row.cells] for row in table.rows}
    assert rows["batch"] == ["40", "10 x 4", "10 x 4"]
    assert rows["verdict"] == ["-", "drifts", "exact"]
    assert all(len(cells) == len(table.columns) for cells in rows.values())
    for label in ("gradients off by", "parameters off by"):
        assert float(rows[label][1]) > 100 * float(rows[label][2])
    assert [cell.tone for cell in table.rows[-1].cells] == [Tone.PLAIN, Tone.BAD, Tone.GOOD]
    last = demo.table(wrong(comparison, OURS, 1, 1.0)).rows[-1].cells[-1]
    assert (last.text, last.tone) == ("NOT EXACT", Tone.BAD)


def test_the_verdict_over_all(comparison: Comparison) -> None:
    is_exact, text = demo.verdict([comparison])
    assert is_exact
    assert text.startswith("EXACT: every update is the whole batch's. The textbook loop is up to ")
    is_exact, text = demo.verdict([comparison, wrong(comparison, OURS, 1, 1.0)])
    assert not is_exact
    assert text.startswith("NOT EXACT. 97 samples: off by ")


def test_a_row_of_losses_and_a_row_of_distances(comparison: Comparison) -> None:
    losses, distances = demo.panels([comparison, comparison])
    assert [panel.title for panel in losses] == ["97 samples", "97 samples"]
    assert [panel.is_logarithmic for panel in losses + distances] == [False, False, True, True]
    assert [series.label for series in distances[0].series] == [WHOLE, TEXTBOOK, OURS, OURS_IN_FLOAT64]
    assert all(len(series.values) == 9 for panel in losses + distances for series in panel.series)
