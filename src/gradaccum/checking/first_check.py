"""The look before a step's first update: a few rows together, held against two unequal pieces of them.

Both sides go through the step's own machinery (its runner, its way to weigh and add up), the pieces as micro-batches,
the rows together as a batch that is not cut. Both start from the same state, and nothing of them is left behind
(`no_trace`). What is compared is the gradient, and the state that forwards leave.

A difference is believed only if it is none of these: random draws (replayed, if anything was drawn), a loss function
that gives something else whenever it is called, pieces of a single sample that training would not run, rounding
(measured: parameters are moved in their last bit). What cannot be told from a fault is not checked, and said so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gradaccum import tree
from gradaccum.checking.findings import Evidence, Finding, blame
from gradaccum.checking.look_run import Draw, Look, Side, StepToCheck
from gradaccum.checking.module_outputs import Recording
from gradaccum.checking.pieces import copied
from gradaccum.checking.random_ops import Draws
from gradaccum.checking.side_difference import SMALLEST, difference, effective_dtype, state_difference
from gradaccum.errors import BatchError, WindowError
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of
from gradaccum.types import Rows, Split, num_rows
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.plan_line import NOT_CHECKED, exact_on

_MOST_ROWS = 8
# By what part of itself a gradient may differ without being looked into: rounding of a forward and backward, by kernels
# that depend on the shape. 5% was seen on deep networks in bfloat16.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Rounding happens in every operation, and parameters are moved in their last bit only once.
_MORE_THAN_MEASURED = 30.0
_MOST_ROUNDING = 0.1  # where rounding may change so much, nothing can be said


def look_first(
    step: StepToCheck, batch: Any, planned: Sequence[Rows], *, ranks: OverRanks | None = None
) -> Finding:
    """Looks at a few rows of a batch, and leaves everything as it was.

    Args:
        step: what trains.
        batch: the first batch.
        planned: the micro-batches that training is about to run, or could run.
        ranks: the processes that train together: each looks at rows of its own, and all agree on what was found.

    Returns:
        What was found. Out of memory means fewer rows; where the user's code raises, nothing was checked.
    """
    if ranks is None:
        return _look(step, batch, planned)
    if ranks.runs_collectives or ranks.shards:
        return Finding(evidence=f"{NOT_CHECKED}: forwards of a sharded model wait for other processes")
    if any(isinstance(module, nn.SyncBatchNorm) for model in step.models for module in model.modules()):
        return Finding(evidence=f"{NOT_CHECKED}: SyncBatchNorm waits for other processes")
    own = _look(step, batch, planned) if sum(map(num_rows, planned)) >= 2 else None
    found = [one for one in ranks.share_findings(own) if one is not None]
    if not found:
        return Finding(evidence=f"{NOT_CHECKED}: no process has two samples")
    return max(found, key=lambda one: one.weight)


def _look(step: StepToCheck, batch: Any, planned: Sequence[Rows]) -> Finding:
    rows = max(2, min(_MOST_ROWS, *map(num_rows, planned), sum(map(num_rows, planned))) if len(planned) == 1 else 2)
    most = max(2, min(_MOST_ROWS, max(map(num_rows, planned))))
    error: Exception | None = None
    for rows in _fewer_and_fewer(most):
        try:
            finding = _look_at(step, batch, planned, rows)
        except Exception as raised:  # noqa: BLE001  # whatever it is, training itself shows it
            if not is_out_of_memory(raised):
                error = error or raised
                continue
            let_go_of(raised)
        else:
            return finding
        free_memory(next(step.models[0].parameters()).device)
    if error is None:
        return Finding(evidence=f"{NOT_CHECKED}: two samples at once ran out of memory")
    return Finding(evidence=f"{NOT_CHECKED}: {most} samples at once raise {in_short(error)}")
