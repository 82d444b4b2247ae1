"""A backward that adds weight gradients up in place.

Torch's backward makes each parameter's gradient in a tensor of its own and then adds it to ``.grad``. Here the graph is
read first (`graph`). A parameter all of whose uses are understood is left out of what the engine is asked for, so that
the gradient is not made; a hook on each of these uses' nodes gets the same incoming gradient the node gets, and adds
the product to ``.grad`` in place. The engine does everything else, and all parameters that are not understood.

So the model is not touched: no module is swapped and no function patched. What a graph cannot show to be right is left
to torch: what a parametrisation computes is no leaf, a compiled or custom function is no known operation, and a double
backward is no backward of this library.

The engine's promises that would be lost by leaving a leaf out are kept: after the backward each of these leaves gets
"no gradient" through the engine, with which post-accumulate hooks, and those of torch's own on the leaf's node, fire as
always, once, when the gradient is complete. A hook on the parameter, or on a node between it and the product, would
have to see the gradient, so such parameters are left to torch. What is not seen: a hook on a transposed or cast
parameter (``w = weight.t(); w.register_hook(...)``).

Sources: apex's ``fused_weight_gradient_mlp_cuda`` and Megatron-LM's use of it for the idea; torch's
``csrc/autograd/engine.cpp`` (``init_to_execute``) for what inputs do to a backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import GradientEdge

from gradaccum.gradients.fused.choice import Choice
from gradaccum.gradients.fused.parameter_uses import gradient_of
from gradaccum.gradients.fused.product import Add, GradientMemory, accumulate_dtype_of
from gradaccum.gradients.graph import Graph, Use, has_hook_after, has_hook_before, run_backward

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with the leaves of one backward.

    Attributes:
        in_place: for each parameter whose gradient is added up in place, its uses, and what adds the gradient of each.
        rest: the leaves whose gradients the engine makes.
    """

    in_place: dict[nn.Parameter, list[tuple[Use, Add]]]
    rest: list[Tensor]


class FusedBackward:
    """Runs backwards for one set of parameters, of which ``choice`` says where adding in place pays."""

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
        """Divides the leaves of a backward between this and the engine; None where nothing is added in place.

        ``only`` are the ids of the leaves that may get a gradient; None for all.
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
        self, roots: tuple[Tensor, ...], seeds: tuple[Tensor, ...], only: frozenset[int] | None, graph: Graph
    ) -> bool:
        """Runs the backward of one micro-batch, and returns whether it has: if not, nothing has happened."""
        plan = self.plan(roots, only, graph)
        if plan is None:
            return False
        inputs: list[Any] = list(plan.rest)
        streams = _Streams(plan.in_place)
        handles: list[Any] = []
        try:
            for parameter, adds in plan.in_place.items():
                for use, add in adds:
                    handles.append(use.node.register_prehook(_hook(add, parameter, streams)))
                    # A node is run for what is asked for only: without this, one that leads to nothing else is not.
                    inputs.append(GradientEdge(use.node, 0))
            run_backward(roots, seeds, inputs)
        finally:
            for handle in handles:  # each holds its node, and is held by it
                handle.remove()
        streams.leave()
        for parameter in plan.in_place:
            self._written[parameter] = parameter.grad
        with torch.enable_grad():
            nothing = _NoGradient.apply(*plan.in_place)
        torch.autograd.backward(nothing)
        return True

    def end(self, *, keeps_memory: bool) -> None:
        """Ends the window. Where the memory of its gradients is kept, the next window writes its own there."""
        self._memory.keep(self._written if keeps_memory else ())
        self._written = {}

    def _adds_of(self, graph: Graph, node: Any, leaf: Tensor) -> list[tuple[Use, Add]] | None:
        """What adds up the gradient of each use of a parameter; None where torch is to do it."""
        if type(leaf) is not nn.Parameter or not leaf.requires_grad or leaf._backward_hooks:
            return None
        total = leaf.grad
        if accumulate_dtype_of(leaf) not in _FLOATS:
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
            if result.dtype not in _FLOATS or result.device != leaf.device:
                return None
            add = gradient_of(leaf, use, self._memory)
            if add is None:
                return None
            num_rows += math.prod(result.shape[:-1])
            adds.append((use, add))
        return adds if self._choice.pays(leaf, num_rows) and not _may_change_by_hooks(node, uses) else None


def _may_change_by_hooks(leaf: Any, uses: Sequence[Use]) -> bool:
    """Whether hooks on nodes see, or change, the gradient that a use has for a leaf on its way there."""
    on_the_way = [leaf, *(node for use in uses for node in use.between)]
    return any(has_hook_after(node) for node in (*on_the_way, *(use.node for use in uses))) or any(
        has_hook_before(node) for node in on_the_way
    )


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

    def wait(self, device: torch.device) -> None:
        """Has the stream that a gradient is added on wait for what the caller has added before."""
        caller = self._callers.get(device)
        if caller is not None and (current := torch.cuda.current_stream(device)) != caller:
            current.wait_stream(caller)
            self._others.append((caller, current))

    def leave(self) -> None:
        """After the backward, has the caller wait for what was added."""
        for caller, other in self._others:
            caller.wait_stream(other)


def _hook(add: Add, parameter: Tensor, streams: _Streams) -> Callable[[tuple[Tensor | None, ...]], None]:
    device = parameter.device
    # Autocast is on in the engine's threads too, and would cast the factors. Leaving a context of autocast in such a
    # thread would throw all casts away, so only the flag is set.
    is_autocast = torch.is_autocast_enabled(device.type)

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is None:  # nothing flows into the node's one result
            return
        streams.wait(device)
        if not is_autocast:
            add(gradients[0])
            return
        torch.set_autocast_enabled(device.type, False)
        try:
            add(gradients[0])
        finally:
            torch.set_autocast_enabled(device.type, True)

    return hook


class _NoGradient(Function):
    """A function of parameters whose backward has nothing for any of them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None,) * ctx.num_parameters
