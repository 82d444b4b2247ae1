"""The two READMEs: alike in their parts, short, and true to the results on file and to the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")}
ENGLISH, CHINESE = TEXTS.values()
MAX_WORDS = 1_500

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w.])")


def outline(text: str) -> dict[str, Any]:
    """What two translations of a page have in common: headings, tables, code, links, and the figures of each part."""
    code = [(language, re.sub(r"[ ]*#.*", "", body)) for language, body in FENCE.findall(text)]
    prose = FENCE.sub("", text)
    parts = re.split(r"^#+ .*$", prose, flags=re.MULTILINE)
    links = (link.split("#")[0].replace("/zh/", "/") for link in re.findall(r"\]\(([^)\s]+)\)", prose))
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "tables": [len(re.findall(r"^\|", part, re.MULTILINE)) for part in parts],
        "figures of tables": [FIGURE.findall("\n".join(re.findall(r"^\|.*", part, re.MULTILINE))) for part in parts],
        "links": sorted(link for link in links if link and not link.startswith("README")),
        "code": code,
    }


def test_both_languages_have_the_same_parts() -> None:
    english, chinese = outline(ENGLISH), outline(CHINESE)
    for part, content in english.items():
        assert chinese[part] == content, part


def test_the_comparison_of_languages_finds_what_differs() -> None:
    page = "# A\n\n| a | b |\n| --- | --- |\n| x 3 | 0.5 |\n\n```python\nf()  # one\n```\n[a](docs/a.md)\n"
    assert outline(page) == outline(page.replace("# one", "# eins").replace("| x", "| y").replace("docs/", "docs/zh/"))
    for change in ({"0.5": "0.6"}, {"# A": "## A"}, {"f()": "g()"}, {"a.md": "b.md"}, {"| x 3 | 0.5 |\n": ""}):
        ((old, new),) = change.items()
        assert outline(page) != outline(page.replace(old, new)), change


def test_the_readme_is_short() -> None:
    assert len(ENGLISH.split()) <= MAX_WORDS


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def costs() -> list[tuple[float, float]]:
    """The figures of the table of costs, row by row, from the results on file."""
    gpt, gpu = results("gpt"), results("gpu")["micro_steps"]["124M"]["8192"]
    steps, space, loops = gpt["micro_steps"]["128"], gpt["time_for_space"], results("overhead")["loops"]
    convolution = results("convolution")["loops"]
    pairs = [
        (steps["textbook loop"], steps["gradaccum, default"]),
        (space["textbook loop, pieces of 1"], space["gradaccum, pieces of 1"]),
        (convolution["textbook loop"], convolution["gradaccum Accumulator"]),
        (loops["textbook loop"], loops["gradaccum Accumulator"]),
        (gpu["textbook loop"], gpu["gradaccum, default"]),
    ]
    return [(textbook["ratio"], ours["ratio"]) for textbook, ours in pairs]


@pytest.mark.parametrize("name", TEXTS)
def test_one_sample_too_large_is_the_result_on_file(name: str) -> None:
    loops = results("chunked_head")["loops"]
    ways = (
        "whole batch, one piece",
        *(f"pieces of one, {way}" for way in ("one piece", "chunks", "chunks, recomputed")),
    )
    for way in ways:
        peak, ratio = loops[way]["peak_bytes"] / 2**20, loops[way]["processor_ratio"]
        assert f"|{peak:,.0f}|{ratio:.2f}|" in TEXTS[name], way


@pytest.mark.parametrize("name", TEXTS)
def test_the_costs_are_the_results_on_file(name: str) -> None:
    rows = re.findall(r"^\|.*\| (\d\.\d\d) \| \*\*(\d\.\d\d)\*\* \|", TEXTS[name], re.MULTILINE)
    assert rows == [(f"{textbook:.2f}", f"{ours:.2f}") for textbook, ours in costs()]


def test_the_demo_prints_what_the_readme_shows() -> None:
    """Letters and the first seven digits: the others are rounding, which moves from machine to machine."""
    shown = next(body for language, body in FENCE.findall(ENGLISH) if language == "text")
    ran = subprocess.run(
        [sys.executable, "-m", "gradaccum.cli", "demo"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
    ).stdout  # fmt: skip

    def comparable(text: str) -> list[str]:
        lines = (line for line in text.splitlines() if "off by" not in line and "float64" not in line)
        return [re.sub(r"(\d+\.\d{5})\d+", r"\1", line).strip() for line in lines if line.strip()]

    assert comparable(shown) == comparable(ran)[: len(comparable(shown))]
    assert re.search(r"gradients off by +\S+ +3\.8e-02 ", ran)


def test_the_readme_says_what_the_package_says() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (torch,) = re.findall(r'^dependencies = \["torch>=([\d.]+)"\]', project, re.MULTILINE)
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    for text in TEXTS.values():
        assert f"PyTorch {torch}" in text
        assert f"Python {python}" in text
    assert ("no index" in ENGLISH) == ("[project.urls]" not in project)
