"""The gradients of one loss for a seed of 1, added up over chunks while each chunk's graph is alive.

A chunk's backward must not touch ``.grad``: hooks, DDP and a window that adds up would take it for a finished gradient.
So each leaf gets a stand-in, a parameter of the same memory, whose ``.grad`` is the sum over the chunks; of bf16 and
fp16 leaves in fp32. Products with a weight are added to it in place (`gradaccum.gradients`), so that a chunk makes no
gradient of the head's size besides the sum; other gradients are made by the engine and added.

A hook on a leaf would see each chunk's part here, for a seed of 1. It is put aside while chunks run, and sees the whole
gradient in the backward of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from gradaccum.errors import UnsupportedError
from gradaccum.gradients.fused.parameter_uses import gradient_of
from gradaccum.gradients.fused.product import Add, GradientMemory
from gradaccum.gradients.graph import Graph, read_graph
from gradaccum.types import HALF_DTYPES

# Below, a gradient is so small that making it costs less than finding out how it can be added in place.
_MIN_ELEMENTS = 1 << 12
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# What a cast or a view keeps for its backward are sizes, no tensors: it can run once for each chunk.
_REPEATABLE = frozenset({"ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0"})


class ChunkGradients:
    """The sums of one loss's gradients, by leaf."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, nn.Parameter] = {}
        self._memory = GradientMemory()

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that have a sum."""
        return list(self._sums)

    def take(self, leaf: Tensor) -> Tensor | None:
        """A leaf's sum, which is not kept here any longer; None where this loss does not use the leaf."""
        stand_in = self._sums.pop(leaf, None)
        if stand_in is None:
            return None
        # Ranks of FSDP2 must have the same gradients, also where one of them had nothing to learn from.
        return torch.zeros_like(leaf, requires_grad=False) if stand_in.grad is None else stand_in.grad

    def add(
        self, root: Tensor, seed: float, rows: Sequence[Tensor], *, begun: int, keeps_graph: bool
    ) -> list[Tensor | None]:
        """Runs the backward of one chunk.

        Args:
            root: the chunk's loss, 0-d.
            seed: the gradient that it starts with. For 0 no backward is run, since that of a mean over nothing, 0 / 0,
                is NaN; the leaves are noted.
            rows: leaves that belong to this chunk alone.
            begun: the sequence number of the first node that the chunk could make.
            keeps_graph: whether another loss of the chunk has its backward yet to run.

        Returns:
            The gradient of each of ``rows``.

        Raises:
            UnsupportedError: the graph reaches beyond the chunk, or has a hook that would see a part of the gradient.
        """
        graph = read_graph([root])
        _check(graph, begun)
        own = {id(leaf) for leaf in rows}
        rest: list[Tensor] = []
        adds: list[tuple[Any, Add]] = []
        for node, leaf in graph.leaves.items():
            if id(leaf) in own or not leaf.requires_grad:
                continue
            found = self._adds_of(graph, node, leaf)
            if found is None:
                rest.append(leaf)
            else:
                adds += found
        if not seed:
            for leaf in rest:
                self._stand_in(leaf)
            return [None] * len(rows)
        start = torch.full_like(root, seed)
        with _leaf_hooks_aside(graph.leaves.values()):
            gradients = _run(root, start, [*rows, *rest], adds, keeps_graph=keeps_graph)
        for leaf, gradient in zip(rest, gradients[len(rows) :], strict=True):
            if gradient is not None:
                self._add(leaf, gradient)
        return gradients[: len(rows)]

    def _add(self, leaf: Tensor, gradient: Tensor) -> None:
        stand_in = self._stand_in(leaf)
        dtype = stand_in.grad_dtype or stand_in.dtype
        if stand_in.grad is None:  # torch may have handed out the same tensor twice, as the gradients of two leaves
            stand_in.grad = gradient.to(dtype, copy=True)
        elif stand_in.grad.is_sparse and not gradient.is_sparse:
            stand_in.grad = gradient.to(dtype) + stand_in.grad
        else:
            stand_in.grad.add_(gradient.to(dtype) if gradient.is_sparse else gradient)

    def _stand_in(self, leaf: Tensor) -> nn.Parameter:
        found = self._sums.get(leaf)
        if found is None:
            found = self._sums[leaf] = nn.Parameter(leaf.detach())
            if leaf.dtype in HALF_DTYPES:
                found.grad_dtype = torch.float32
        return found

    def _adds_of(self, graph: Graph, node: Any, leaf: Tensor) -> list[tuple[Any, Add]] | None:
        """Each node that uses a leaf, with what adds its gradient in place; None where torch is to make it."""
        if type(leaf) is not nn.Parameter or leaf.numel() < _MIN_ELEMENTS or leaf.dtype not in _FLOATS:
            return None
        uses = graph.uses_of(node)
        if uses is None or graph.checkpoints:
            return None
        stand_in = self._stand_in(leaf)
        adds: list[tuple[Any, Add]] = []
        for use in uses:
            result = use.node._input_metadata[0]
            if result.dtype not in _FLOATS or result.device != leaf.device:
                return None
            add = gradient_of(stand_in, use, self._memory)
            if add is None:
                return None
            adds.append((use.node, add))
        return adds


