"""What a user wants run: models, functions and a batch. `plan` and `audit` begin with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradaccum import tree
from gradaccum.errors import BatchError, ParameterError, WindowError
from gradaccum.split.asked import rows_in
from gradaccum.split.by_samples import split_by_samples
from gradaccum.types import Split
from gradaccum.window.parameters import as_sequence, refuse_data_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Forward and backward of a batch: by ``loss_fn``, or by ``forward`` and a ``batch_loss`` over all outputs."""

    models: Sequence[nn.Module]
    model: Any  # what the user's functions are called with: a module, or a sequence of them
    loss_fn: Callable[[Any, Any], Any] | None
    forward: Callable[[Any, Any], Any] | None
    batch_loss: Callable[[Any, Any], Any] | None
    batch: Any  # where the user keeps it
    split: Split  # how it is cut
    rows: int  # of the batch; one at least
    device: torch.device  # where the models are
    optimizers: Sequence[Optimizer] = ()

    @staticmethod
    def checked(
        model: Any,
        loss_fn: Any,
        batch: Any,
        *,
        forward: Any,
        batch_loss: Any,
        optimizer: Any = None,
        split: Split | None = None,
    ) -> Workload:
        """The workload of what a user has passed; an error where it cannot be run.

        A ``split`` of the user's own counts the rows, where it can.
        """
        check_functions(loss_fn, forward, batch_loss)
        models: list[nn.Module] = as_sequence(model, nn.Module, name="model")
        refuse_data_parallel(models)
        split = split_by_samples() if split is None else split
        rows = rows_in(split, batch)
        if rows == 0:
            raise BatchError(
                "The batch has 0 rows, and nothing can be run with it. Pass a batch as it is trained with."
            )
        parameters = [parameter for model in models for parameter in model.parameters()]
        if any(is_lazy(parameter) for parameter in parameters):
            raise ParameterError(
                "Some parameters have no shape yet, so their memory is unknown. Run one forward of the lazy modules "
                "first."
            )
        if not any(parameter.requires_grad for parameter in parameters):
            raise ParameterError(
                f"There is nothing to train: none of the {len(parameters)} parameters requires a gradient, so no "
                "backward can be run. Call parameter.requires_grad_() on those to train."
            )
        return Workload(
            models=models,
            model=model,
            loss_fn=loss_fn,
            forward=forward,
            batch_loss=batch_loss,
            batch=batch,
            split=split,
            rows=rows,
            device=parameters[0].device,
            optimizers=[] if optimizer is None else as_sequence(optimizer, Optimizer, name="optimizer"),
        )

    def input_bytes(self, size: int, *, device: torch.device) -> int:
        """What a device holds of the batch itself while a micro-batch of ``size`` rows runs.

        A batch that is there already stays. From elsewhere comes the micro-batch, on CUDA with the next one on its way;
        and the whole batch, where its loss is taken at once.
        """
        is_split = size < self.rows
        here = sum(tensor.nbytes for tensor in tree.tensors(self.batch) if tensor.device == device)
        elsewhere = sum(tensor.nbytes for tensor in tree.tensors(self.batch) if tensor.device != device)
        rows = size * (2 if device.type == "cuda" and is_split else 1)
        if self.loss_fn is None and is_split:
            rows += self.rows
        return here + elsewhere * rows // self.rows


def check_functions(loss_fn: Any, forward: Any, batch_loss: Any) -> None:
    """Checks that they say what the loss is, and say it once.

    Raises:
        WindowError: they do not.
    """
    if not callable(loss_fn) and not (loss_fn is None and callable(forward) and callable(batch_loss)):
        raise WindowError(
            f"loss_fn is {type(loss_fn).__name__}, forward {type(forward).__name__} and batch_loss "
            f"{type(batch_loss).__name__}. Pass loss_fn(model, micro_batch), or in its place both "
            "forward=forward(model, micro_batch) and batch_loss=batch_loss(outputs, batch)."
        )
    if loss_fn is not None and (forward is not None or batch_loss is not None):
        raise WindowError("loss_fn and forward= or batch_loss= say two things. Pass loss_fn, or the other two.")
