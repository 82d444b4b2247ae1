"""The table of docs/conformance.md: every known trainer that is installed, in every scenario, against the whole batch.

    python benchmarks/conformance.py [--json FILE]

Without --json the results go to results/conformance.json, and the table and the versions into the page. Takes a few
minutes. `gradaccum conformance --html FILE` shows the same with a reproduction of each error.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _common import FOLDER, versions, write_results

from gradaccum.conformance import Trainer, judge_all, scenarios
from gradaccum.conformance.verdicts import KNOWN, figure, is_installed, known

RESULTS = FOLDER / "results" / "conformance.json"
PAGE = FOLDER.parent / "docs" / "conformance.md"
START, END = "<!-- made by benchmarks/conformance.py -->\n", "<!-- end -->"


def trainers() -> list[Trainer]:
    return [known(name) for name in KNOWN if is_installed(name)]


def markdown(verdicts: list[dict[str, Any]], found: dict[str, str]) -> str:
    """Two tables: what each trainer is off by, and which mistakes explain how many of its errors."""
    titles = list(dict.fromkeys(one["trainer"] for one in verdicts))
    lines = ["| scenario | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for case in scenarios():
        own = {one["trainer"]: one for one in verdicts if one["scenario"] == case.name}
        lines.append(f"| {case.name} | " + " | ".join(_cell(own[title]) for title in titles) + " |")
    packages = ("python", "torch", "accelerate", "lightning", "transformers", "pytorch-ignite")
    lines += ["", "With " + ", ".join(f"{name} {found[name]}" for name in packages if name in found) + "."]
    lines += ["", "| trainer | what it does, found out by a loop that gives the same result | scenarios |"]
    lines += ["| --- | --- | ---: |"]
    for title in titles:
        reasons: dict[str, int] = {}
        for one in verdicts:
            if one["trainer"] == title and one["outcome"] == "off":
                text = one["reason"] or "not found out"
                reasons[text] = reasons.get(text, 0) + 1
        lines += [f"| {title} | {text} | {number} |" for text, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _cell(verdict: dict[str, Any]) -> str:
    return f"**{verdict['figure']}**" if verdict["outcome"] in ("off", "error") else verdict["figure"]


def write_page(text: str) -> None:
    """Puts the tables between the page's two comments."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + text + END + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = [{**asdict(verdict), "figure": figure(verdict)} for verdict in judge_all(trainers())]
    results = {"unit": "relative to the way that parameters go", "verdicts": verdicts}
    write_results(arguments.json, results)
    text = markdown(verdicts, versions())
    print(text)
    if arguments.json.resolve() == RESULTS.resolve():
        write_page(text)


if __name__ == "__main__":
    main()
