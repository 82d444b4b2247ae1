"""What the nodes near a loss's root say: which scalars it is the sum of, and what each of them was divided by.

A loss is a sum of terms. Each of them is one node that turns many elements into one (``nll_loss``, ``mean``, ``sum``),
and on its way to the root it may pass factors, casts and sums of other scalars:

    cross_entropy(...)  +  0.1 * (z.square() * mask).sum() / mask.sum()      a mean, and a sum with a divisor

The nodes tell what has been divided by: ``nll_loss`` keeps the sum of the weights, ``mse_loss`` and ``mean`` the tensor
they averaged, a division its divisor. What follows from it for a window is said in `losses/meaning`.

Not seen: means made inside of custom autograd functions, compiled functions and reentrant checkpoints. Such a term is
``opaque``. One that has a node of its own, but of which the graph does not say what it is a mean over (a norm, a square
root, a quotient whose divisor has a gradient), is ``unknown``.

The attributes read here are those that PyTorch documents for graph inspection (``grad_fn._saved_*``, "Autograd
mechanics").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

# A walk must not cost a forward's time: a sum of 80 losses, each divided by its own count, is read to its end.
_MAX_NODES = 256
_MAX_BELOW = 12  # nodes below a sum
_MEAN = 1  # at::Reduction::Mean
Count = int | float | Tensor
Kind = Literal["mean", "sum", "penalty", "unknown", "opaque", "far"]


@dataclass(frozen=True, slots=True)
class Factor:
    """A number that a term was divided by on its way to the root, or multiplied with."""

    path: tuple[int, ...]  # of its node: indices into ``next_functions``, from the root
    value: Count
    multiplies: bool = False
    is_number: bool = False  # written in Python, where a tensor would be data
    is_shape: bool = False  # elements that a mean over some dimensions was taken over


@dataclass(frozen=True, slots=True)
class Term:
    """One scalar of which the loss is the sum."""

    kind: Kind
    path: tuple[int, ...]
    node: str  # its name
    factors: tuple[Factor, ...] = ()
    count: Count | None = None  # what a mean was taken over; for a sum of known losses how many they were
    rows: int | None = None  # elements that were averaged or added up
    first: int | None = None  # how many of them along dimension 0
    is_sure: bool = True  # whether what is added up belongs to single samples, as far as can be seen
    what: str = ""  # what a mean was taken over, in words
    instead: str = ""  # what to type instead of the plain mean
    is_on_host: bool = True  # whether reading its counts waits for no device


def terms_of(loss: Tensor) -> list[Term]:
    """The terms of a loss, in the order of the graph. Their counts may lie on a device: nothing is waited for."""
    found: list[Term] = []
    ways: list[tuple[Any, tuple[int, ...], tuple[Factor, ...]]] = [(loss.grad_fn, (), ())]
    nodes_left = _MAX_NODES
    while ways:
        node, path, factors = ways.pop()
        if node is None:
            continue
        if not nodes_left:
            found.append(Term("far", path, "", factors))
            break
        nodes_left -= 1
        try:
            below = _terms_through(node, path, factors)
        except (RuntimeError, AttributeError):  # freed, modified in place, or kept by another name
            below = Term("unknown", path, node.name(), factors)
        if isinstance(below, Term):
            found.append(below)
        else:
            ways += reversed(below)
    if all(term.kind in ("penalty", "far") for term in found):  # then it is the loss
        return [replace(term, kind=_KIND_OF_ALL.get(term.node, term.kind)) for term in found]
    return found


_KIND_OF_ALL: dict[str, Kind] = {
    "MeanBackward0": "mean",
    "MeanBackward1": "mean",
    "SumBackward0": "sum",
    "SumBackward1": "sum",
}
_Ways = list[tuple[Any, tuple[int, ...], tuple[Factor, ...]]]
_SUMS = re.compile(r"(Add|Rsub|Sub)Backward[01]")
_PASSES = re.compile(
    r"(Alias|Clone|NanToNum|Neg|Reshape|ReshapeAlias|ToCopy|UnsafeView|View)Backward0|(Squeeze|Unsqueeze)Backward\d"
)
_CLAMPS = re.compile(r"Clamp(Max|Min)?Backward[01]")


def _terms_through(node: Any, path: tuple[int, ...], factors: tuple[Factor, ...]) -> Term | _Ways:
    """The term that a node of one element is, or the nodes that it hands on."""
    name = node.name()
    parents = [parent for parent, _ in node.next_functions]
    if _SUMS.fullmatch(name) or name == "WhereBackward0":
        return _all(parents, path, factors)
    if _PASSES.fullmatch(name) or (_CLAMPS.fullmatch(name) and not _is_clamped(node)):
        return _all(parents[:1], path, factors)
    if name == "SelectBackward0" and parents[0].name() == "StackBackward0":
        i = _signed(node._saved_index) % len(parents[0].next_functions)
        return [(parents[0].next_functions[i][0], (*path, 0, i), factors)]
    if name in ("SumBackward0", "MeanBackward0") and parents[0] is not None and parents[0].name() == "StackBackward0":
        scalars = [parent for parent, _ in parents[0].next_functions]
        if all(_is_one_element(scalar) for scalar in scalars):
            mean = (Factor(path, len(scalars), is_number=True),) if name == "MeanBackward0" else ()
            return _all(scalars, (*path, 0), (*factors, *mean))
    if name.startswith(("MulBackward", "DivBackward")):
        factor = _factor(node, path)
        if factor is not None:
            return _all(parents, path, (*factors, factor))
        # Both sides have a gradient: a coefficient that is learned is a factor, anything else no mean.
        learned = [parent is not None and _is_of_parameters(parent) for parent in parents]
        if (name == "DivBackward0" and not learned[1]) or not any(learned):
            return Term("unknown", path, name, factors)
        return [way for way, is_learned in zip(_all(parents, path, factors), learned, strict=True) if not is_learned]
    if name == "torch::autograd::AccumulateGrad":
        return Term("penalty", path, name, factors)
    return _reduction(node, name, path, factors)


def _all(parents: list[Any], path: tuple[int, ...], factors: tuple[Factor, ...]) -> _Ways:
    return [(parent, (*path, i), factors) for i, parent in enumerate(parents)]


def _is_one_element(node: Any) -> bool:
    return node is None or _numel(node) == 1


def _numel(node: Any) -> int:
    """Elements of what a node has computed, of its first output."""
    return math.prod(int(size) for size in node._input_metadata[0].shape)


def _is_clamped(node: Any) -> bool:
    """Whether a clamp changes the scalar that it is given, and so has no gradient."""
    value = node._saved_self
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    return bool((low is not None and value < low) or (high is not None and value > high))


def _factor(node: Any, path: tuple[int, ...]) -> Factor | None:
    """What a product or quotient of one element has besides the side with a gradient; None where both have one."""
    name = node.name()
    multiplies = name.startswith("Mul")
    if name.endswith("1"):  # by a Python number, inside of a function of torch
        return Factor(path, node._saved_other, multiplies=multiplies, is_number=True)
    parents = [parent for parent, _ in node.next_functions]
    if parents[0] is None or (len(parents) > 1 and parents[1] is not None):
        if not multiplies or all(parent is not None for parent in parents):
            return None
        other = node._saved_self
    else:
        other = node._saved_other
    if other is None or other.numel() != 1:
        return None
    other = other.detach()
    return Factor(path, other, multiplies=multiplies, is_number=_is_python_number(other))


def _is_python_number(value: Tensor) -> bool:
    """Whether a saved 0-d tensor was a number in the user's code: torch lets those give way to every other dtype."""
    narrow = torch.float16 if value.is_floating_point() else torch.int8
    return not value.dim() and torch.result_type(value, torch.zeros((), dtype=narrow)) == narrow


