"""What each loss of PyTorch takes its mean over, and which function and options each loss class stands for.

The rule is one: ``reduction="mean"`` is the sum of what ``reduction="none"`` returns, divided by

    the number of those losses   every loss but the ones below. Element weights and ``pos_weight`` of BCE, the weight of
                                 Huber and the class weights of multi-margin scale the losses, not the divisor
    the weight of the targets    cross entropy and NLL with class indices: a target that is not ignored counts its class
                                 weight, or 1; label smoothing changes nothing about that. With class probabilities
                                 it is the number of losses, class weights or not
    the element weights          L1 and MSE with ``weight=``, which only their functional forms have
    the rows                     KL divergence with ``reduction="batchmean"``
    the sequences                CTC, after each loss was divided by its target's length, or by 1 for an empty target

So the losses are computed unreduced and added up here. Torch's own sum would lose three things: the sum of 16-bit
losses in float32, the divisor that is right whatever was broadcast, and the sum of losses that torch only has as a mean
(CTC, adaptive softmax). Where none of these can matter, a loss of each element of two tensors of one shape, it is
torch's own: one tensor and one node of the graph less.

A loss class hands its inputs and some of its attributes to a function. That function is called here, with the
attributes as they are at the time, so a module stays as the user made it: its ``reduction`` is not set and set back,
and it may be moved, or changed, after it was handed over.

Sources: ``torch/nn/functional.py``, ``torch/nn/modules/loss.py``, ``torch/nn/modules/adaptive.py``, and in
``aten/src/ATen/native`` of PyTorch ``Loss.cpp``, ``LossNLL.cpp``, ``LossNLL2d.cpp``, ``LossCTC.cpp``,
``LossMultiMargin.cpp`` and ``LossMultiLabelMargin.cpp``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.errors import UnsupportedError
from gradaccum.losses.loss import Weight

Arguments = Mapping[str, Any]
"""What a functional loss is called with, by parameter name, defaults included."""

Over = Callable[[int, Arguments], Weight]
"""The weight of a mean, from the number of losses and the arguments they were computed from."""

_ADDED_BY_TORCH = (torch.float32, torch.float64)

HAS_LINEAR_CROSS_ENTROPY = hasattr(nn, "LinearCrossEntropyOptions")
"""Linear cross entropy as it is known here came with torch 2.13; before, it is one loss less to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one loss of torch is taken apart into a sum and a weight."""

    function: Callable[..., Tensor]
    signature: inspect.Signature  # of ``function``
    over: Mapping[str, Over]  # what the mean is taken over, by reduction; not "sum", which nothing divides
    losses: Callable[[Arguments], Tensor] | None  # computes them where ``reduction="none"`` is not the way
    module: type[nn.Module]
    forward: inspect.Signature  # of the class, ``self`` included
    inputs: tuple[str, ...]  # the names that ``function`` has for what ``forward`` takes, in the same order
    options: Callable[[Any], dict[str, Any]]  # the other arguments that a module passes to ``function``
    is_elementwise: bool  # a loss for each element of ``input`` and ``target``

    def total(self, arguments: Arguments) -> tuple[Tensor, int]:
        """The sum of the losses that the reduction adds up, 0-d, and how many there are."""
        if self.is_elementwise:
            output, target = arguments["input"], arguments["target"]
            if output.dtype in _ADDED_BY_TORCH and output.shape == target.shape:
                return self.function(**_reduced(arguments, "sum")), output.numel()
        losses = self.function(**_reduced(arguments, "none")) if self.losses is None else self.losses(arguments)
        return add_up(losses), losses.numel()


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a torch loss, or of a subclass that inherits its ``forward``; None for any other ``forward``."""
    return None if "forward" in vars(module) else _BY_FORWARD.get(type(module).forward)


def torch_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The loss class of torch that the module's class is derived from; None where there is none."""
    return next((cls for cls in type(module).__mro__ if cls.__dict__.get("forward") in _BY_FORWARD), None)


def add_up(items: Tensor, *, divides: bool = False) -> Tensor:
    """Adds up losses or weights, to a 0-d tensor.

    The sum of float16 is in float32, since the largest number of float16 is 65504, and 20,000 tokens at a loss of 4 are
    beyond it. A sum of bfloat16 losses cannot overflow and stays as it is; but a sum that the gradient is divided by
    (``divides``) must not be rounded to bfloat16, which has no odd number above 256.
    """
    is_short = items.dtype == torch.float16 or (divides and items.dtype == torch.bfloat16)
    return items.sum(dtype=torch.float32) if is_short else items.sum()


def _reduced(arguments: Arguments, reduction: str) -> dict[str, Any]:
    return {**arguments, "reduction": reduction}


