"""A backward that adds weight gradients up in place.

Torch's backward makes each weight's gradient in a tensor of its own and then adds it to ``.grad``. Here the graph is
read first (`graph`). A weight all of whose uses are understood is left out of what the engine is asked for, so that
the gradient is not made; a hook on each of these uses' nodes gets the same incoming gradient the node gets, and adds
the product to ``.grad`` in place. The engine does everything else, and all weights that are not understood.

So the model is not touched: no module is swapped and no function patched, and what a graph cannot show to be right,
is torch's own: parametrised weights are no leaves, compiled or custom functions no known operations, double backwards
no backwards of this library.

The engine's promises that would be lost by leaving a leaf out are kept: after the backward each of these leaves gets
"no gradient" through the engine, with which post-accumulate hooks and hooks on the leaf's node fire as always, once,
when the gradient is complete. A hook on the weight itself would have to see the gradient, so such weights are left
to torch. What is not seen: a hook on a transposed or cast weight (``w = weight.t(); w.register_hook(...)``).

Sources: apex's ``fused_weight_gradient_mlp_cuda`` and Megatron-LM's use of it for the idea; torch's
``csrc/autograd/engine.cpp`` (``init_to_execute``) for what inputs do to a backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable
from torch.autograd.graph import GradientEdge

from gradaccum.gradients.fused import embedding, linear
from gradaccum.gradients.fused.choice import Choice
from gradaccum.gradients.fused.gradient_memory import GradientMemory
from gradaccum.gradients.fused.product import Add, Gradients, accumulate_dtype_of
from gradaccum.gradients.graph import Graph, Use

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with the leaves of one backward.

    Attributes:
        in_place: for each weight whose gradient is added up in place, its uses, and what adds the gradient of each.
        rest: the leaves whose gradients the engine makes.
    """

    in_place: dict[nn.Parameter, list[tuple[Use, Add]]]
    rest: list[Tensor]


