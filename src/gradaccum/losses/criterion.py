"""A loss of PyTorch that returns, along with its value, what the mean was taken over.

    criterion(output, target)  =  Loss.sum(sum of the losses, over=what torch divides that sum by)

What torch divides by stands in ``torch_losses.py``. As a sum and a weight, a micro-batch with nothing to learn from (no
rows, every target ignored) adds zero to the gradient; torch's own mean is 0 / 0 there, and its gradient NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from gradaccum.errors import UnknownLossError
from gradaccum.losses.loss import Loss
from gradaccum.losses.torch_losses import RULES, Rule, ignored_label, rule_of, torch_class_of

TorchLoss = nn.Module | Callable[..., Tensor]

_LEGACY = ("size_average", "reduce")


def criterion(loss: TorchLoss) -> Criterion:
    """A `Criterion`, of which the public ``criterion`` in ``chunks/head_criterion.py`` says what it does.

    Raises:
        UnknownLossError: ``loss`` is none of torch's, or its reduction is "none".
    """
    return Criterion(loss)


@dataclass(frozen=True, slots=True, repr=False)
class Criterion:
    """A loss of torch, as it was given, that returns a `Loss`; made by `criterion`."""

    loss: TorchLoss

    def __post_init__(self) -> None:
        rule, options = _rule_and_options(self.loss)
        _reduction(rule, options)

    def __call__(self, *inputs: Any, **options: Any) -> Loss:
        """Computes the loss of one micro-batch; options are inputs by name, and what a functional form has besides.

        Raises:
            UnknownLossError: the reduction is "none", or not one that this loss has.
            UnsupportedError: the element weights of an L1 or MSE loss require a gradient.
        """
        rule, arguments = _bound(self.loss, inputs, options)
        reduction = _reduction(rule, arguments)
        for name in _LEGACY:
            arguments.pop(name, None)
        arguments["reduction"] = reduction
        total, losses = rule.total(arguments)
        weight = None if reduction == "sum" else rule.over[reduction](losses, arguments)
        # Not by Loss.sum, which reads a user's count where it lies on the host: torch.compile would break its graph
        # there, and fake tensors have nothing to read. This count was made here.
        label = ignored_label(arguments)
        ignored = None if label is None else (arguments["target"], label)
        return Loss(root=total, weight=weight, is_mean=False, ignored=ignored)

    def ignored_label(self, target: Tensor) -> int | None:
        """The label whose items have no loss and no weight, where the options of the loss say so before a call."""
        rule, options = _rule_and_options(self.loss)
        default = rule.signature.parameters.get("ignore_index")
        if default is None:
            return None
        return ignored_label({"ignore_index": default.default, **options, "target": target})

    def __repr__(self) -> str:
        return f"ga.criterion({_name(self.loss)})"


def _bound(loss: TorchLoss, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
    """A loss's rule, and all that its functional form is called with, by name."""
    rule, given = _rule_and_options(loss)
    if isinstance(loss, nn.Module):
        if options or len(inputs) != len(rule.inputs):  # inputs by name, or a mistake
            inputs = rule.forward.bind(loss, *inputs, **options).args[1:]
        return rule, {**given, **dict(zip(rule.inputs, inputs, strict=True))}
    first = loss.args if isinstance(loss, functools.partial) else ()
    bound = rule.signature.bind(*first, *inputs, **{**given, **options})
    bound.apply_defaults()
    return rule, bound.arguments


def _rule_and_options(loss: TorchLoss) -> tuple[Rule, dict[str, Any]]:
    """A loss's rule, and the options by name that are known before it is called."""
    if isinstance(loss, nn.Module):
        rule = rule_of(loss)
        options = {} if rule is None else rule.options(loss)
    else:
        function, options = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
        rule = RULES.get(function) if isinstance(function, FunctionType) else None  # others may not be hashable
    if rule is None:
        raise _unknown_loss(loss)
    return rule, options


def _reduction(rule: Rule, arguments: Mapping[str, Any]) -> str:
    """The reduction; from the arguments that are deprecated in its favour as torch itself translates them."""
    reduction = arguments.get("reduction", "mean")
    legacy = {name: arguments[name] for name in _LEGACY if arguments.get(name) is not None}
    if legacy and reduction == "batchmean":
        raise UnknownLossError(
            f"kl_div got reduction='batchmean' together with {_keywords(legacy)}. Torch obeys both: what is a mean "
            "over elements already is divided by the rows once more, and the gradient too small by their number. Leave "
            f"{' and '.join(legacy)} out."
        )
    if legacy:
        reduction = nn.L1Loss(**legacy).reduction
    if reduction != "sum" and reduction not in rule.over:
        known = " or ".join(repr(name) for name in (*rule.over, "sum"))
        if reduction == "none":
            happened = "leaves one loss for each item, of which there is no gradient until they are put together"
        else:
            happened = "is not known to ga.criterion, so neither is what the gradient would have to be divided by"
        raise UnknownLossError(
            f"{rule.function.__name__} with reduction={reduction!r} {happened}. Use reduction={known}, or put your "
            "losses together yourself: return ga.Loss.sum(losses.sum(), over=losses.numel()), with the sum of their "
            "weights in the place of numel() where you weight them."
        )
    return reduction


def _unknown_loss(loss: Any) -> UnknownLossError:
    if isinstance(loss, type):
        return UnknownLossError(
            f"ga.criterion got the class {loss.__name__} itself, which has no options yet and computes no loss, so no "
            f"gradient. Pass an instance: ga.criterion({loss.__name__}(...))."
        )
    base = torch_class_of(loss) if isinstance(loss, nn.Module) else None
    if base is not None:
        happened = (
            f"{type(loss).__name__} has a forward of its own, which may take its mean over anything, whatever "
            f"{base.__name__} does"
        )
    else:
        happened = f"ga.criterion got {_name(loss)}, which is no loss of torch.nn and no functional form of one"
    return UnknownLossError(
        f"{happened}. With an unknown weight, micro-batches could only count alike, and their gradients would not add "
        "up to the whole batch's. Return the loss together with what it is taken over, from your own loss function: "
        "ga.Loss.sum(losses.sum(), over=losses.numel()) of one loss for each item, or ga.Loss.mean(value, over=n) of "
        "a mean over n items."
    )


def _name(loss: Any) -> str:
    if isinstance(loss, functools.partial):
        parts = [_name(loss.func), *map(repr, loss.args), *([_keywords(loss.keywords)] if loss.keywords else [])]
        return f"partial({', '.join(parts)})"
    if isinstance(loss, FunctionType):
        return f"F.{loss.__name__}" if loss in RULES else loss.__qualname__
    return repr(loss)


def _keywords(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