# ------------------------------------------------------------------------------------------- from many elements to one
_NLL = "criterion = ga.criterion(nn.CrossEntropyLoss(...)) and criterion(output, target)"
_LOSSES = {
    "MseLossBackward0": "MSELoss",
    "SmoothL1LossBackward0": "SmoothL1Loss",
    "HuberLossBackward0": "HuberLoss",
    "BinaryCrossEntropyBackward0": "BCELoss",
    "BinaryCrossEntropyWithLogitsBackward0": "BCEWithLogitsLoss",
    "SoftMarginLossBackward0": "SoftMarginLoss",
}
_LOSSES_OF_ROWS = {
    "MultiMarginLossBackward0": "MultiMarginLoss",
    "MultilabelMarginLossBackward0": "MultiLabelMarginLoss",
}
_LINEAR_CROSS_ENTROPY = re.compile(r".*linear_cross_entropy.*")
_OPAQUE = re.compile(r".*Checkpoint.*|GeneratedBackwardFor.*|CompiledFunction.*")


def _reduction(node: Any, name: str, path: tuple[int, ...], factors: tuple[Factor, ...]) -> Term:
    if name in ("NllLossBackward0", "NllLoss2DBackward0"):
        what = "targets that are not ignored" if node._saved_weight is None else "the sum of class weights"
        kind: Kind = "mean" if node._saved_reduction == _MEAN else "sum"
        rows = node._saved_target
        first = rows.shape[0] if rows.dim() else 1
        return Term(kind, path, name, factors, node._saved_total_weight, rows.numel(), first, True, what, _NLL)
    if name in _LOSSES or name in _LOSSES_OF_ROWS:
        averaged = node._saved_self
        first = averaged.shape[0] if averaged.dim() else 1
        count = averaged.numel() if name in _LOSSES else first
        kind = "mean" if getattr(node, "_saved_reduction", _MEAN) == _MEAN else "sum"
        instead = f"criterion = ga.criterion(nn.{(_LOSSES | _LOSSES_OF_ROWS)[name]}()) and criterion(output, target)"
        return Term(kind, path, name, factors, count, count, first, True, "elements", instead)
    if name in ("MeanBackward0", "MeanBackward1"):
        sizes = [int(size) for size in node._saved_self_sym_sizes]
        if name == "MeanBackward1" and len(node._saved_dim or sizes) != len(sizes):
            return Term("unknown", path, name, factors)
        is_penalty = _is_of_parameters(node)
        instead = "ga.Loss.sum(losses.sum(), over=losses.numel())"
        count, first = math.prod(sizes), sizes[0] if sizes else 1
        kind = "penalty" if is_penalty else "mean"
        is_sure = not _is_of_averages(node)
        return Term(kind, path, name, factors, count, count, first, is_sure, "elements", instead)
    if name in ("SumBackward0", "SumBackward1", "NansumBackward0"):
        return _sum(node, name, path, factors)
    if name == "DotBackward0":
        return Term("sum", path, name, factors, is_sure=False)
    if _LINEAR_CROSS_ENTROPY.fullmatch(name):
        what, instead = "targets that are not ignored", "ga.criterion(F.linear_cross_entropy)(hidden, weight, target)"
        return Term("opaque", path, name, factors, what=what, instead=instead)
    if isinstance(node, torch.autograd.function.BackwardCFunction) or _OPAQUE.fullmatch(name):
        return Term("opaque", path, name, factors)
    return Term("penalty" if _is_of_parameters(node) else "unknown", path, name, factors)


