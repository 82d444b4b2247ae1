"""`audit`: the audit of a model and a loss, for a `TrainStep` of the options that are passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradaccum.auditing.audit_report import Report
from gradaccum.auditing.audit_task import check_size, make_task
from gradaccum.auditing.make_audit import audit_task
from gradaccum.fit.workload import check_functions
from gradaccum.train_step import TrainStep
from gradaccum.types import Activations, Split
from gradaccum.whole_batch.runners import BatchNorm, Combine, RunnerOptions
from gradaccum.window.option_names import explains_arguments
from gradaccum.window.weights import WeightsFunction


@explains_arguments("A batch is one argument: (x, y).")
def audit(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    micro_batch_size: int = 8,
    *,
    split: Split | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    batch_loss: Callable[[Any, Any], Any] | None = None,
    combine: Combine = "concat",
    batch_norm: BatchNorm = "micro",
    lockstep: bool = False,
    activations: Activations = "device",
    weights: WeightsFunction | None = None,
    accumulate_dtype: torch.dtype | None = None,
) -> Report:
    """Finds out whether accumulation makes the whole batch's update, and what keeps it from that.

    The gradient of the whole batch in one piece is compared with the one `TrainStep` accumulates, in float64 and in the
    model's own dtype, under autocast where the call stands in it, on copies of the parameters and buffers. Micro-
    batches are ragged, or those of ``split``. Random draws for each sample (dropout) are the same on both sides. Where
    the two differ, suspects are taken out in turn to see what each does, and remedies are tried. Model, buffers,
    gradients and random state are left as they were, and so are networks that the loss function runs besides.

    With ``batch_norm="frozen"`` or ``ga.GhostBatch(n)`` the whole batch is run so too.

    Not seen: hooks on parameters, processes, the optimizer, and state outside of modules and of torch.

    Args:
        model: one module or a sequence of them, in the mode they train in. Nothing is deep-copied.
        loss_fn: ``loss_fn(model, micro_batch)``, as for `TrainStep`.
        batch: a batch that fits in memory in one piece; a few micro-batches tell as much as many.
        micro_batch_size: the largest number of samples one forward sees; in any case less than the whole batch.
        split: as for `TrainStep`; its pieces are run.
        forward: ``forward(model, micro_batch)``, in place of ``loss_fn``, where the loss is over the whole batch.
        batch_loss: ``batch_loss(outputs, batch)``.
        combine: as for `TrainStep`.
        batch_norm: as for `TrainStep`.
        lockstep: as for `TrainStep`.
        activations: as for `TrainStep`.
        weights: ``weights(batch)`` counts what means are taken over, as for `TrainStep`.
        accumulate_dtype: as for `TrainStep`.

    Raises:
        WindowError: an option that makes no sense.
        BatchError: rows disagree, there are fewer than two, or the functions run the whole batch and none of its
            pieces.
        ParameterError: there is nothing to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        >>> def loss_fn(model, micro_batch):
        ...     x, y = micro_batch
        ...     return F.mse_loss(model(x), y)
        >>> batch = torch.randn(12, 4), torch.randn(12, 1)
        >>> report = ga.audit(model, loss_fn, batch, micro_batch_size=4)
        >>> report.exact, [(culprit.kind, culprit.where) for culprit in report.culprits]
        (False, [('batch-norm', '1')])
        >>> ga.audit(model, loss_fn, batch, micro_batch_size=4, batch_norm="exact").exact
        True
    """
    check_size(micro_batch_size)
    check_functions(loss_fn, forward, batch_loss)
    options = RunnerOptions(
        loss_fn=loss_fn,
        forward=forward,
        batch_loss=batch_loss,
        combine=combine,
        kept_graphs=None,
        weights=weights,
        batch_norm=batch_norm,
        lockstep=lockstep,
        activations=activations,
    )
    adding = {"accumulate_dtype": accumulate_dtype}
    return audit_task(
        make_task(model, batch, options, make_step=TrainStep, split=split, more_options=adding), micro_batch_size
    )
