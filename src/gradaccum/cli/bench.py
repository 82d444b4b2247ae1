"""``gradaccum bench``: this machine, the library against a hand-written loop.

The smallest case there is measures nothing but the loop itself; in layers of large parameters and few rows, adding up
gradients in place pays. Runs of both loops alternate, and the median of the ratios within a round is what counts, so
that a machine that is busy for a while disturbs both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.report.machine import machine, versions
from gradaccum.report.terminal import Cell, Row, Table, Tone, console, print_table, print_text

_MICRO_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What both loops train: ``layers`` of ``width``, ``rows`` of a micro-batch, ``updates`` in one of the rounds."""

    name: str
    width: int
    layers: int
    rows: int
    updates: int
    rounds: int


CASES = (
    Case(name="the loop itself", width=2, layers=1, rows=10, updates=50, rounds=41),
    Case(name="large layers", width=1024, layers=6, rows=16, updates=1, rounds=9),
)


def run_bench(*, json_path: Path | None, cases: tuple[Case, ...] = CASES) -> None:
    """Measures, prints a table, and writes the figures down if asked to."""
    results = {case.name: measure(case) for case in cases}
    terminal = console()
    print_table(terminal, _table(results))
    print_text(terminal, f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU.", Tone.QUIET)
    if json_path is not None:
        figures = {
            "machine": machine(),
            "versions": versions(),
            "jobs": results,
        }
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print_text(terminal, f"Figures: {json_path}", Tone.QUIET)


def measure(case: Case) -> dict[str, float]:
    """Runs both loops in turn, and returns medians over the rounds: seconds a micro-batch of either, and the ratio."""
    textbook, library = _textbook(case), _library(case)
    textbook()
    library()
    times = [(_seconds(textbook, case), _seconds(library, case)) for _ in range(case.rounds)]
    return {
        "textbook_seconds": statistics.median(first for first, _ in times),
        "gradaccum_seconds": statistics.median(second for _, second in times),
        "ratio": statistics.median(second / first for first, second in times),
    }


def _seconds(loop: Callable[[], None], case: Case) -> float:
    start = time.perf_counter()
    loop()
    return (time.perf_counter() - start) / (case.updates * _MICRO_BATCHES)


def _textbook(case: Case) -> Callable[[], None]:
    model, optimizer, micro_batches = _training(case)

    def train() -> None:
        for _ in range(case.updates):
            running = 0.0
            for x, y in micro_batches:
                loss = F.mse_loss(model(x), y) / _MICRO_BATCHES
                running += loss.item()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def _library(case: Case) -> Callable[[], None]:
    model, optimizer, micro_batches = _training(case)
    criterion = ga.criterion(F.mse_loss)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=_MICRO_BATCHES)

    def train() -> None:
        for x, y in accumulator.over(micro_batches * case.updates):
            update = accumulator.backward(criterion(model(x), y))
            if update:
                update.loss.item()

    return train


def _training(case: Case) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, _MICRO_BATCHES, case.rows, case.width, generator=generator)
    model = nn.Sequential(*(nn.Linear(case.width, case.width) for _ in range(case.layers)))
    return model, torch.optim.SGD(model.parameters(), lr=1e-4), list(zip(data[0], data[1], strict=True))


def _table(results: dict[str, dict[str, float]]) -> Table:
    rows: list[Row] = []
    for name, result in results.items():
        times = (Cell(text=f"{1e6 * result[loop]:,.0f}") for loop in ("textbook_seconds", "gradaccum_seconds"))
        ratio = Cell(text=f"{result['ratio']:.2f}", tone=Tone.GOOD if result["ratio"] <= 1 else Tone.PLAIN)
        rows.append(Row(label=name, cells=(*times, ratio)))
    return Table(
        title="This machine",
        text="Microseconds a micro-batch: the textbook loop, and gradaccum with its default options. A ratio below 1 "
        "is time saved. Run it on an idle machine.",
        head="job",
        columns=("textbook loop", "gradaccum", "ratio"),
        rows=tuple(rows),
    )