_KEEPS = re.compile(
    r"(Alias|Clone|Index|Masked(Fill|Select)|Neg|Permute|Reshape|ReshapeAlias|Slice|T|ToCopy|Transpose|UnsafeView|View)"
    r"Backward0|(Squeeze|Unsqueeze)Backward\d|SumBackward1|MaskedFillBackward1"
)


def _sum(node: Any, name: str, path: tuple[int, ...], factors: tuple[Factor, ...]) -> Term:
    """A sum, with what its elements had been divided by before they were added up."""
    saved = node._saved_self.shape if name == "NansumBackward0" else node._saved_self_sym_sizes
    sizes = [int(size) for size in saved]
    if name == "SumBackward1" and len(node._saved_dim or sizes) != len(sizes):
        return Term("unknown", path, name, factors)
    rows, first = math.prod(sizes), sizes[0] if sizes else 1
    if _is_of_parameters(node):
        return Term("penalty", path, name, factors, rows=rows, first=first)
    items: float | None = None
    is_sure, found = True, list(factors)
    for below, place in _chain_below(node, path):
        kind = below.name()
        if kind == "MeanBackward1":
            found.append(_shape_factor(below, place))
        elif kind.startswith(("MulBackward", "DivBackward")):
            factor = _factor(below, place)
            if factor is not None:
                found.append(factor)
                continue
            mask = below._saved_other if kind == "MulBackward0" and below.next_functions[1][0] is None else None
            if mask is not None and mask.numel() and bool(((mask == 0) | (mask == 1)).all()):
                items = float(mask.sum()) * rows / mask.numel()
            else:
                is_sure = False
        elif kind == "SumBackward1":
            sizes = [int(size) for size in below._saved_self_sym_sizes]
            rows, first = max(rows, math.prod(sizes)), max(first, sizes[0])
        elif not _KEEPS.fullmatch(kind):
            break
    return Term("sum", path, name, tuple(found), items, rows, first, is_sure and not _is_of_averages(node))


def _shape_factor(node: Any, path: tuple[int, ...]) -> Factor:
    """The elements that a mean over some dimensions was taken over."""
    sizes = [int(size) for size in node._saved_self_sym_sizes]
    count = math.prod(sizes[_signed(dim) % len(sizes)] for dim in node._saved_dim or range(len(sizes)))
    return Factor(path, count, is_shape=True)


def _signed(number: int) -> int:
    """A number that a node has saved: torch shows some of them as if they were unsigned, -1 as 2**64 - 1."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _chain_below(node: Any, path: tuple[int, ...]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The nodes below one, as long as each has a single input with a gradient."""
    for _ in range(_MAX_BELOW):
        inputs = [(i, parent) for i, (parent, _) in enumerate(node.next_functions) if parent is not None]
        if len(inputs) != 1:
            return
        i, node = inputs[0]
        path = *path, i
        yield node, path


