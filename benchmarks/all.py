"""Every benchmark, one after the other, then a picture of their times.

    python benchmarks/all.py [--quick] [--results FOLDER] [--only NAME ...]

Results replace those in benchmarks/results/; with --quick, which runs fewer rounds and only the smallest GPT, they go
to benchmarks/results/quick/. Peers that are not installed are left out. Run it on an idle machine. On one core all of
it takes one to two hours, most of it GPT-2 small; --quick takes five minutes.

Exit status: 0, or 1 if a benchmark failed; the others are run all the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import FOLDER

ROOT = FOLDER.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a script is run.

    Attributes:
        name: of the script, and of its results.
        full: its options.
        quick: its options with --quick.
        needs: packages without which there is nothing to compare.
        needs_gpu: whether it measures nothing on the CPU.
    """

    name: str
    full: str = ""
    quick: str = ""
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False

    def obstacle(self) -> str | None:
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if missing:
            return f"needs {', '.join(missing)}: pip install -c constraints.txt -e '.[dev,bench]'"
        if self.needs_gpu and not torch.cuda.is_available():
            return "needs a GPU"
        return None


RUNS = (
    Run(name="scenarios", needs=("accelerate", "lightning")),
    Run(name="conformance", needs=("accelerate", "lightning", "transformers")),
    Run(name="overhead", full="--rounds 21", quick="--rounds 5"),
    Run(name="gpt", full="--rounds 3", quick="--rounds 1 --only micro-steps --tokens 32"),
    Run(name="limit", full="--rounds 3", quick="--rounds 1 --shape tiny"),
    Run(name="convolution", quick="--rounds 1"),
    Run(name="additions", quick="--rounds 1 --sides 64"),
    Run(name="contrastive", quick="--rounds 2"),
    Run(name="two_pass", full="--rounds 7", quick="--rounds 1"),
    Run(name="sizes", full="--rounds 11", quick="--rounds 1"),
    Run(name="lockstep", quick="--rounds 2"),
    Run(name="first_check", quick="--rounds 1"),
    Run(name="chunked_head", quick="--quick --rounds 1"),
    Run(name="ways", quick="--quick", needs=("transformers",)),
    Run(name="sample_randomness", quick="--quick --rounds 1"),
    Run(name="trainers", quick='--kinds "masked LM" --heads Bert', needs=("transformers",)),
    Run(name="precision"),
    Run(name="lengths"),
    Run(name="peak"),
    Run(name="gpu", quick="--rounds 1 --shapes 124M", needs_gpu=True),
)


def commands(runs: tuple[Run, ...], folder: Path, *, is_quick: bool) -> dict[str, list[str]]:
    """What to type for each, in the repository."""
    return {
        run.name: [
            f"benchmarks/{run.name}.py",
            *shlex.split(run.quick if is_quick else run.full),
            "--json",
            (folder / f"{run.name}.json").as_posix(),
        ]
        for run in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, in a few minutes")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where they go")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], metavar="NAME", help="some of them")
    arguments = parser.parse_args()
    folder: Path = arguments.results or Path("benchmarks", "results", *(["quick"] if arguments.quick else []))
    runs = tuple(run for run in RUNS if arguments.only is None or run.name in arguments.only)
    failed: list[str] = []
    started = time.perf_counter()
    for number, (run, command) in enumerate(
        zip(runs, commands(runs, folder, is_quick=arguments.quick).values(), strict=True), 1
    ):
        minutes = (time.perf_counter() - started) / 60
        obstacle = run.obstacle()
        print(f"\n[{number}/{len(runs)}, {minutes:.0f} min] {shlex.join(command)}", flush=True)
        if obstacle is not None:
            print(f"left out: {obstacle}")
        elif subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            failed.append(run.name)
    picture = [] if folder == Path("benchmarks", "results") else ["--to", str(folder / "benchmarks.png")]
    if subprocess.run(
        [sys.executable, "benchmarks/plot.py", "--results", str(folder), *picture], cwd=ROOT, check=False
    ).returncode:
        failed.append("plot")
    print(f"{len(runs)} benchmarks, {(time.perf_counter() - started) / 60:.0f} minutes")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
