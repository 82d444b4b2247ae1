"""The loss classes of PyTorch, as calls of their functional forms.

A module's ``forward`` hands its inputs and some of its attributes to a function (``torch/nn/modules/loss.py``). Calling
that function here, with the attributes as they are at the time, leaves the module as the user made it: its
``reduction`` is not set and set back, and it may be moved, or changed, after it was handed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from gradaccum.losses.torch_losses import ADAPTIVE, HAS_LINEAR_CROSS_ENTROPY, RULES, Rule

Options = Callable[[Any], dict[str, Any]]
"""What a module adds to its inputs when it calls its functional form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleForm:
    """A loss class as a call of its functional form.

    Attributes:
        rule: the functional form, and how it is taken apart.
        options: the keyword arguments that a module of the class passes to it.
        inputs: the names that it has for what ``forward`` takes, in the same order.
        signature: of ``forward``, ``self`` included.
    """

    rule: Rule
    options: Options
    inputs: tuple[str, ...]
    signature: inspect.Signature


def form_of(module: nn.Module) -> ModuleForm | None:
    """The form of a torch loss, or of a subclass that inherits its ``forward``; None for every other module.

    A subclass with a ``forward`` of its own may compute anything, so it is not known, and neither is a module whose
    ``forward`` was replaced.
    """
    return None if "forward" in vars(module) else _FORMS.get(type(module).forward)


def torch_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The loss class of torch that the module's class is derived from; None where there is none."""
    return next((cls for cls in type(module).__mro__ if cls.__dict__.get("forward") in _FORMS), None)


def _attributes(*names: str) -> Options:
    """Options that the module keeps under the names which the function has for them."""
    return lambda module: {name: getattr(module, name) for name in (*names, "reduction")}


def _linear_cross_entropy_options(module: nn.LinearCrossEntropyLoss) -> dict[str, Any]:
    linear, shape = module.linear, (module.num_classes, *module.out_features)
    return {
        **_attributes("weight", "ignore_index", "label_smoothing", "options")(module),
        "linear_weight": linear.weight.reshape(*shape, linear.in_features),
        "linear_bias": None if linear.bias is None else linear.bias.reshape(shape),
    }


def _forms() -> Iterator[tuple[type[nn.Module], Rule, Options]]:
    yield nn.L1Loss, RULES[F.l1_loss], _attributes()
    yield nn.MSELoss, RULES[F.mse_loss], _attributes()
    yield nn.SmoothL1Loss, RULES[F.smooth_l1_loss], _attributes("beta")
    yield nn.HuberLoss, RULES[F.huber_loss], _attributes("delta")
    yield nn.CrossEntropyLoss, RULES[F.cross_entropy], _attributes("weight", "ignore_index", "label_smoothing")
    if HAS_LINEAR_CROSS_ENTROPY:
        yield nn.LinearCrossEntropyLoss, RULES[F.linear_cross_entropy], _linear_cross_entropy_options
    yield nn.NLLLoss, RULES[F.nll_loss], _attributes("weight", "ignore_index")  # NLLLoss2d inherits its forward
    yield nn.PoissonNLLLoss, RULES[F.poisson_nll_loss], _attributes("log_input", "full", "eps")
    yield nn.GaussianNLLLoss, RULES[F.gaussian_nll_loss], _attributes("full", "eps")
    yield nn.BCELoss, RULES[F.binary_cross_entropy], _attributes("weight")
    yield nn.BCEWithLogitsLoss, RULES[F.binary_cross_entropy_with_logits], _attributes("weight", "pos_weight")
    yield nn.KLDivLoss, RULES[F.kl_div], _attributes("log_target")
    yield nn.HingeEmbeddingLoss, RULES[F.hinge_embedding_loss], _attributes("margin")
    yield nn.MarginRankingLoss, RULES[F.margin_ranking_loss], _attributes("margin")
    yield nn.CosineEmbeddingLoss, RULES[F.cosine_embedding_loss], _attributes("margin")
    yield nn.SoftMarginLoss, RULES[F.soft_margin_loss], _attributes()
    yield nn.MultiMarginLoss, RULES[F.multi_margin_loss], _attributes("p", "margin", "weight")
    yield nn.MultiLabelMarginLoss, RULES[F.multilabel_margin_loss], _attributes()
    yield nn.MultiLabelSoftMarginLoss, RULES[F.multilabel_soft_margin_loss], _attributes("weight")
    yield nn.TripletMarginLoss, RULES[F.triplet_margin_loss], _attributes("margin", "p", "eps", "swap")
    with_distance = RULES[F.triplet_margin_with_distance_loss]
    yield nn.TripletMarginWithDistanceLoss, with_distance, _attributes("distance_function", "margin", "swap")
    yield nn.CTCLoss, RULES[F.ctc_loss], _attributes("blank", "zero_infinity")
    yield nn.AdaptiveLogSoftmaxWithLoss, ADAPTIVE, lambda module: {"module": module}


_OWNED = ("linear_weight", "module")  # what two functional forms require, and the module itself brings along


def _form(cls: type[nn.Module], rule: Rule, options: Options) -> ModuleForm:
    # By position and not by name: PoissonNLLLoss calls its input log_input, which in the functional form is an option.
    required = [p.name for p in rule.signature.parameters.values() if p.default is p.empty]
    inputs = tuple(name for name in required if name not in _OWNED)
    return ModuleForm(rule=rule, options=options, inputs=inputs, signature=inspect.signature(cls.forward))


_FORMS: Mapping[Any, ModuleForm] = {cls.forward: _form(cls, rule, options) for cls, rule, options in _forms()}
