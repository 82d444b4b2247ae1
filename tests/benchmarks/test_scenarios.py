"""The scenarios of the README's table: our column and the textbook loop's are run, all is compared with the file."""

import json
from types import ModuleType
from typing import Any

import pytest

from scripts import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "scenarios.json").read_text(encoding="utf-8"))
SHOWN = ("textbook loop", "Accelerate", "Lightning", "gradaccum")


def row(name: str) -> dict[str, Any]:
    return next(row for row in RESULTS["scenarios"] if row["scenario"] == name)


def test_gradaccum_is_exact_in_all_twelve_and_warns_in_none(script: ModuleType) -> None:
    assert len(script.scenarios()) == 12
    for s in script.scenarios():
        assert script.error(s, "gradaccum") < s.bound, s.name


def test_the_textbook_loop_is_wrong_in_ten_of_twelve(script: ModuleType) -> None:
    wrong = 0
    for s in script.scenarios():
        error = script.error(s, "textbook loop")
        assert error == pytest.approx(row(s.name)["errors"]["textbook loop"], rel=0.5), s.name
        wrong += error > 1e-5
    assert wrong == 10


def test_the_results_are_of_the_scenarios_on_file(script: ModuleType) -> None:
    assert [row["scenario"] for row in RESULTS["scenarios"]] == [s.name for s in script.scenarios()]
    assert {"command", "machine", "versions"} <= RESULTS.keys()
    assert {"torch", "accelerate", "lightning", "gradaccum"} <= RESULTS["versions"].keys()


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readmes_show_the_results_on_file(readme: str, script: ModuleType) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    for package in ("accelerate", "lightning"):
        major, minor, *_ = RESULTS["versions"][package].split(".")
        assert f"{package.title()} {major}.{minor} |" in text
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "| Accelerate 1." in line) + 2
    for line, on_file in zip(lines[start:], RESULTS["scenarios"], strict=False):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        expected = [script.cell(on_file, column) for column in SHOWN]
        assert cells == expected, line
        assert name == on_file["scenario"] or readme != "README.md"
    assert not lines[start + len(RESULTS["scenarios"])]