class FusedBackward:
    """Runs backwards for one set of parameters.

    Args:
        parameters: those whose gradients may be added up in place.
        choice: for which of them that pays.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], choice: Choice) -> None:
        self._choice = choice
        self._candidates = {id(parameter) for parameter in parameters if choice.may_pay(parameter)}

        self._memory = GradientMemory()
        # What was added up in place in this window: the sums, which need not be looked at again.
        self._written: dict[nn.Parameter, Tensor | None] = {}

    @property
    def has_candidates(self) -> bool:
        """Whether there is any parameter to do this for."""
        return bool(self._candidates)

    def plan(self, roots: Sequence[Tensor], only: frozenset[int] | None, graph: Graph) -> Plan | None:
        """Which gradients of a backward would be added up in place, and what is left to the engine; None for nothing.

        Args:
            roots: where the backward starts.
            only: ids of the leaves that may get a gradient; None for all.
            graph: of the roots.
        """
        if graph.checkpoints:  # which torch lets no backward with inputs reach
            return None
        in_place: dict[nn.Parameter, list[tuple[Use, Add]]] = {}
        rest: list[Any] = [root for root in roots if root.grad_fn is None]
        for node, leaf in graph.leaves.items():
            adds = self._adds_of(graph, node, leaf) if id(leaf) in self._candidates else None
            if adds is not None:
                assert isinstance(leaf, nn.Parameter)
                in_place[leaf] = adds
            elif leaf.requires_grad and (only is None or id(leaf) in only):
                rest.append(leaf)
        return Plan(in_place, rest) if in_place else None

    def run(
        self,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        only: frozenset[int] | None,
        graph: Graph,
    ) -> bool:
        """Runs the backward of one micro-batch.

        Args:
            roots: where it starts.
            seeds: the gradients it starts with.
            only: ids of the leaves that may get a gradient; None for all.
            graph: of the roots.

        Returns:
            Whether it has run; if not, nothing has happened.
        """
        plan = self.plan(roots, only, graph)
        if plan is None:
            return False
        inputs: list[Any] = list(plan.rest)
        streams = _Streams(plan.in_place)
        handles: list[Any] = []
        try:
            for weight, adds in plan.in_place.items():
                for use, add in adds:
                    handles.append(use.node.register_prehook(_hook(add, weight, streams)))
                    # A node is run for what is asked for only: without this, one that leads to nothing else is not.
                    inputs.append(GradientEdge(use.node, 0))
            Variable._execution_engine.run_backward(
                roots, seeds, False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=True
            )
        finally:
            for handle in handles:  # each holds its node, and is held by it
                handle.remove()
        streams.leave()
        for weight in plan.in_place:
            self._written[weight] = weight.grad
        _tell_hooks(plan.in_place)
        return True

    def keep_memory(self) -> None:
        """The window is over: the next one writes its gradients where these are."""
        self._memory.keep(self._written)
        self._written = {}

    def free_memory(self) -> None:
        """The window is over, and the next one may be long in coming."""
        self._memory.free()
        self._written = {}

    def _adds_of(self, graph: Graph, node: Any, leaf: Tensor) -> list[tuple[Use, Add]] | None:
        """What adds up the gradient of each use of a weight; None where torch is to do it."""
        if type(leaf) is not nn.Parameter or not leaf.requires_grad or leaf._backward_hooks:
            return None
        dtype = accumulate_dtype_of(leaf)
        total = leaf.grad
        if dtype not in _FLOATS:
            return None
        if total is not None and total is not self._written.get(leaf) and not _can_add_to(total, leaf):
            return None
        uses = graph.uses_of(node)
        if uses is None:
            return None
        adds: list[tuple[Use, Add]] = []
        num_rows = 0
        for use in uses:
            result = use.node._input_metadata[0]
            of_result: torch.dtype = result.dtype
            if of_result not in _FLOATS or result.device != leaf.device:
                return None
            add = linear.gradient_of(leaf, use, of_result, self._memory)
            add = add or embedding.gradient_of(leaf, use, self._memory)
            if add is None:
                return None
            num_rows += math.prod(result.shape[:-1])
            adds.append((use, add))
        return adds if self._choice.pays(leaf, num_rows) else None


def _can_add_to(total: Tensor, leaf: Tensor) -> bool:
    return (
        type(total) is Tensor
        and total.layout is torch.strided
        and total.shape == leaf.shape
        and (not total.requires_grad and total.device == leaf.device and total.dtype in _FLOATS)
    )


class _Streams:
    """Orders what is added on other CUDA streams than the caller's, as the engine does for what it adds itself."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        devices = {parameter.device for parameter in parameters if parameter.is_cuda}
        self._callers = {device: torch.cuda.current_stream(device) for device in devices}
        self._others: list[tuple[torch.cuda.Stream, torch.cuda.Stream]] = []

    def before(self, add: Add, device: torch.device) -> Add:
        """Has the stream that a gradient is added on wait for what the caller has added before."""
        caller = self._callers.get(device)
        if caller is None:
            return add

        index = caller.device_index
        callers_own = caller.cuda_stream

        def wait_and_add(gradients: Gradients) -> None:
            if _raw_stream(index) != callers_own:
                current = torch.cuda.current_stream(device)
                current.wait_stream(caller)
                self._others.append((caller, current))
            add(gradients)

        return wait_and_add

    def leave(self) -> None:
        """After the backward: the caller waits for what was added."""
        for caller, other in self._others:
            caller.wait_stream(other)


def _hook(add: Add, weight: Tensor, streams: _Streams) -> Add:
    """What a node's hook is. All questions are asked here, once: right after a large GEMM each one takes 10 us."""
    if torch.is_autocast_enabled(weight.device.type):  # as it is in the engine's threads; it would cast the factors
        add = _outside_autocast(add, weight.device.type)
    return streams.before(add, weight.device)


def _outside_autocast(add: Add, device_type: str) -> Add:
    def outside(gradients: Gradients) -> None:  # leaving a context in a thread of the engine would throw all casts away
        torch.set_autocast_enabled(device_type, False)
        try:
            add(gradients)
        finally:
            torch.set_autocast_enabled(device_type, True)

    return outside


def _raw_stream(index: int) -> int:
    """The current stream of a CUDA device, without an object made for it, which takes longer than a small addition."""
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle


class _NoGradient(Function):
    """A function of weights whose backward has nothing for any of them."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.num_weights = len(weights)
        return weights[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None,) * ctx.num_weights


def _tell_hooks(parameters: Iterable[nn.Parameter]) -> None:
    with torch.enable_grad():
        nothing = _NoGradient.apply(*parameters)
    Variable._execution_engine.run_backward(
        (nothing,), (torch.ones_like(nothing),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