# What means are taken over.


def as_many(losses: int, arguments: Arguments) -> int:
    """Elements, samples, pixels: as many as there are losses."""
    return losses


def num_rows(losses: int, arguments: Arguments) -> int:
    """Rows of the input: KL divergence's "batchmean" (``torch/nn/functional.py``, ``kl_div``)."""
    log_probabilities: Tensor = arguments["input"]
    return log_probabilities.shape[0] if log_probabilities.dim() else 1


def target_weight(losses: int, arguments: Arguments) -> Weight:
    """The sum of class weights over the targets that are not ignored (``LossNLL.cpp``, ``total_weight``).

    With label smoothing too: ``cross_entropy_loss_label_smoothing`` divides both of its parts by it, so that targets
    of a class of weight 0 can have a loss and no weight. Class probabilities are divided by ``numel / num_classes``
    (``cross_entropy_loss_prob_target``), which is the number of losses.
    """
    target: Tensor = arguments["target"]
    if target.is_floating_point():
        return losses
    # Torch takes bytes as class indices too, and -100 compared with bytes would mean the byte 156.
    labels = target.long()
    ignore_index = ignored_label(arguments)
    class_weights: Tensor | None = arguments["weight"]
    if class_weights is None:
        return (labels != ignore_index).sum()
    is_ignored = labels == ignore_index
    weights = class_weights.detach()[labels.masked_fill(is_ignored, 0)]
    return add_up(weights.masked_fill(is_ignored, 0), divides=True)


def ignored_label(arguments: Arguments) -> int | None:
    """The label whose items have no loss and no weight; None where the loss has none, or no labels."""
    if "ignore_index" not in arguments or arguments["target"].is_floating_point():
        return None
    # Linear cross entropy writes its default as None, and means -100.
    return -100 if arguments["ignore_index"] is None else arguments["ignore_index"]


def element_weight(losses: int, arguments: Arguments) -> Weight:
    """The sum of ``weight=`` as it was passed, not as it is broadcast (``torch/nn/functional.py``, ``mse_loss``)."""
    weights: Tensor | None = arguments.get("weight")
    if weights is None:
        return losses
    if weights.requires_grad:
        raise UnsupportedError(
            "weight= of this loss requires a gradient, and torch divides by its sum. The gradient of that division "
            "needs the whole batch's loss, which no micro-batch knows: it would be missing. Pass weight.detach(), or "
            'reduction="sum", which nothing divides.'
        )
    return add_up(weights, divides=True)


# Losses for which `reduction="none"` is not the way.


def _ctc_losses(arguments: Arguments) -> Tensor:
    """One loss for each sequence; for a mean divided by the target's length (``LossCTC.cpp``, ``ctc_loss_impl``)."""
    log_probs: Tensor = arguments["log_probs"]
    if log_probs.dim() == 3 and log_probs.shape[1] == 0:
        # Torch refuses a batch without sequences. This is the empty list of their losses, with a graph.
        return log_probs.sum(dim=(0, 2))
    losses = F.ctc_loss(**_reduced(arguments, "none"))
    if arguments["reduction"] == "sum":
        return losses
    # Lengths on the host are copied, eight bytes a sequence, as torch itself copies them for its mean.
    lengths = torch.as_tensor(arguments["target_lengths"], device=losses.device)
    return losses / lengths.clamp_min(1)


def _linear_cross_entropy_losses(arguments: Arguments) -> Tensor:
    """The losses, or their sum where the loss works in chunks (``options=``).

    Unreduced, the backward of the chunked loss computes all logits a second time; summed, it finds the gradients that
    the forward left. Not in float16: those gradients are sums over all tokens, and could pass 65504.
    """
    is_chunked = arguments["options"] is not None and not arguments["target"].is_floating_point()
    reduction = "sum" if is_chunked and arguments["input"].dtype != torch.float16 else "none"
    return F.linear_cross_entropy(**_reduced(arguments, reduction))


def _adaptive_losses(input_: Tensor, target_: Tensor, *, module: nn.Module, reduction: str = "mean") -> Tensor:
    """The losses that ``AdaptiveLogSoftmaxWithLoss`` takes its mean of: it has no other reduction."""
    return -module(input_, target_).output


def _linear_cross_entropy_options(module: nn.LinearCrossEntropyLoss) -> dict[str, Any]:
    linear, shape = module.linear, (module.num_classes, *module.out_features)
    return {
        **_attributes(module, ("weight", "ignore_index", "label_smoothing", "options")),
        "linear_weight": linear.weight.reshape(*shape, linear.in_features),
        "linear_bias": None if linear.bias is None else linear.bias.reshape(shape),
    }