_LINEAR = re.compile(_KEEPS.pattern + r"|(Add|Div|Mean|Mul|Rsub|Sub)Backward[01]")
_AVERAGES = re.compile(r"(Mean|Var|Std|VarMean|StdMean|Logsumexp|LinalgVectorNorm)Backward\d")


def _is_of_averages(node: Any) -> bool:
    """Whether a mean or a sum is of something that is not linear in means, which may have been over the samples."""
    ways: list[tuple[Any, bool]] = [(node, True)]
    for one, is_linear in ways:  # more are appended
        for below in (parent for parent, _ in one.next_functions if parent is not None):
            name = below.name()
            if _AVERAGES.fullmatch(name) and not (is_linear and name.startswith("Mean")) and _is_along_first(below):
                return True
            if len(ways) < _MAX_BELOW:
                ways.append((below, is_linear and bool(_LINEAR.fullmatch(name))))
    return False


def _is_along_first(node: Any) -> bool:
    """Whether dimension 0, which may be that of the samples, is among those that a node reduces."""
    dims = getattr(node, "_saved_dim", None)
    sizes = node.next_functions[0][0]._input_metadata[0].shape
    listed = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    return not listed or any(_signed(dim) % max(len(sizes), 1) == 0 for dim in listed)


_OF_PARAMETERS = re.compile(
    r"(Abs|Add|Amax|Amin|Bmm|Cat|Clamp|Clone|Cos|Cosh|Cumsum|Diagonal|Digamma|Div|Dot|Elu|Erf|Exp|Expand|Expm1"
    r"|Lgamma|LinalgCholeskyEx|LinalgDet|LinalgEigh|LinalgInvEx|LinalgSlogdet|LinalgSolveEx|LinalgSolveTriangular"
    r"|LinalgSvd|LinalgVectorNorm|Log|Log1P|LogSigmoid|LogSoftmax|Logsumexp|Max|Maximum|Mean|Min|Minimum|Mm|Mul|Mv"
    r"|Neg|Norm|Permute|Pow|Reciprocal|Relu|Reshape|ReshapeAlias|Rsqrt|Rsub|Select|Sigmoid|Sin|Slice|Softmax"
    r"|Softplus|Sqrt|Squeeze|Stack|Std|Sub|Sum|T|Tanh|ToCopy|Trace|Transpose|TriangularSolve|Tril|Triu|UnsafeView"
    r"|Unsqueeze|Var|View|WeightNormInterface)Backward\d"
)
_PRODUCTS = ("Mm", "Bmm", "Mv", "Dot")
_MAX_OF_PARAMETERS = 32


def _is_of_parameters(node: Any) -> bool:
    """Whether a node depends on leaves alone, element by element, as penalties and learned coefficients do."""
    nodes = [node]
    for one in nodes:  # more are appended
        if one.name() == "torch::autograd::AccumulateGrad":
            continue
        parents = [parent for parent, _ in one.next_functions]
        if len(nodes) > _MAX_OF_PARAMETERS or not _OF_PARAMETERS.fullmatch(one.name()):
            return False
        inputs = [parent for parent in parents if parent is not None]
        if not inputs:
            return False
        # The other side may be data: what is then computed mostly has an element for each sample.
        if len(inputs) < len(parents) and (one.name().startswith(_PRODUCTS) or _numel(one) > _numel(inputs[0])):
            return False
        nodes += inputs
    return True


# ------------------------------------------------------------------------------------------------- the same node again
def read_again(root: Tensor, term: Term, factors: list[Factor]) -> float | None:
    """What the same term of another micro-batch's loss was divided by: its count and these factors, on the host.

    Some 3 us for a mean at the root. None where the graph is not the same.
    """
    node = _node_at(root.grad_fn, term.path)
    if node is None or node.name() != term.node:
        return None
    count: Any = 1.0
    if term.kind == "mean":
        if term.node == "MeanBackward0":
            count = node._saved_self_sym_numel
        elif term.node in _LOSSES:
            count = node._saved_self.numel()
        elif term.node.startswith("NllLoss"):
            count = node._saved_total_weight.item()
        else:
            count = _reduction(node, term.node, (), ()).count
    for factor in factors:
        at = _node_at(root.grad_fn, factor.path)
        if at is None:
            return None
        try:
            again = _shape_factor(at, ()) if factor.is_shape else _factor(at, ())
        except (AttributeError, RuntimeError):  # a node of another kind: a loss with another number of terms, say
            return None
        if again is None:
            return None
        count = count / float(again.value) if again.multiplies else count * float(again.value)
    return float(count)


def _node_at(node: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        parents = node.next_functions
        if i >= len(parents) or parents[i][0] is None:
            return None
        node = parents[i][0]
    return node
