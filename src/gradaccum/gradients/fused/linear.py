"""Weights of linear layers: ``F.linear``, ``x @ W``, ``addmm`` (HF's ``Conv1D``), batches of them (experts).

For  y = x W  the gradient is  x^T dy,  and for  y = W x  it is  dy x^T.  Read transposed (``nn.Linear`` multiplies with
``weight.t()``), it is the transpose of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradaccum.gradients.fused.gradient_memory import GradientMemory
from gradaccum.gradients.fused.product import Add, Gradients, adder_of
from gradaccum.gradients.fused.saved import can_read_twice
from gradaccum.gradients.graph import Use

# By kind of node: where the two matrices stand among its inputs, and under what names they are saved.
_PRODUCTS = {
    "AddmmBackward0": ((1, "mat1"), (2, "mat2")),
    "MmBackward0": ((0, "self"), (1, "mat2")),
    "BmmBackward0": ((0, "self"), (1, "mat2")),
}


def gradient_of(parameter: nn.Parameter, use: Use, dtype: torch.dtype, memory: GradientMemory) -> Add | None:
    """What adds the gradient of this use to ``parameter.grad``, given that of the product; None if unknown.

    Args:
        parameter: the weight.
        use: one of its uses.
        dtype: of the product, and so of its gradient.
        memory: where the first sum goes.
    """
    kind = type(use.node).__name__
    product = _PRODUCTS.get(kind)
    if product is None or parameter.dim() != (3 if kind == "BmmBackward0" else 2):
        return None
    (left, left_name), (right, right_name) = product
    if use.position not in (left, right):
        return None  # the summand of addmm
    is_left = use.position == left
    is_transposed = use.is_transposed
    comes_first = is_left != is_transposed  # the incoming gradient, of the two factors
    other_name = right_name if is_left else left_name
    if not can_read_twice(use.node, other_name):
        return None
    node: Any = use.node
    saved = f"_saved_{other_name}"
    into = adder_of(parameter, dtype, memory)
    alpha = node._saved_alpha if kind == "AddmmBackward0" else 1

    def add(gradients: Gradients) -> None:
        gradient = gradients[0]
        if gradient is None:
            return
        other = getattr(node, saved)
        left, right = (gradient, other) if comes_first else (other, gradient)
        if is_left:  # dy x^T, transposed x dy^T
            right = right.transpose(-2, -1)
        else:  # x^T dy, transposed dy^T x
            left = left.transpose(-2, -1)
        into(left, right, alpha=alpha)

    return add