_OWNED = ("linear_weight", "module")  # what two functional forms require, and the module itself brings along


def _attributes(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in (*names, "reduction")}


def _rule(
    function: Callable[..., Tensor],
    module: type[nn.Module],
    *attributes: str,
    options: Callable[[Any], dict[str, Any]] | None = None,
    losses: Callable[[Arguments], Tensor] | None = None,
    is_elementwise: bool = False,
    **over: Over,
) -> Rule:
    """The rule of a loss whose class has options under the names, ``attributes``, that the function has too."""
    signature = inspect.signature(function)
    # By position and not by name: PoissonNLLLoss calls its input log_input, which in the functional form is an option.
    required = [parameter.name for parameter in signature.parameters.values() if parameter.default is parameter.empty]
    return Rule(
        function=function,
        signature=signature,
        over=over,
        losses=losses,
        module=module,
        forward=inspect.signature(module.forward),
        inputs=tuple(name for name in required if name not in _OWNED),
        options=options or (lambda instance: _attributes(instance, attributes)),
        is_elementwise=is_elementwise,
    )


def _functional_rules() -> Iterator[Rule]:
    yield _rule(F.l1_loss, nn.L1Loss, is_elementwise=True, mean=element_weight)
    yield _rule(F.mse_loss, nn.MSELoss, is_elementwise=True, mean=element_weight)
    yield _rule(F.smooth_l1_loss, nn.SmoothL1Loss, "beta", is_elementwise=True, mean=as_many)
    yield _rule(F.huber_loss, nn.HuberLoss, "delta", is_elementwise=True, mean=as_many)
    class_options = ("weight", "ignore_index")
    yield _rule(F.cross_entropy, nn.CrossEntropyLoss, *class_options, "label_smoothing", mean=target_weight)
    yield _rule(F.nll_loss, nn.NLLLoss, *class_options, mean=target_weight)  # NLLLoss2d inherits its forward
    if HAS_LINEAR_CROSS_ENTROPY:
        yield _rule(
            F.linear_cross_entropy,
            nn.LinearCrossEntropyLoss,
            options=_linear_cross_entropy_options,
            losses=_linear_cross_entropy_losses,
            mean=target_weight,
        )
    yield _rule(F.poisson_nll_loss, nn.PoissonNLLLoss, "log_input", "full", "eps", mean=as_many)
    yield _rule(F.gaussian_nll_loss, nn.GaussianNLLLoss, "full", "eps", mean=as_many)
    yield _rule(F.binary_cross_entropy, nn.BCELoss, "weight", is_elementwise=True, mean=as_many)
    # Not element by element: pos_weight may broadcast input and target to more losses.
    yield _rule(F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, "weight", "pos_weight", mean=as_many)
    yield _rule(F.kl_div, nn.KLDivLoss, "log_target", mean=as_many, batchmean=num_rows)
    yield _rule(F.hinge_embedding_loss, nn.HingeEmbeddingLoss, "margin", mean=as_many)
    yield _rule(F.margin_ranking_loss, nn.MarginRankingLoss, "margin", mean=as_many)
    yield _rule(F.cosine_embedding_loss, nn.CosineEmbeddingLoss, "margin", mean=as_many)
    yield _rule(F.soft_margin_loss, nn.SoftMarginLoss, mean=as_many)
    yield _rule(F.multi_margin_loss, nn.MultiMarginLoss, "p", "margin", "weight", mean=as_many)
    yield _rule(F.multilabel_margin_loss, nn.MultiLabelMarginLoss, mean=as_many)
    yield _rule(F.multilabel_soft_margin_loss, nn.MultiLabelSoftMarginLoss, "weight", mean=as_many)
    yield _rule(F.triplet_margin_loss, nn.TripletMarginLoss, "margin", "p", "eps", "swap", mean=as_many)
    with_distance = F.triplet_margin_with_distance_loss, nn.TripletMarginWithDistanceLoss
    yield _rule(*with_distance, "distance_function", "margin", "swap", mean=as_many)
    yield _rule(F.ctc_loss, nn.CTCLoss, "blank", "zero_infinity", losses=_ctc_losses, mean=as_many)


_ADAPTIVE = _rule(
    _adaptive_losses, nn.AdaptiveLogSoftmaxWithLoss, options=lambda module: {"module": module}, mean=as_many
)

RULES: Mapping[Callable[..., Any], Rule] = {one.function: one for one in _functional_rules()}
"""Every functional loss of torch, and how it is taken apart."""

_BY_FORWARD: Mapping[Any, Rule] = {one.module.forward: one for one in (*RULES.values(), _ADAPTIVE)}
