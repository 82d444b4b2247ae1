"""Tables of embeddings: only the rows that were looked up are touched.

Torch's own backward makes a gradient of the whole table, which is zero almost everywhere, and adds it: 16 bytes for
each element of the table, 620 MB for GPT-2 small, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradaccum.gradients.fused.gradient_memory import GradientMemory
from gradaccum.gradients.fused.product import Add, Gradients, accumulate_dtype_of
from gradaccum.gradients.fused.saved import can_read_twice
from gradaccum.gradients.graph import Use, signed


def gradient_of(parameter: nn.Parameter, use: Use, memory: GradientMemory) -> Add | None:
    """What adds the gradient of this use to ``parameter.grad``, given that of the rows looked up; None if unknown."""
    node: Any = use.node
    if type(node).__name__ != "EmbeddingBackward0" or use.position != 0 or use.is_transposed or parameter.dim() != 2:
        return None
    if node._saved_sparse or node._saved_scale_grad_by_freq or not can_read_twice(node, "indices"):
        return None
    padding_row = signed(node._saved_padding_idx)

    def add(gradients: Gradients) -> None:
        gradient = gradients[0]
        if gradient is None:
            return
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
