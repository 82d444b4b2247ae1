"""The plan line says what will run."""

import logging
import re
from pathlib import Path

import pytest
from torch import nn

import gradaccum as ga
from gradaccum.window.plan_line import PlanLine, exact_on, plan_line

EXACT = exact_on([5, 3])


@pytest.mark.parametrize(
    ("sizes", "evidence", "updates", "line"),
    [
        ([16] * 16, EXACT, 391, f"batch 256 = 16 micro-batches x 16 | {EXACT} | 391 updates an epoch"),
        ([4, 3, 3, 3], "not checked", None, "batch 13 = 4 micro-batches of 3 to 4 | not checked"),
        ([8], EXACT, 1, f"batch 8 = 1 micro-batch x 8 | {EXACT} | 1 update an epoch"),
        ([None] * 4, EXACT, 0, f"4 micro-batches | {EXACT} | 0 updates an epoch"),
        ([None], EXACT, None, f"1 micro-batch | {EXACT}"),
    ],
)
def test_the_plan_line(sizes: list[int | None], evidence: str, updates: int | None, line: str) -> None:
    assert plan_line(sizes, evidence=evidence, updates_per_epoch=updates) == line


def test_of_several_processes_it_is_a_share() -> None:
    ranks = "2 ranks, DDP, reduced once an update"
    line = plan_line([5, 5], evidence="not checked", updates_per_epoch=None, ranks=ranks)
    assert line == f"share 10 = 2 micro-batches x 5 | {ranks} | not checked"


def test_what_was_checked_is_named() -> None:
    assert exact_on([5, 3]) == "exact (checked on 5 + 3 samples)"


@pytest.mark.parametrize(("layers", "words"), [(1, "1 BatchNorm layer sees"), (3, "3 BatchNorm layers see")])
def test_layers_that_see_the_micro_batch_are_counted(layers: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    line = PlanLine([nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(layers)))], None, couples_batch_norms=True)
    line.evidence = exact_on([5, 3])
    with caplog.at_level(logging.INFO, "gradaccum"), pytest.warns(ga.BatchNormWarning):
        line.announce([2, 2])
    assert caplog.messages == [
        f"batch 4 = 2 micro-batches x 2 | not exact: {words} the micro-batch, the rest exact (checked on 5 + 3 samples)"
    ]


def test_one_place_says_exact_and_states_the_evidence() -> None:
    saying = re.compile(r"""f?["']exact \(|evidence\s*=\s*f?["']exact|\| exact""")
    source = Path(ga.__file__).parent
    found = {}
    for path in sorted(source.rglob("*.py")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if saying.search(line)]
        lines = [line for line in lines if line.strip()[:3] != "``b"]  # the example of a docstring
        if lines:
            found[path.relative_to(source).as_posix()] = lines
    assert list(found) == ["window/plan_line.py"], found
    assert found["window/plan_line.py"] == ["    return f\"exact (checked on {' + '.join(map(str, sizes))} samples)\""]
