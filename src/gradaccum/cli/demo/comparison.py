"""All ways of training on one task, and whether the library's is the whole batch's.

The measure is the whole batch in float64. Nothing in float32 can hit it: each way is some distance away by rounding
alone, the whole batch too. So the library is held to two things:

- In float64 it is within `FLOAT64_BOUND` of the measure, parameters and gradients alike, at every update. An error of
  method is 10 orders of magnitude larger than that; it can't hide.
- In float32 it is within rounding of the measure (`float32_bound`) at every update, as the whole batch itself is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradaccum.cli.demo import ways
from gradaccum.cli.demo.run import Run
from gradaccum.cli.demo.task import Task

FLOAT64_BOUND = 1e-12
"""Relative. One rounding is 2^-53 = 1.1e-16, and an update's gradient is a sum of up to 10,000 terms: in another order
it differs by about sqrt(10,000) roundings, 1.1e-14, if nothing cancels; by 100 times that where most of it does."""

RUNS_PER_TASK = 5
"""How often `compare` trains its task."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Five runs of one task."""

    task: Task
    exact: Run
    """Whole batch in float64: the measure."""
    whole: Run
    textbook: Run
    library: Run
    library_in_float64: Run

    @property
    def is_exact(self) -> bool:
        """Whether the library's result is the whole batch's, up to rounding."""
        return (
            _within(distances(self.library_in_float64.parameters, self.exact.parameters), FLOAT64_BOUND)
            and _within(distances(self.library_in_float64.gradients, self.exact.gradients), FLOAT64_BOUND)
            and self.is_within_rounding(self.library)
        )

    def is_within_rounding(self, run: Run) -> bool:
        """Whether a run in float32 stays as close to the measure as rounding allows."""
        return _within(distances(run.parameters, self.exact.parameters), float32_bound(self.task.updates))


def compare(task: Task, on_update: Callable[[], None] = lambda: None) -> Comparison:
    """Trains the task each way; calls back ``RUNS_PER_TASK * task.updates`` times."""
    return Comparison(
        task=task,
        exact=ways.whole_batch(task, torch.float64, on_update),
        whole=ways.whole_batch(task, torch.float32, on_update),
        textbook=ways.textbook_loop(task, torch.float32, on_update),
        library=ways.library(task, torch.float32, on_update),
        library_in_float64=ways.library(task, torch.float64, on_update),
    )


def distances(values: Tensor, measure: Tensor) -> Tensor:
    """Relative distance at each update, ``|values - measure| / |measure|`` in the 2-norm; both ``[updates, n]``."""
    return torch.linalg.vector_norm(values - measure, dim=1) / torch.linalg.vector_norm(measure, dim=1)


def largest_difference(values: Tensor, others: Tensor) -> float:
    """Between any two numbers at the same place, at any update."""
    return float((values - others).abs().max())


def float32_bound(updates: int) -> float:
    """Relative distance that rounding to float32 can bring about in ``updates`` updates.

    An update rounds the gradient and the new parameter, each by at most 2^-24 of it: 2^-23 an update. These add up at
    worst where training is stable, that is, where it does not magnify a difference.
    """
    return 2.0**-23 * updates


def _within(distances: Tensor, bound: float) -> bool:
    return bool((distances <= bound).all())  # so that a NaN is not within
