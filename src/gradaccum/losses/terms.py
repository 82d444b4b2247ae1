"""What a user's loss function may return, as named terms: a `Loss`, a 0-d tensor, or a dict of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normalise import SINGLE


def as_terms(loss: Any, *, samples: int | None, weights: Mapping[str, Weight] | None = None) -> dict[str, Loss]:
    """The loss as named terms; a single one is named `SINGLE`.

    Args:
        loss: `Loss`, 0-d tensor, or dict of these by name.
        samples: rows of the micro-batch, which a plain tensor is the mean over; None where unknown.
        weights: what plain tensors are means over where the user has said so, by name.

    Raises:
        LossError: not a scalar, no graph, or a plain tensor whose number of samples is unknown.
    """
    if isinstance(loss, Mapping):
        if not loss:
            raise LossError("The loss is an empty dict, so there is nothing to learn from. Return at least one term.")
        return {name: _as_loss(term, f"The term {name!r}", samples, (weights or {}).get(name)) for name, term in loss.items()}
    return {SINGLE: _as_loss(loss, "The loss", samples, (weights or {}).get(SINGLE))}


def _as_loss(loss: Any, what: str, samples: int | None, weight: Weight | None) -> Loss:
    if isinstance(loss, Loss):
        found = loss
    elif not isinstance(loss, Tensor):
        raise LossError(
            f"{what} is a {type(loss).__name__}, which has no graph to run backward through. Return the loss tensor "
            "itself (before .item()), a ga.Loss, or a dict of these."
        )
    elif loss.dim() != 0:
        raise LossError(
            f"{what} has shape {tuple(loss.shape)}; a gradient needs a scalar. Reduce it and say over what: "
            "ga.Loss.sum(losses.sum(), over=losses.numel())."
        )
    elif weight is not None:
        found = Loss(loss, weight, is_mean=True)
    elif samples is None:
        raise LossError(
            f"{what} is a plain tensor, a mean over samples, and the number of samples is not known here: backward() "
            "was called outside of over(), or the micro-batch holds no tensors. Its share of the gradient would be a "
            "guess. Return ga.Loss.mean(value, over=n)."
        )
    else:
        found = Loss(loss, samples, is_mean=True)
    weighs_nothing = isinstance(found.weight, (int, float)) and found.weight == 0
    if not found.root.requires_grad and not weighs_nothing:
        raise LossError(
            f"{what} has no graph: it does not depend on anything that requires a gradient, so it would add nothing. "
            "Was it computed under torch.no_grad(), detached, or is the whole model frozen?"
        )
    return found
