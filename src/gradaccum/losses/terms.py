"""What a user's loss function may return, as named terms: a `Loss`, a 0-d tensor, or a dict of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normalise import SINGLE, host_number


def as_terms(
    terms: Mapping[str, Any], samples: int | None, weights: Mapping[str, Weight] | None = None
) -> dict[str, Loss]:
    """A dict of losses, each made a `Loss`; see `as_loss`."""
    if not terms:
        raise LossError("The loss is an empty dict, so there is nothing to learn from. Return at least one term.")
    return {name: as_loss(term, samples, weights, name=name) for name, term in terms.items()}


def as_loss(loss: Any, samples: int | None, weights: Mapping[str, Weight] | None = None, *, name: str = SINGLE) -> Loss:
    """What a user returned, as a `Loss`.

    Args:
        loss: `Loss` or 0-d tensor.
        name: of the term; `SINGLE` where there is only one.
        samples: rows of the micro-batch, which a plain tensor is the mean over; None where unknown.
        weights: what plain tensors are means over where the user has said so, by name.

    Raises:
        LossError: not a scalar, no graph, or a plain tensor whose number of samples is unknown.
    """
    weight = None if weights is None else weights.get(name)
    if isinstance(loss, Loss):
        found = loss
    elif isinstance(loss, Tensor) and loss.dim() == 0 and (weight is not None or samples is not None):
        found = Loss(loss, samples if weight is None else weight, is_mean=True)
    else:
        raise _unusable(loss, name)
    root = found.root
    if not root.requires_grad and (found.weight is None or host_number(found.weight) != 0):
        raise LossError(
            f"{_term(name)} has no graph: it does not depend on anything that requires a gradient, so it would add "
            "nothing. Was it computed under torch.no_grad(), detached, or is the whole model frozen?"
        )
    return found


def _unusable(loss: Any, name: str) -> LossError:
    what = _term(name)
    if not isinstance(loss, Tensor):
        return LossError(
            f"{what} is a {type(loss).__name__}, which has no graph to run backward through. Return the loss tensor "
            "itself (before .item()), a ga.Loss, or a dict of these."
        )
    if loss.dim() != 0:
        return LossError(
            f"{what} has shape {tuple(loss.shape)}; a gradient needs a scalar. Reduce it and say over what: "
            "ga.Loss.sum(losses.sum(), over=losses.numel())."
        )
    return LossError(
        f"{what} is a plain tensor, a mean over samples, and the number of samples is not known here: backward() was "
        "called outside of over(), or the micro-batch holds no tensors. Its share of the gradient would be a guess. "
        "Return ga.Loss.mean(value, over=n)."
    )


def _term(name: str) -> str:
    return f"The term {name!r}" if name else "The loss"