def _run(
    root: Tensor, seed: Tensor, inputs: Sequence[Tensor], adds: Sequence[tuple[Any, Add]], *, keeps_graph: bool
) -> list[Tensor | None]:
    """A backward that returns gradients; on its way, what is added in place is."""
    left = dict(enumerate(adds))
    handles: list[Any] = []

    def hook(at: int) -> Any:
        def run(gradients: tuple[Tensor | None, ...]) -> None:
            _, add = left.pop(at)
            if gradients[0] is not None:
                add(gradients[0])

        return run

    edges = [GradientEdge(node, 0) for node, _ in adds]
    try:
        for at, (node, _) in enumerate(adds):
            handles.append(node.register_prehook(hook(at)))
        found = Variable._execution_engine.run_backward(
            (root,), (seed,), keeps_graph, False, (*inputs, *edges), allow_unreachable=True, accumulate_grad=False
        )
    finally:
        for handle in handles:
            handle.remove()
    # A node below which nothing else is wanted was not run, nor its hooks, and what it saved is still there.
    for at, (_, add) in list(left.items()):
        gradient = found[len(inputs) + at]
        if gradient is not None:
            add(gradient)
    return list(found[: len(inputs)])


def _check(graph: Graph, begun: int) -> None:
    for node in graph.readers:
        kind = type(node).__name__
        if kind == "BackwardHookFunctionBackward":
            raise UnsupportedError(
                "loss_of_rows runs a module that has a full backward hook. The hook would be called once for each "
                "chunk, with the gradient of that chunk's sum: not of the batch's mean. Remove the hook, or put it on "
                "the module that hidden comes from, where it gets the whole gradient."
            )
        if kind == "CheckpointFunctionBackward":
            raise UnsupportedError(
                "loss_of_rows runs a reentrant checkpoint, through which torch runs no backward for chosen tensors, "
                "and a chunk's must not reach .grad. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), "
                "or none: the chunk's graph is gone as soon as it has run."
            )
        if node in graph.leaves or node._sequence_nr() >= begun or kind in _REPEATABLE:
            continue
        raise UnsupportedError(
            f"loss_of_rows uses a tensor that was computed before it was called ({kind}), whose graph each chunk "
            "would run backward through again, and whose gradient would get lost. Compute it inside of loss_of_rows, "
            "from parameters; or, if it has a value for each row, pass it as one more target: "
            "ga.chunked(loss_of_rows, hidden, labels, values)."
        )


@contextmanager
def _leaf_hooks_aside(leaves: Any) -> Iterator[None]:
    # torch's C++ side reads the hooks of a tensor from this very dict, so it is emptied and filled again.
    aside = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, _ in aside:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in aside:
            hooks.update(before)
