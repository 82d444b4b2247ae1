"""One picture of all times on file: each library's, as a multiple of the textbook loop's on the same job.

    python benchmarks/plot.py [--results FOLDER] [--to FILE]

A file that is not there, or a library that was not measured, is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _bars import Bar, Group, Role, draw_ratios
from _common import FOLDER

PICTURE = FOLDER.parent / "docs" / "images" / "benchmarks.png"
TEXTBOOK = "textbook loop"
PEERS = (("Lightning Fabric", "Lightning Fabric", Role.PEER), ("Accelerate", "Accelerate", Role.PEER))

Shown = Iterable[tuple[str, str, Role]]
"""Names on file, names in the picture, whose they are."""


def group(title: str, loops: dict[str, dict[str, Any]], base: str, shown: Shown) -> Group:
    """Ratios to ``base``, whatever they are to on file."""
    one = loops[base]["ratio"]
    return Group(
        title=title,
        bars=tuple(
            Bar(label=label, ratio=loops[name]["ratio"] / one, role=role)
            for name, label, role in shown
            if name in loops
        ),
    )


def of_overhead(results: dict[str, Any]) -> list[Group]:
    shown = [
        ("gradaccum Accumulator", "gradaccum, Accumulator", Role.OURS),
        ("gradaccum TrainStep", "gradaccum, TrainStep", Role.OURS),  # its loop of whole batches cuts as well
        *PEERS,
    ]
    return [group("The loop itself: one linear layer", results["loops"], TEXTBOOK, shown)]


def of_gpt(results: dict[str, Any]) -> list[Group]:
    ours = [("gradaccum, default", "gradaccum", Role.OURS), *PEERS]
    groups = [
        group(f"GPT-2 small, {tokens} tokens a micro-batch", loops, TEXTBOOK, ours)
        for tokens, loops in results.get("micro_steps", {}).items()
    ]
    if "time_for_space" in results:
        shown = [
            ("gradaccum, pieces of 1", "gradaccum", Role.OURS),
            ("whole batch", "whole batch, 8 x the activations", Role.REFERENCE),
        ]
        space = results["time_for_space"]
        groups.append(group("GPT-2 small, 8 sequences of 128 tokens", space, f"{TEXTBOOK}, pieces of 1", shown))
    return groups


def of_convolution(results: dict[str, Any]) -> list[Group]:
    shown = [
        ("gradaccum Accumulator", "gradaccum, Accumulator", Role.OURS),
        ('gradaccum TrainStep, "auto"', "gradaccum, TrainStep", Role.OURS),
        *PEERS,
        ("whole batch", "whole batch", Role.REFERENCE),
    ]
    return [group("Convolution net, 8 pictures a micro-batch", results["loops"], TEXTBOOK, shown)]


def of_contrastive(results: dict[str, Any]) -> list[Group]:
    shown = [
        ("gradaccum, what fits", "gradaccum, graphs kept", Role.OURS),
        ("gradaccum, none kept, half the pairs", "gradaccum, none kept", Role.OURS),
        ("sentence-transformers", "sentence-transformers", Role.PEER),
        ("two passes by hand", "two passes by hand", Role.REFERENCE),
        ("whole batch", "whole batch", Role.REFERENCE),
    ]
    return [group("Contrastive loss (where the textbook loop is wrong)", results["loops"], TEXTBOOK, shown)]


FILES = {"overhead": of_overhead, "gpt": of_gpt, "convolution": of_convolution, "contrastive": of_contrastive}


def groups_in(folder: Path) -> list[Group]:
    found: list[Group] = []
    for name, groups_of in FILES.items():
        path = folder / f"{name}.json"
        if path.exists():
            found += groups_of(json.loads(path.read_text(encoding="utf-8")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results", metavar="FOLDER", help="where they are")
    parser.add_argument("--to", type=Path, default=PICTURE, metavar="FILE", help="the picture: .png, .svg or .pdf")
    arguments = parser.parse_args()
    groups = groups_in(arguments.results)
    if not groups:
        raise SystemExit(f"No times in {arguments.results}: run benchmarks/all.py first.")
    draw_ratios(groups, arguments.to, title="Time of an update", base="textbook loop")
    print(f"Picture: {arguments.to}")


if __name__ == "__main__":
    main()
