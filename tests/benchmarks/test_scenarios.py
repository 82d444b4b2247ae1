"""The scenarios of the tables in README and docs/why.md: two columns are run, all are compared with the file."""

import itertools
import json
from types import ModuleType
from typing import Any

import pytest

from scripts import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "scenarios.json").read_text(encoding="utf-8"))
SHOWN = ("textbook loop", "Accelerate", "Lightning", "Trainer", "gradaccum")
PACKAGES = {"Accelerate": "accelerate", "Lightning": "lightning", "Trainer": "transformers"}


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
    assert {"torch", "accelerate", "lightning", "transformers", "gradaccum"} <= RESULTS["versions"].keys()


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/why.md"])
def test_the_pages_show_the_results_on_file(page: str, script: ModuleType) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, package in PACKAGES.items():
        major, minor, *_ = RESULTS["versions"][package].split(".")
        assert f"{name} {major}.{minor} |" in text
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "| Accelerate 1." in line) + 2
    shown = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    on_file = {row["scenario"]: [script.cell(row, column) for column in SHOWN] for row in RESULTS["scenarios"]}
    if page == "docs/why.md":
        assert rows == [[name, *cells] for name, cells in on_file.items()]
    elif page == "README.md":
        assert [cells for _, *cells in rows] == [on_file[name] for name, *_ in rows]
    else:
        english = [line.split("|")[2:] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
        assert all(line.split("|")[2:] in english for line in shown)
    assert len(rows) == (12 if page == "docs/why.md" else 5)
