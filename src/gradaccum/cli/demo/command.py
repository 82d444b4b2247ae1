"""The command: train, show, judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gradaccum.cli.demo import words
from gradaccum.cli.demo.comparison import RUNS_PER_TASK, compare
from gradaccum.cli.demo.regression import regression_task
from gradaccum.cli.demo.speeches import speeches_task
from gradaccum.cli.demo.task import Task
from gradaccum.report.plots import draw
from gradaccum.report.tables import Tone, print_table, print_text
from gradaccum.report.terminal import console, progress


def run_demo(*, plot: Path | None) -> bool:
    """Runs the demo, prints its tables and verdict, and draws the picture if asked to.

    Returns:
        Whether the library was exact.
    """
    terminal = console()
    comparisons = []
    for task in _tasks():
        total = RUNS_PER_TASK * task.updates
        with progress(task.title, total=total, unit="updates") as advance, _one_thread():
            comparisons.append(compare(task, advance))
        print_table(terminal, words.table(comparisons[-1]))
    is_exact, verdict = words.verdict(comparisons)
    print_text(terminal, words.LEGEND, Tone.QUIET)
    terminal.print()
    print_text(terminal, verdict, Tone.GOOD if is_exact else Tone.BAD)
    if plot is not None:
        draw(words.panels(comparisons), plot)
        print_text(terminal, f"Picture: {plot}", Tone.QUIET)
    return is_exact


@contextmanager
def _one_thread() -> Iterator[None]:
    # Models this small gain next to nothing from a second thread, and on busy cores threads that wait for each other
    # spin: the demo took 90 s instead of 15 s on two cores that a test run shared.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tasks() -> list[Task]:
    return [
        regression_task(
            1_000,
            title="1,000 samples",
            text="The textbook experiment: y = -2 x1 + 3.4 x2 + 4.2 + noise, a linear layer from zeros, mean-squared "
            "error, SGD at 0.01, no shuffling. 40 divides 1,000, so all micro-batches count alike.",
        ),
        regression_task(
            957,
            title="957 samples",
            text="The same, but an epoch's last batch is 10 + 10 + 10 + 7. The textbook loop divides by 4 all the "
            "same, so that its last seven samples count too much.",
        ),
        speeches_task(
            title="Tiny Shakespeare",
            text="A small convolution network predicts each next character of 340 speeches. The mean is over "
            "characters, of which one micro-batch has 332 and another 1,478.",
        ),
    ]
