"""FSDP2 (``fully_shard``): it reduce-scatters in its backward; the engine says when, and its averaging is undone.

A parameter is whole on a process only while its module runs, so the sum of a window cannot simply be reduced at its
end. Two ways, and their price for P parameters on W processes with gradients of g bytes (torch/distributed/fsdp/
_fully_shard/_fsdp_param_group.py, `post_backward`):

    sync="every"   each backward reduce-scatters        K times the bytes on the wire, gradients of g P / W
    sync="last"    only the window's last one does      once, but whole gradients wait for it: g P on every process
    HSDP           shards in each, replicas in the last what "auto" does for a mesh of two dimensions

FSDP2 divides by the number of processes, or by what the user has set; each backward is seeded with that factor more, so
no setting of the model is changed. Unused parameters are reduced as zeros where this torch can
(``set_reduce_scatter_unused_params``, 2.13).

Every forward and backward is a collective: all processes run equally many. A process with fewer micro-batches runs
fillers, whose outputs get gradients of zero. Their backward starts at the model's outputs, which a forward hook keeps:
through a loss that is a mean over nothing it would be 0 / 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_leaves

from gradaccum.errors import UnsupportedError
from gradaccum.norms import combined, norms
from gradaccum.sync.engine import Engine


class FSDP2(Engine):
    """The engine of all FSDP2 modules of one model.

    Raises:
        UnsupportedError: its modules divide gradients by different factors.
    """

    name = "FSDP2"
    is_wrapper = True
    runs_collectives = True

    def __init__(self, model: nn.Module, sync: Literal["auto", "last", "every"] = "auto") -> None:
        self._model = model
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._states: list[Any] = [module._get_fsdp_state() for module in self._modules]
        self._groups = groups = [group for module in self._modules for group in _groups_of(module)]
        has_replicas = any(hasattr(group.mesh_info, "replicate_mesh_size") for group in groups)
        self._defers_replicas = has_replicas and sync == "auto"
        self._sync = sync
        factors = {_divides_by(group) for group in groups}
        if len(factors) > 1:
            raise UnsupportedError(
                f"The model's FSDP2 modules divide their gradients by different factors ({sorted(factors)}), so that "
                "no one factor undoes it and parts of the gradient would be too large. Shard all over one mesh, and "
                "call set_gradient_divide_factor on none."
            )
        self.averages_over = factors.pop() if factors else 1.0
        names = ("shard_process_group", "replicate_process_group")
        of_mesh = [getattr(group.mesh_info, name, None) for group in groups[:1] for name in names]
        self.process_groups: tuple[ProcessGroup, ...] = tuple(group for group in of_mesh if group is not None)
        self._deferred_bytes = sum(  # what a rank holds of whole gradients that are reduced once an update
            (parameter.numel() - parameter.to_local().numel()) * parameter.element_size()
            for parameter in model.parameters()
            if isinstance(parameter, DTensor) and parameter.requires_grad
        )
        self._outputs: list[Tensor] = []

    @property
    def description(self) -> str:
        """What the plan line says: when gradients are reduced, and what the other way would cost or save."""
        num_bytes = self._deferred_bytes
        size = f"{num_bytes / 2**30:.2g} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2g} MiB"
        if self._sync == "last":
            return f"FSDP2, reduced once an update (holds {size} more a rank)"
        when = "sharded every micro-batch, replicas once an update" if self._defers_replicas else "every micro-batch"
        return f'FSDP2, reduced {when} (sync="last" would hold {size} more a rank)'

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Context manager in which `prepare` decides when gradients are reduced, and outputs are kept.

        Raises:
            UnsupportedError: a loop by hand has switched their reduction off.
        """
        if self._sync != "last" and not all(getattr(group, "reduce_grads", True) for group in self._groups):
            raise UnsupportedError(
                "The model has set_requires_gradient_sync(False), left from a loop by hand: FSDP2 would keep whole "
                "gradients and bring none to its parameters, so that no update could be made. Call "
                'model.set_requires_gradient_sync(True), or pass sync="last", which sets it by itself.'
            )
        with ExitStack() as held:
            held.callback(self._outputs.clear)
            held.callback(self._model.register_forward_hook(self._keep_outputs).remove)
            for state in self._states:
                state._post_forward = functools.partial(self._keep_and_go_on, state._post_forward)
                held.callback(state.__dict__.pop, "_post_forward")
            for group in self._groups:
                if hasattr(group, "reduce_scatter_unused_params"):  # another process may have gradients for them
                    held.callback(setattr, group, "reduce_scatter_unused_params", group.reduce_scatter_unused_params)
                    group.reduce_scatter_unused_params = True
            held.callback(self._set_reduces, is_last=True)
            yield

    def prepare(self, *, is_last: bool) -> None:
        """Sets whether the backward of the micro-batch that is run next reduces."""
        self._outputs = []
        self._set_reduces(is_last=is_last)

    def take_outputs(self) -> list[Tensor]:
        """The outputs of the forward since `prepare`, whose backward runs all collectives."""
        outputs, self._outputs = self._outputs, []
        return [output for output in outputs if output.requires_grad]

    def _set_reduces(self, *, is_last: bool) -> None:
        for module in self._modules:
            if self._sync == "last":
                module.set_requires_gradient_sync(is_last, recurse=False)
            elif self._defers_replicas:
                module.set_requires_all_reduce(is_last, recurse=False)

    def _keep_and_go_on(self, post_forward: Callable[..., Any], module: nn.Module, inputs: Any, output: Any) -> Any:
        """For methods besides ``forward``, which call this by its name (`register_fsdp_forward_method`)."""
        output = post_forward(module, inputs, output)
        self._keep_outputs(module, inputs, output)
        return output

    def _keep_outputs(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._outputs.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _groups_of(module: FSDPModule) -> list[Any]:
    """The parameter groups of one module; private, since nothing public of FSDP2 says over what it averages."""
    state: Any = module._get_fsdp_state()
    several: Any = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    one = getattr(state, "_fsdp_param_group", None)  # before torch 2.12
    return [] if one is None else [one]


def _divides_by(group: Any) -> float:
    if group.gradient_divide_factor is not None:
        return float(group.gradient_divide_factor)
    info = group.mesh_info
    return float(getattr(info, "shard_mesh_size", 1) * getattr(info, "replicate_mesh_size", 1))


def total_norm(parameters: Sequence[nn.Parameter], order: float) -> Tensor:
    """The norm over all gradients together, ``(sum over shards of norm ** order) ** (1 / order)``, on every process.

    Parameters are shards, whole ones, or both. The order is 2 or infinity, which is inf too where a gradient is NaN.
    """
    by_mesh: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    everybody: dict[ProcessGroup, None] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None, "only parameters that have a gradient are updated"
        groups: tuple[ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh, placements = gradient.device_mesh, gradient.placements
            everybody.update(dict.fromkeys(mesh.get_all_groups()))
            if any(placement.is_partial() for placement in placements):  # as tensor parallelism leaves some
                placements = tuple(Replicate() if one.is_partial() else one for one in placements)
                gradient = gradient.redistribute(placements=placements)
            # Strided shards, of tensor parallelism under FSDP2, say of themselves that they are none.
            groups = tuple(mesh.get_group(i) for i, one in enumerate(placements) if not one.is_replicate())
            gradient = gradient.to_local()
        by_mesh.setdefault(groups, []).append(gradient._values() if gradient.is_sparse else gradient)
    totals: list[Tensor] = []
    for groups, gradients in by_mesh.items():
        # A process may have nothing of any of them, and takes part in the sum all the same, in the same dtype.
        wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
        norm = combined(norms(gradients, order), order).to(gradients[0].device, wide)
        for group in groups:
            if order == 2.0:
                norm = norm.square()
                torch.distributed.all_reduce(norm, group=group)
                norm = norm.sqrt()
            else:  # the maximum of a NaN and a number is either, in some backends
                norm = torch.nan_to_num(norm, nan=torch.inf, posinf=torch.inf)
                torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX, group=group)
        totals.append(norm)
    norm = torch.linalg.vector_norm(torch.stack([total.to(totals[0]) for total in totals]), order)
    # Replicas over tensor-parallel processes may differ in the last digit, or in an overflow: one norm, one decision.
    apart = [group for group in everybody if any(group not in groups for groups in by_mesh)]
    if apart:
        norm = torch.nan_to_num(norm, nan=torch.inf, posinf=torch.inf)
    for group in apart:
        torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX, group=group)
    return norm
