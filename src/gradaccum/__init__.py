"""Train with the batch size you want on the memory you have, with exactly the update the whole batch would have given.

Two names to learn: `Accumulator` for your own loop over micro-batches, `TrainStep` for whole batches in hand.
"""

import typing as _typing
from importlib import import_module as _import_module

from gradaccum.accumulator import Accumulator
from gradaccum.errors import (
    BatchError,
    BatchNormWarning,
    DiscardedWindowWarning,
    DoesNotFitError,
    GradAccumError,
    GradAccumWarning,
    InexactError,
    LossError,
    MeanError,
    MissingExtraError,
    MisuseError,
    OptionError,
    ParameterError,
    RankError,
    ReplayError,
    StateError,
    UnknownLossError,
    UnsupportedError,
    WindowError,
)
from gradaccum.losses.loss import Loss
from gradaccum.split.by_samples import split_by_samples
from gradaccum.train_step import TrainStep
from gradaccum.types import GhostBatch, Job, Split, Update

if _typing.TYPE_CHECKING:
    from gradaccum.advice import advise
    from gradaccum.audit_model import audit
    from gradaccum.auditing.audit_report import Report
    from gradaccum.auditing.culprits import Culprit
    from gradaccum.checkpoint.checkpoint import Checkpoint
    from gradaccum.chunks.causal_head import chunked_head
    from gradaccum.chunks.head_criterion import criterion
    from gradaccum.chunks.row_chunks import chunked
    from gradaccum.fit.plan_result import Plan
    from gradaccum.fit.planner import plan
    from gradaccum.integrations.transformers.router_losses import balance_over_batch
    from gradaccum.losses.weight_of import weight_of
    from gradaccum.split.as_given import split_as_given
    from gradaccum.split.by_cost import split_by_cost
    from gradaccum.split.packed import split_packed
    from gradaccum.sync.global_batches import GlobalBatchSampler
    from gradaccum.whole_batch.lockstep.gather import gather
    from gradaccum.window.own_window import Window

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "BatchError",
    "BatchNormWarning",
    "Checkpoint",
    "Culprit",
    "DiscardedWindowWarning",
    "DoesNotFitError",
    "GhostBatch",
    "GlobalBatchSampler",
    "GradAccumError",
    "GradAccumWarning",
    "InexactError",
    "Job",
    "Loss",
    "LossError",
    "MeanError",
    "MissingExtraError",
    "MisuseError",
    "OptionError",
    "ParameterError",
    "Plan",
    "RankError",
    "ReplayError",
    "Report",
    "Split",
    "StateError",
    "TrainStep",
    "UnknownLossError",
    "UnsupportedError",
    "Update",
    "Window",
    "WindowError",
    "advise",
    "audit",
    "balance_over_batch",
    "chunked",
    "chunked_head",
    "criterion",
    "gather",
    "plan",
    "split_as_given",
    "split_by_cost",
    "split_by_samples",
    "split_packed",
    "weight_of",
]


_TOOLS = {
    "criterion": "chunks.head_criterion",
    "gather": "whole_batch.lockstep.gather",
    "Checkpoint": "checkpoint.checkpoint",
    "chunked_head": "chunks.causal_head",
    "chunked": "chunks.row_chunks",
    "weight_of": "losses.weight_of",
    "split_as_given": "split.as_given",
    "split_by_cost": "split.by_cost",
    "split_packed": "split.packed",
    "GlobalBatchSampler": "sync.global_batches",
    "Window": "window.own_window",
    "Culprit": "auditing.culprits",
    "Plan": "fit.plan_result",
    "Report": "auditing.audit_report",
    "advise": "advice",
    "audit": "audit_model",
    "balance_over_batch": "integrations.transformers.router_losses",
    "plan": "fit.planner",
}


def __getattr__(name: str) -> _typing.Any:
    """Tools are imported when they are first asked for: training does not wait for them."""
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(_import_module(f"gradaccum.{_TOOLS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
