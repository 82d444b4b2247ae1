"""The command: this machine, the library against a hand-written loop.

Two jobs. The smallest there is, so that nothing is measured but the loop itself; and layers of large weights with few
rows, where adding up weight gradients in place pays. Runs of both loops alternate, and the median of the ratios within
a round is what counts, so that a machine that is busy for a while disturbs both alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.report.bars import Bar, Group, draw_ratios
from gradaccum.report.tables import Cell, Row, Table, Tone, print_table, print_text
from gradaccum.report.terminal import console

_MICRO_BATCHES = 8
_SMALL_UPDATES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What both loops train.

    Attributes:
        name: for the table.
        width: of its layers.
        layers: how many.
        rows: of a micro-batch.
        updates: in one run.
        rounds: how many runs of each loop.
    """

    name: str
    width: int
    layers: int
    rows: int
    updates: int
    rounds: int


JOBS = (
    Job(name="the loop itself", width=2, layers=1, rows=10, updates=_SMALL_UPDATES, rounds=41),
    Job(name="large layers", width=1024, layers=6, rows=16, updates=1, rounds=9),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Times of one job.

    Attributes:
        textbook: seconds a micro-step of the hand-written loop, the median over the runs.
        library: of the library's.
        ratio: the median of the library's to the textbook's, run by run.
    """

    textbook: float
    library: float
    ratio: float


def run_bench(*, json_path: Path | None, plot: Path | None = None, jobs: tuple[Job, ...] = JOBS) -> None:
    """Measures, prints a table, and writes and draws the figures if asked to."""
    results = {job.name: measure(job) for job in jobs}
    terminal = console()
    print_table(terminal, _table(results))
    print_text(terminal, f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU.", Tone.QUIET)
    if json_path is not None:
        json_path.write_text(json.dumps(_as_json(results), indent=2) + "\n", encoding="utf-8")
        print_text(terminal, f"Figures: {json_path}", Tone.QUIET)
    if plot is not None:
        draw_ratios(_groups(results), plot, title="gradaccum on this machine", base="textbook loop")
        print_text(terminal, f"Picture: {plot}", Tone.QUIET)


def measure(job: Job) -> Result:
    """Runs both loops in turn, the textbook loop first."""
    textbook, library = _textbook(job), _library(job)
    textbook()
    library()
    times: list[tuple[float, float]] = [(_seconds(textbook, job), _seconds(library, job)) for _ in range(job.rounds)]
    return Result(
        textbook=statistics.median(first for first, _ in times),
        library=statistics.median(second for _, second in times),
        ratio=statistics.median(second / first for first, second in times),
    )


def _seconds(loop: Callable[[], None], job: Job) -> float:
    start = time.perf_counter()
    loop()
    return (time.perf_counter() - start) / (job.updates * _MICRO_BATCHES)


def _made(job: Job) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, _MICRO_BATCHES, job.rows, job.width, generator=generator)
    model = nn.Sequential(*(nn.Linear(job.width, job.width) for _ in range(job.layers)))
    return model, torch.optim.SGD(model.parameters(), lr=1e-4), list(zip(data[0], data[1], strict=True))


def _textbook(job: Job) -> Callable[[], None]:
    model, optimizer, micro_batches = _made(job)

    def train() -> None:
        for _ in range(job.updates):
            running = 0.0
            for x, y in micro_batches:
                loss = F.mse_loss(model(x), y) / _MICRO_BATCHES
                running += loss.item()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def _library(job: Job) -> Callable[[], None]:
    model, optimizer, micro_batches = _made(job)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=_MICRO_BATCHES)

    def train() -> None:
        for x, y in accumulator.over(micro_batches * job.updates):
            update = accumulator.backward(F.mse_loss(model(x), y))
            if update:
                update.loss.item()

    return train


def _table(results: dict[str, Result]) -> Table:
    rows = tuple(
        Row(
            label=name,
            cells=(
                Cell(text=f"{result.textbook * 1e6:,.0f}"),
                Cell(text=f"{result.library * 1e6:,.0f}"),
                Cell(text=f"{result.ratio:.2f}", tone=Tone.GOOD if result.ratio <= 1 else Tone.PLAIN),
            ),
        )
        for name, result in results.items()
    )
    return Table(
        title="This machine",
        text="Microseconds a micro-batch: the textbook loop, and gradaccum with its default options. A ratio below 1 "
        "is time saved. Run it on an idle machine.",
        columns=("textbook loop", "gradaccum", "ratio"),
        rows=rows,
    )


def _groups(results: dict[str, Result]) -> list[Group]:
    return [Group(title=name, bars=(Bar(label="gradaccum", ratio=of.ratio),)) for name, of in results.items()]


def _as_json(results: dict[str, Result]) -> dict[str, Any]:
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gradaccum": ga.__version__},
        "jobs": {
            name: {
                "textbook_seconds": result.textbook,
                "gradaccum_seconds": result.library,
                "ratio": result.ratio,
            }
            for name, result in results.items()
        },
    }
