"""Whether a loss function can be called as it will be, looked at when a step is made and not in its first window."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from gradaccum.errors import LossError
from gradaccum.losses.criterion import Criterion

_MODELS = {"model", "net", "network", "module"}
_BATCHES = {"batch", "micro_batch", "microbatch", "data", "inputs", "sample", "samples", "x"}
_OUTPUTS = {"input", "inputs", "output", "outputs", "logits", "pred", "preds", "prediction", "y_pred", "y_hat"}
_TARGETS = {"target", "targets", "label", "labels", "y_true"}
_FORM = "def loss_fn(model, micro_batch): x, y = micro_batch; return criterion(model(x), y)"


def check_loss_fn(loss_fn: Callable[..., Any]) -> None:
    """Checks that it takes a model and a micro-batch, in this order.

    Raises:
        LossError: it does not; a criterion of outputs and targets, say.
    """
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if isinstance(loss_fn, (_Loss, Criterion)):
        raise LossError(_is_criterion(name))
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    names = [parameter.name for parameter in signature.parameters.values() if parameter.kind in (
        parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise LossError(
            f"loss_fn is called with two arguments, the model and a micro-batch, and {name}{signature} cannot be: "
            f"{error}. Write it as {_FORM}."
        ) from error
    first, second = [*names, "", ""][:2]
    if first in _OUTPUTS and second in _TARGETS:
        raise LossError(_is_criterion(name))
    if first in _BATCHES and second in _MODELS:
        raise LossError(
            f"loss_fn is called with the model first and the micro-batch second, and {name}{signature} names them the "
            f"other way round. Write it as {_FORM}."
        )


def _is_criterion(name: str) -> str:
    return (
        f"loss_fn is {name}, which takes outputs and targets; loss_fn is called with the model and a micro-batch. Wrap "
        f"it: criterion = ga.criterion(...), and {_FORM}."
    )
