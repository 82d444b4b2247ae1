"""A forward and backward of some rows, as numbers: what the loss returned, and the gradient of each of its roots.

A root is the 0-d tensor that a user's loss function made, before this library gives it a weight: a plain tensor, or
what ``ga.Loss.mean`` and ``ga.Loss.sum`` were given. Where a root is a sum of scalars, ``loss = first + 0.1 * second``,
each may be a mean over something of its own. Their values are gone by then, but not their gradients: autograd takes the
edge of a graph in place of a tensor (``torch.autograd.graph.GradientEdge``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradaccum.checking.gradient_sketch import Gradient, sketch_of
from gradaccum.checking.graph_counts import GraphCount, counts_near, criterion_of
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.terms import as_terms

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
        gradient: of the root, seed 1, for each parameter in the order that they were given in.
        addends: in the order of the sum; empty where the root is no sum, and where they were not asked for.
        counts: what the graph near the root was divided by; empty where it was not asked for.
        criterion: code for the root where it is a cross entropy of torch and nothing else; likewise.
    """

    value: float
    weight: float | None
    kind: str
    gradient: Gradient
    addends: Sequence[Addend] = ()
    counts: Sequence[GraphCount] = ()
    criterion: str = ""

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
    again: Callable[[], Any] | None = None,
    writes_grad: bool = False,
) -> Run:
    """Makes numbers of what a loss function returned; one backward a term, and one more for each addend.

    Waits for the device, and uses the graph up. No ``.grad`` is touched, and none of `AccumulateGrad`'s hooks runs; but
    where reentrant checkpoints need a backward that writes ``.grad``, hooks run, and what others than ``parameters``
    got stays.

    Args:
        loss: a 0-d tensor, a `Loss`, or a dict of these, with its graph.
        parameters: whose gradients are taken.
        rows: which rows of the look's batch the loss was made from.
        batch: what the loss was made from.
        weights: what ``weights=`` returned for this batch, by name.
        in_full: whether addends and counts are wanted as well, to explain a loss that does not add up.
        again: makes the loss once more, with a graph of its own and the same random numbers. It is called only where a
            graph cannot be run through twice: a compiled backward that gives its buffers away. Without it such a loss
            has no addends.
        writes_grad: takes the gradients by a backward that writes ``.grad``, as sharded models need; ``.grad`` of the
            parameters is put back.

    Raises:
        LossError: as in training: not a scalar, or no graph.
        RuntimeError: several terms share a graph that cannot be run through twice, and there is no ``again``.
    """
    graphs = _Graphs(loss, again, parameters, lambda made: as_terms(made, len(rows), weights), writes_grad=writes_grad)
    terms: dict[str, Term] = {}
    for position, (name, term) in enumerate(graphs.terms.items()):
        returned = loss[name] if isinstance(loss, Mapping) else loss
        kind = MEAN if term.is_mean else PLAIN_SUM if term.weight is None else SUM
        counts = counts_near(term.root.grad_fn) if in_full else ()  # before the graph is freed
        criterion = criterion_of(term.root.grad_fn) if in_full else ""
        addends = _addends(graphs, name) if in_full else ()
        is_last = position == len(graphs.terms) - 1
        terms[name] = Term(
            value=float(term.root.detach()),
            weight=None if term.weight is None else float(term.weight),
            kind=PLAIN if isinstance(returned, Tensor) else kind,
            gradient=graphs.gradient(lambda terms, name=name: _root_edge(terms[name]), is_last=is_last),
            addends=addends,
            counts=counts,
            criterion=criterion,
        )
    return Run(rows=rows, batch=batch, terms=terms)


_Edge = tuple[Any, int, float]
"""A node of a graph, which of its outputs, and by what its gradient is to be multiplied."""


class _Graphs:
    """A loss whose graph is run through several times; where that cannot be, the loss is made again for each time."""

    def __init__(
        self,
        loss: Any,
        again: Callable[[], Any] | None,
        parameters: Sequence[nn.Parameter],
        as_terms: Callable[[Any], dict[str, Loss]],
        *,
        writes_grad: bool,
    ) -> None:
        self.terms = as_terms(loss)
        self._again, self._parameters, self._as_terms = again, parameters, as_terms
        self._writes_grad = writes_grad

    def gradient(self, edge_of: Callable[[Mapping[str, Loss]], _Edge | None], *, is_last: bool) -> Gradient:
        """Returns the gradient at an edge; the last one uses the graph up."""
        try:
            return self._run(edge_of(self.terms), retain_graph=not is_last)
        except RuntimeError as error:
            if "donated buffers" not in str(error) or self._again is None:
                raise
        return self._run(edge_of(self._as_terms(self._again())), retain_graph=False)

    def _run(self, edge: _Edge | None, *, retain_graph: bool) -> Gradient:
        if edge is None:
            return sketch_of([None] * len(self._parameters), self._parameters)
        node, output, factor = edge
        meta = node._input_metadata[output]
        seed = torch.full((), factor, dtype=meta.dtype, device=meta.device)
        at = GradientEdge(node, output)
        if self._writes_grad:
            return _accumulated(at, seed, self._parameters, retain_graph=retain_graph)
        try:
            found = torch.autograd.grad(
                at, self._parameters, grad_outputs=seed, retain_graph=retain_graph, allow_unused=True
            )
            return sketch_of(found, self._parameters)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        return _accumulated(at, seed, self._parameters, retain_graph=retain_graph)


def _accumulated(at: GradientEdge, seed: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool) -> Gradient:
    """By a backward that writes ``.grad``, which is all that reentrant checkpoints allow; ``.grad`` is put back."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(at, seed, retain_graph=retain_graph)
        return sketch_of([parameter.grad for parameter in parameters], parameters)
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


def _root_edge(loss: Loss) -> _Edge | None:
    return (*get_gradient_edge(loss.root)[:2], 1.0) if loss.root.requires_grad else None


def _addends(graphs: _Graphs, name: str) -> list[Addend]:
    root = graphs.terms[name].root.grad_fn
    edges = [] if root is None else list(_addends_of(root, 0, 1.0))
    if not 1 < len(edges) <= _MAX_ADDENDS:
        return []
    counts = [counts_near(node) for node, _, _ in edges]

    def edge_of(terms: Mapping[str, Loss], i: int) -> _Edge:
        return list(_addends_of(terms[name].root.grad_fn, 0, 1.0))[i]

    try:
        gradients = [graphs.gradient(lambda terms, i=i: edge_of(terms, i), is_last=False) for i in range(len(edges))]
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        return []
    return [Addend(gradient=gradient, counts=own) for gradient, own in zip(gradients, counts, strict=True)]


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
