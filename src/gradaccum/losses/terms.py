"""What a user's loss function may return, as named terms: a `Loss`, a 0-d tensor, or a dict of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normalise import SINGLE, Normaliser, host_number


def as_terms(
    terms: Mapping[str, Any], samples: int | None, weights: Mapping[str, Weight] | None = None
) -> dict[str, Loss]:
    """A dict of losses, each made a `Loss`; see `as_loss`."""
    if not terms:
        raise LossError("The loss is an empty dict, so there is nothing to learn from. Return at least one term.")
    return {name: as_loss(term, samples, weights, name=name) for name, term in terms.items()}


def as_named(loss: Any, samples: int | None, weights: Mapping[str, Weight] | None = None) -> dict[str, Loss]:
    """Whatever a user returned, by name: a single loss under `SINGLE`."""
    if isinstance(loss, Mapping):
        return as_terms(loss, samples, weights)
    return {SINGLE: as_loss(loss, samples, weights)}


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


def seeded(
    normaliser: Normaliser, loss: Any, samples: int | None, weights: Mapping[str, Weight] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The roots of a micro-batch's loss that weigh anything, and the gradients their backward starts with."""
    again = normaliser.seeds_again(loss, samples) if weights is None else None
    if again is not None:
        return (loss,), again
    if isinstance(loss, Tensor) and weights is None and samples and not loss.dim() and loss.requires_grad:
        root, seed = normaliser.seed_mean(loss, samples)  # the short way, of most losses: as as_loss would
        return (root,), (seed,)
    if isinstance(loss, (Tensor, Loss)) or not isinstance(loss, Mapping):
        one = normaliser.seed(as_loss(loss, samples, weights))
    else:
        several = normaliser.seeds(as_terms(loss, samples, weights))
        return tuple(root for root, _ in several), tuple(seed for _, seed in several)
    return ((), ()) if one is None else ((one[0],), (one[1],))


def expect_rows(
    normaliser: Normaliser, loss: Any, samples: int | None, weights: Mapping[str, Weight] | None, *, rows: int
) -> None:
    """Before the first backward of a window that cannot be divided afterwards: takes its rows for its total weight.

    Args:
        normaliser: of the window.
        loss: see `as_named`.
        samples: rows of the micro-batch; None where unknown.
        weights: what plain tensors are means over where the user has said so, by name.
        rows: of the whole window; 0 where not known.

    Raises:
        LossError: the total was not given, and a loss weighs something else than its rows.
    """
    if normaliser.knows_totals:
        return
    for name, term in as_named(loss, samples, weights).items():
        weight = None if term.weight is None else host_number(term.weight)
        if weight is not None and (not rows or isinstance(weight, Tensor) or weight != samples):
            seen = "a count on the device" if isinstance(weight, Tensor) else f"{weight:g}"
            raise LossError(
                f"{_term(name)} is over {seen}, in a micro-batch of {samples} rows, and gradients that add up in the "
                "momentum cannot be divided afterwards: the momentum would be divided, too. So the window's total has "
                "to be known before its first backward. Say ahead what the loss is over: weights=lambda batch: ..., or "
                'pass accumulate_into="grad".'
            )
    normaliser.expect(rows)


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
        "model's output detached on the way?"
    )


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
