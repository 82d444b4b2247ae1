"""What goes wrong, and where: training with accumulation against training on the whole batch.

    python benchmarks/scenarios.py [--json FILE]

Each scenario trains a small model in float32 by the textbook loop, Accelerate, the Trainers of Lightning and of
Transformers, and gradaccum, each
written as its documentation recommends, and gives the relative error of the trained parameters against whole-batch
training in float64, |p - P| / |P|. Whole-batch training in float32 stands beside them: what rounding alone costs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import FOLDER, write_results
from torch import Tensor

import gradaccum as ga
from gradaccum import conformance
from gradaccum.conformance import NotOffered, Scenario
from gradaccum.conformance.adapters import library, loops, trainers

NUM_SCENARIOS = 12  # of those of `gradaccum conformance`, which is newer than this table


def scenarios() -> tuple[Scenario, ...]:
    return conformance.scenarios()[:NUM_SCENARIOS]


def gradaccum(s: Scenario) -> Tensor:
    """The accumulator's loop; whole batches in hand where layers or the loss see the batch."""
    try:
        return trained_by(library.accumulator)(s)
    except NotOffered:
        return trained_by(library.train_step)(s)


def trained_by(adapter: conformance.Adapter) -> Callable[[Scenario], Tensor]:
    return lambda s: s.train(adapter, torch.float32).parameters


LOOPS: dict[str, Callable[[Scenario], Tensor]] = {
    "whole batch": lambda s: conformance.whole_batch(s, torch.float32).parameters,
    "textbook loop": trained_by(loops.textbook),
    "Accelerate": trained_by(loops.accelerate),
    "Lightning": trained_by(trainers.lightning),
    "Trainer": trained_by(trainers.transformers),
    "gradaccum": gradaccum,
}


def measure(s: Scenario) -> dict[str, float]:
    """Relative error of each loop's trained parameters."""
    errors: dict[str, float] = {}
    for name in LOOPS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "gradaccum":  # no warning of ours goes unseen
                warnings.simplefilter("error", ga.GradAccumWarning)
            errors[name] = error(s, name)
    return errors


def error(s: Scenario, name: str) -> float:
    exact = conformance.whole_batch(s).parameters
    return float((LOOPS[name](s) - exact).norm() / exact.norm())


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| scenario | " + " | ".join(LOOPS) + " |", "| --- |" + " ---: |" * len(LOOPS)]
    for row in rows:
        cells = [cell(row, name) for name in LOOPS]
        lines.append(f"| {row['scenario']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any], name: str) -> str:
    error = row["errors"][name]
    text = f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"**{text}**" if name == "gradaccum" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "scenarios.json", help="where results go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"scenario": s.name, "bound": s.bound, "errors": measure(s)} for s in scenarios()]
    print(markdown(rows))
    write_results(arguments.json, {"unit": "relative error of the trained parameters", "scenarios": rows})
    broken = [row["scenario"] for row in rows if row["errors"]["gradaccum"] > row["bound"]]
    if broken:
        raise SystemExit(f"gradaccum is outside of its bound: {', '.join(broken)}")


if __name__ == "__main__":
    main()
