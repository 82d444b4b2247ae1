"""A forward and backward of some rows, as numbers: what the loss returned, and the gradient of each of its roots.

A root is the 0-d tensor that a user's loss function made, before this library gives it a weight: a plain tensor, or
what ``ga.Loss.mean`` and ``ga.Loss.sum`` were given. Where a root is a sum of scalars, ``loss = first + 0.01 * second``,
each of them may be a mean over something of its own. Their values are gone by then, but not their gradients: autograd
takes the edge of a graph in place of a tensor (``torch.autograd.graph.GradientEdge``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradaccum.checking.graph_counts import GraphCount, counts_near
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.terms import as_terms

Gradient = Sequence[Tensor | None]
"""For each parameter, in the order that they were given in; None where there is none."""

PLAIN, MEAN, SUM, PLAIN_SUM = "plain", "mean", "sum", "plain sum"
"""How a term was returned: a tensor, `Loss.mean`, `Loss.sum` with ``over``, `Loss.sum` without."""

_MAX_ADDENDS = 8  # each costs one backward; a sum of more is one over layers, samples or experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Addend:
    """One scalar of a root that is a sum of several, with the constant factors that it has in the sum."""

    gradient: Gradient
    counts: Sequence[GraphCount]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of a loss: its root as a number, and how it is to be weighted.

    Attributes:
        value: of the root.
        weight: what was declared: `Loss.weight`; for a plain tensor its rows, or what ``weights=`` says.
        kind: "plain", "mean", "sum" (to be divided by the weight), or "plain sum" (by nothing).
        gradient: of the root, seed 1.
        addends: in the order of the sum; empty where the root is no sum, and where they were not asked for.
        counts: what the graph near the root was divided by; empty where it was not asked for.
    """

    value: float
    weight: float | None
    kind: str
    gradient: Gradient
    addends: Sequence[Addend] = ()
    counts: Sequence[GraphCount] = ()

    @property
    def divisor(self) -> float:
        """What the root is still to be divided by for its value: 1 for all but a sum over something."""
        return self.weight if self.kind == SUM and self.weight is not None else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One forward and backward of some rows.

    Attributes:
        rows: LongTensor on the host: which rows of the look's batch.
        batch: as the loss function got it: cut, and on the device.
        terms: by name; a single loss under `SINGLE`.
    """

    rows: Tensor
    batch: Any
    terms: Mapping[str, Term]


def make_run(
    loss: Any,
    parameters: Sequence[nn.Parameter],
    *,
    rows: Tensor,
    batch: Any,
    weights: Mapping[str, Weight] | None = None,
    in_full: bool = False,
) -> Run:
    """Makes numbers of what a loss function returned; one backward a term, and one more for each addend.

    Waits for the device. No ``.grad`` is touched, and none of `AccumulateGrad`'s hooks runs.

    Args:
        loss: a 0-d tensor, a `Loss`, or a dict of these, with its graph.
        parameters: whose gradients are taken.
        rows: which rows of the look's batch the loss was made from.
        batch: what the loss was made from.
        weights: what ``weights=`` returned for this batch, by name.
        in_full: whether addends and counts are wanted as well, to explain a loss that does not add up.

    Raises:
        LossError: as in training: not a scalar, or no graph.
    """
    returned = loss if isinstance(loss, Mapping) else {}
    terms: dict[str, Term] = {}
    for name, term in as_terms(loss, len(rows), weights).items():
        is_plain = isinstance(returned.get(name, loss), Tensor)
        kind = PLAIN if is_plain else MEAN if term.is_mean else PLAIN_SUM if term.weight is None else SUM
        terms[name] = _term_of(term, kind, parameters, in_full=in_full)
    return Run(rows=rows, batch=batch, terms=terms)


def _term_of(loss: Loss, kind: str, parameters: Sequence[nn.Parameter], *, in_full: bool) -> Term:
    root = loss.root
    gradient: Gradient = [None] * len(parameters)
    addends: list[Addend] = []
    if root.requires_grad:
        gradient = torch.autograd.grad(root, parameters, retain_graph=True, allow_unused=True)
    if in_full and root.grad_fn is not None:
        edges = list(_addends_of(root.grad_fn, 0, 1.0))
        if 1 < len(edges) <= _MAX_ADDENDS:
            addends = [_addend_of(*edge, parameters) for edge in edges]
    return Term(
        value=float(root.detach()),
        weight=None if loss.weight is None else float(loss.weight),
        kind=kind,
        gradient=gradient,
        addends=addends,
        counts=counts_near(root.grad_fn) if in_full else (),
    )


def _addend_of(node: Any, output: int, factor: float, parameters: Sequence[nn.Parameter]) -> Addend:
    meta = node._input_metadata[output]
    seed = torch.full((), factor, dtype=meta.dtype, device=meta.device)
    edge = GradientEdge(node, output)
    gradient = torch.autograd.grad(edge, parameters, grad_outputs=seed, retain_graph=True, allow_unused=True)
    return Addend(gradient=gradient, counts=counts_near(node))


def _addends_of(node: Any, output: int, factor: float) -> Iterator[tuple[Any, int, float]]:
    """The scalars that a node adds up, each with its factor; the node itself where it adds up nothing."""
    parents = [(parent, index) for parent, index in node.next_functions if parent is not None]
    factors = _factors(node, len(node.next_functions))
    if factors is None or not parents or any(not _is_scalar(parent, index) for parent, index in parents):
        yield node, output, factor
        return
    for (parent, index), own in zip(node.next_functions, factors, strict=True):
        if parent is not None:
            yield from _addends_of(parent, index, factor * own)


def _factors(node: Any, inputs: int) -> list[float] | None:
    """By what a node multiplies each of its inputs as it adds them up; None for any other node."""
    name = node.name()
    try:
        if name in ("AddBackward0", "SubBackward0"):
            alpha = float(node._saved_alpha)
            return [1.0, alpha if name == "AddBackward0" else -alpha][:inputs]
        if name == "NegBackward0":
            return [-1.0]
        if name in ("DivBackward0", "MulBackward0") and node.next_functions[1][0] is None:
            other = node._saved_other
            if other.dim() == 0:
                return [1 / float(other) if name == "DivBackward0" else float(other), 0.0]
        if name in ("SumBackward0", "MeanBackward0") and node.next_functions[0][0].name() == "StackBackward0":
            return [1.0 if name == "SumBackward0" else 1 / len(node.next_functions[0][0].next_functions)]
        if name == "StackBackward0":
            return [1.0] * inputs
    except (RuntimeError, AttributeError, ZeroDivisionError):  # freed, or kept by another name
        pass
    return None


def _is_scalar(node: Any, index: int) -> bool:
    # A stack of scalars has one dimension itself: it is what a sum may look through.
    return node.name() == "StackBackward0" or len(node._input_metadata[index].shape) == 0
