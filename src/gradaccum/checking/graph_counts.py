"""The numbers that a loss was divided by, as its autograd graph holds them: candidates for what a mean is over.

`losses.meaning` decides by the graph alone, and so must know which of several divisors is the mean's. Here each is only
a candidate, that is tried against gradients: all of them are listed, constants included. The attributes read are those
that PyTorch documents for graph inspection (``grad_fn._saved_*``, "Autograd mechanics").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# A loss's divisions are near its root; the walk stops where the model begins.
_MAX_DEPTH, _MAX_NODES, _MAX_COUNTS = 16, 128, 16
_MEAN = 1  # at::Reduction::Mean
_NLL = ("NllLossBackward0", "NllLoss2DBackward0")
_ROUNDING = 1e-6  # of factors in float32


@dataclass(frozen=True, slots=True)
class GraphCount:
    """One number that the graph of a loss divides by."""

    value: float
    words: str
    class_weights: Tensor | None = None  # of a cross entropy
    ignore_index: int | None = None  # of a cross entropy


def counts_near(node: Any) -> list[GraphCount]:
    """Returns the counts near a node, in the order of the graph; waits for the device where they lie there."""
    found: list[GraphCount] = []
    seen: set[Any] = set()
    level = [node]
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for one in level:
            if one is None or one in seen or len(seen) >= _MAX_NODES or len(found) >= _MAX_COUNTS:
                continue
            seen.add(one)
            with suppress(RuntimeError, AttributeError):  # freed, modified in place, or kept by another name
                found.extend(_read(one))
            following += [parent for parent, _ in one.next_functions]
        level = following
    return found


def criterion_of(root: Any) -> str:
    """Returns code for the cross entropy that a root is, with its options; "" where it is anything else, or more.

    Smoothed labels make two means over the same: ``(1 - s) * nll + s / classes * smooth``
    (``LossNLL.cpp``, ``cross_entropy_loss_label_smoothing``).
    """
    node, smoothing = root, 0.0
    with suppress(RuntimeError, AttributeError, IndexError):
        if root.name() == "AddBackward0":
            (first, _), (second, _) = root.next_functions
            factor, smooth = float(first._saved_other), float(second._saved_other)
            node, smoothing = first.next_functions[0][0], 1 - factor
            if abs(smooth * node._saved_self.shape[1] - smoothing) > _ROUNDING:
                return ""
        if node.name() in _NLL and node._saved_reduction == _MEAN:
            options = [] if node._saved_weight is None else ["weight=weight"]
            options += [] if _ignore_index(node) == -100 else [f"ignore_index={_ignore_index(node)}"]
            options += [f"label_smoothing={smoothing:.6g}"] if smoothing else []
            return f"ga.criterion(nn.CrossEntropyLoss({', '.join(options)}))(output, target)"
    return ""


def _ignore_index(node: Any) -> int:
    return (node._saved_ignore_index + (1 << 63)) % (1 << 64) - (1 << 63)  # autograd shows it without its sign


def _read(node: Any) -> Iterator[GraphCount]:
    name = node.name()
    if name in _NLL and node._saved_reduction == _MEAN:
        weight = node._saved_weight
        yield GraphCount(
            float(node._saved_total_weight.detach()),
            "targets that are not ignored" if weight is None else "the class weights of the targets",
            None if weight is None else weight.detach(),
            _ignore_index(node),
        )
    elif name in ("DivBackward0", "MulBackward0"):
        for number in _constants(node):
            value = number if name == "DivBackward0" else 1 / number if number else math.inf
            yield GraphCount(value, "what it was divided by")
    elif name == "MeanBackward0":
        yield GraphCount(float(node._saved_self_sym_numel), "elements")
    elif getattr(node, "_saved_reduction", None) == _MEAN:
        yield GraphCount(float(node._saved_self.numel()), "elements")


def _constants(node: Any) -> Iterator[float]:
    """The 0-d operands of a product or a quotient that need no gradient; a quotient's numerator is none."""
    for saved, parent in (("_saved_other", 1), ("_saved_self", 0)):
        if node.next_functions[parent][0] is None and not (parent == 0 and node.name() == "DivBackward0"):
            operand = getattr(node, saved)
            if isinstance(operand, Tensor) and operand.dim() == 0:
                yield float(operand.detach())
