"""What a user's loss function may return, as named terms: a `Loss`, a 0-d tensor, or a dict of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normaliser import SINGLE, host_number


def as_terms(loss: Any, samples: int | None, weights: Mapping[str, Weight] | None = None) -> dict[str, Loss]:
    """What a user's loss function returned, as losses by name; a single one under `SINGLE`.

    A plain tensor is a mean over what ``weights`` has under its name, and otherwise over the micro-batch's samples.

    Raises:
        LossError: not a scalar, no graph, or a plain tensor whose number of samples is unknown.
    """
    if isinstance(loss, (Loss, Tensor)) or not isinstance(loss, Mapping):
        return {SINGLE: _as_loss(SINGLE, loss, samples, weights)}
    if hasattr(loss, "loss"):  # Hugging Face's ModelOutput
        raise LossError(
            f"The loss is a {type(loss).__name__}, everything that the model returned. Its entries would be taken for "
            "losses. Write: return output.loss."
        )
    if "loss" in loss and (beside := [name for name, term in loss.items() if not _adds_to_gradient(term)]):
        raise LossError(
            f"The loss is a dict of {', '.join(map(repr, loss))}, and {', '.join(map(repr, beside))} cannot be a loss: "
            "not one number with a graph. A dict is of losses, which are added up. Return the one that is: return "
            'output["loss"]; what is to be logged goes into a list of your own.'
        )
    if not loss:
        raise LossError("The loss is an empty dict, so there is nothing to learn from. Return at least one term.")
    return {name: _as_loss(name, term, samples, weights) for name, term in loss.items()}


def _as_loss(name: str, loss: Any, samples: int | None, weights: Mapping[str, Weight] | None) -> Loss:
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


def _adds_to_gradient(term: Any) -> bool:
    """Whether it can be a loss beside another: one number that depends on parameters, or one over nothing."""
    return isinstance(term, Loss) or (isinstance(term, Tensor) and term.dim() == 0 and term.requires_grad)


def without_value(losses: Mapping[str, Loss]) -> dict[str, Loss]:
    """The same losses with value and weight 0, but with their gradient: where another process counts them."""
    found: dict[str, Loss] = {}
    for name, loss in losses.items():
        total = loss.total
        found[name] = Loss(total - total.detach(), None if loss.weight is None else 0, is_mean=False)
    return found


def no_gradient(parameters: Sequence[nn.Parameter]) -> LossError:
    """The error for a window from which none of the parameters got a gradient."""
    trainable = sum(parameter.requires_grad for parameter in parameters)
    return LossError(
        f"0 of {trainable} trainable parameters got a gradient from this window, so there is nothing to update with. "
        "The loss depends on something that requires a gradient, but on none of the model's parameters: was the "
        "model's output detached on the way, or is it a model that was made anew after the one that was passed?"
    )


def _unusable(loss: Any, name: str) -> LossError:
    what = _term(name)
    if isinstance(loss, (tuple, list)):
        return LossError(
            f"{what} is a {type(loss).__name__} of {len(loss)}: {', '.join(type(one).__name__ for one in loss[:4])}. "
            "Which of them is the loss would be a guess. Return that one (return output.loss, or return loss without "
            'what stands beside it); for several terms a dict: {"lm": lm_loss, "aux": aux_loss}.'
        )
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
        "called outside of over(), or how many the micro-batch has could only be guessed. Its share of the gradient "
        "would be a guess. Return ga.Loss.mean(value, over=n), or count the samples: ga.Accumulator(..., "
        "samples=lambda micro_batch: ...), or accumulator.backward(loss, samples=n)."
    )


def _term(name: str) -> str:
    return f"The term {name!r}" if name else "The loss"
