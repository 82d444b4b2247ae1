"""The gradient of each kind of use of a parameter, computed from what the use's node has saved.

**Products**: ``F.linear``, ``x @ W``, ``addmm`` (HF's ``Conv1D``), batches of them (experts). For  y = x W  the
gradient is  x^T dy,  and for  y = W x  it is  dy x^T.  Read transposed (``nn.Linear`` multiplies with ``weight.t()``),
it is the transpose of that.

**Tables of embeddings**: only the rows that were looked up are touched. Torch's own backward makes a gradient of the
whole table, which is zero almost everywhere, and adds it: 16 bytes for each element of the table, 620 MB for GPT-2
small, whatever the number of tokens.

**Gradients that are there already**: a node that has made a parameter's gradient in its forward, but for a factor that
its backward is given (`chunked`), says so by a method ``take_gradient(position)``. It is added with that factor, in one
pass over the parameter instead of two.

A saved tensor must be read without taking it away from its node. Three kinds are told apart before the backward runs,
since afterwards it would be too late to step aside:

- saved as it is: read as often as one likes;
- saved by ``torch.utils.checkpoint(use_reentrant=False)``: computed again when it is read, and given out once. The
  holder's record of that is replaced by one that does not count the first time (`torch.utils.checkpoint`, classes
  ``_Holder`` and ``_checkpoint_hook``, torch 2.11 to 2.13);
- saved by other hooks (offloading, compression): what reading twice does is not known, so these are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from gradaccum.gradients.fused.product import Add, GradientMemory, accumulate_dtype_of, add_product
from gradaccum.gradients.graph import Use, signed

# By kind of node: where the two matrices stand among its inputs, and under what names they are saved.
_PRODUCTS = {
    "AddmmBackward0": ((1, "mat1"), (2, "mat2")),
    "MmBackward0": ((0, "self"), (1, "mat2")),
    "BmmBackward0": ((0, "self"), (1, "mat2")),
}
_HOLDER: Any = getattr(checkpoint, "_Holder", None)


def gradient_of(parameter: nn.Parameter, use: Use, memory: GradientMemory) -> Add | None:
    """What adds the gradient of this use to ``parameter.grad``, given that of the use's result; None if unknown."""
    kind = type(use.node).__name__
    if hasattr(use.node, "take_gradient"):
        return _gradient_made_before(parameter, use)
    if kind == "EmbeddingBackward0":
        return _embedding_gradient(parameter, use, memory)
    if kind in _PRODUCTS:
        return _product_gradient(parameter, use, kind, memory)
    return None


def _product_gradient(parameter: nn.Parameter, use: Use, kind: str, memory: GradientMemory) -> Add | None:
    (left_at, left_name), (right_at, right_name) = _PRODUCTS[kind]
    if parameter.dim() != (3 if kind == "BmmBackward0" else 2):
        return None
    if use.position not in (left_at, right_at):
        return None  # the summand of addmm
    is_left = use.position == left_at
    comes_first = is_left != use.is_transposed  # the incoming gradient, of the two factors
    node: Any = use.node
    other_name = right_name if is_left else left_name
    if not _can_read_twice(node, other_name):
        return None
    alpha = node._saved_alpha if kind == "AddmmBackward0" else 1

    def add(gradient: Tensor) -> None:
        other = getattr(node, f"_saved_{other_name}")
        left, right = (gradient, other) if comes_first else (other, gradient)
        if is_left:  # dy x^T, transposed x dy^T
            right = right.transpose(-2, -1)
        else:  # x^T dy, transposed dy^T x
            left = left.transpose(-2, -1)
        add_product(parameter, left, right, alpha=alpha, memory=memory)

    return add


def _gradient_made_before(parameter: nn.Parameter, use: Use) -> Add | None:
    node, position = use.node, use.position
    if use.is_transposed or len(node._input_metadata) > 1:  # of several factors, a hook is told one
        return None

    def add(factor: Tensor) -> None:
        gradient = node.take_gradient(position)
        if gradient is None:
            return
        total = parameter.grad
        if total is None:
            parameter.grad = gradient.mul_(factor.to(gradient.dtype)).to(accumulate_dtype_of(parameter))
        elif total.device.type == "cpu":
            total.add_(gradient, alpha=factor.item())
        else:  # without waiting for the factor
            total.addcmul_(gradient.to(total.dtype), factor.to(total.dtype))

    return add


def _embedding_gradient(parameter: nn.Parameter, use: Use, memory: GradientMemory) -> Add | None:
    node: Any = use.node
    if use.position != 0 or use.is_transposed or parameter.dim() != 2:
        return None
    if node._saved_sparse or node._saved_scale_grad_by_freq or not _can_read_twice(node, "indices"):
        return None
    padding_row = signed(node._saved_padding_idx)

    def add(gradient: Tensor) -> None:
        indices = node._saved_indices.reshape(-1)
        rows = gradient.reshape(-1, parameter.shape[1])
        if parameter.grad is None:
            parameter.grad = memory.take(parameter, accumulate_dtype_of(parameter)).zero_()
        total = parameter.grad
        rows = rows.to(total.dtype)
        if padding_row >= 0:
            rows = rows.masked_fill((indices == padding_row).unsqueeze(1), 0)
        if total.is_cuda:  # the same sum every time: index_add_ adds in whatever order threads come
            total.index_put_((indices,), rows, accumulate=True)
        else:
            total.index_add_(0, indices, rows)

    return add


def _can_read_twice(node: Any, name: str) -> bool:
    """Whether a hook can read ``node._saved_<name>`` before the node reads it itself; prepares a checkpoint for that.

    The node is one of a graph whose backward has not run.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}")
    try:
        hook, data = raw.unpack_hook, raw.data
    except (AttributeError, RuntimeError):  # an older torch; or a graph that is gone, which torch's own error will say
        return False
    if hook is None:
        return isinstance(data, Tensor) and type(data) in (Tensor, nn.Parameter) and data.layout is torch.strided
    handles: Any = getattr(data, "handles", None)
    if _HOLDER is None or type(data) is not _HOLDER or type(handles) not in (dict, _ReadTwice):
        return False
    if not handles:
        data.handles = _ReadTwice()
    return type(data.handles) is _ReadTwice


class _ReadTwice(dict[Any, Any]):
    """Where a holder keeps, for each backward, the handle of what was computed again; None once it is given out."""

    def __init__(self) -> None:
        super().__init__()
        self._was_read = False

    def __setitem__(self, key: Any, handle: Any) -> None:
        if handle is None and not self._was_read:
            self._was_read = True
            return
        super().__setitem__(key, handle)
