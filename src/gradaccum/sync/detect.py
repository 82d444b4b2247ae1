"""From the models to who reduces their gradients, and over which processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup

from gradaccum.errors import UnsupportedError
from gradaccum.sync.engine import Engine
from gradaccum.sync.ranks import Ranks

Sync = Literal["auto", "last", "every", "never"]
"""When gradients are reduced over processes; see `detect`."""


def detect(
    models: Sequence[nn.Module],
    sync: Sync = "auto",
    timeout: float | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> tuple[Ranks, list[Engine]] | None:
    """Finds the processes that train together, and an engine for each model.

    Args:
        models: wrapped or not.
        sync: "auto": once a window where that costs no memory (plain modules, DDP), in every backward for FSDP2;
            "last": once a window; "every": in every backward, which changes the result nowhere and only FSDP2 does;
            "never": this process trains for itself, whatever others do.
        timeout: seconds that a message may wait for another process; None for what the process group has.
        process_group: the processes that have data of their own, where nothing wrapped says which; None for all.

    Returns:
        None where this process trains for itself: no process group, or one of a single process, and nothing wrapped; or
        where tensor parallelism makes one model of all processes.

    Raises:
        UnsupportedError: wrapped in something whose averages cannot be undone, or in two ways at once.
    """
    if sync not in ("auto", "last", "every", "never"):
        raise UnsupportedError(
            f'sync={sync!r}: gradients are reduced over processes when it costs least ("auto"), once an update '
            '("last"), in every backward where FSDP2 can ("every"), or not at all ("never").'
        )
    wrapped = [module for model in models for module in model.modules() if _is_wrapper(module)]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not wrapped and (sync == "never" or not several):
        return None
    if not wrapped and process_group is None and any(map(is_sharded, models)):
        return _check_one_model_over_all(models)
    if sync == "never":
        raise UnsupportedError(
            f'sync="never" leaves other processes alone, and the model is wrapped in {type(wrapped[0]).__name__}, '
            "which does not. Pass the plain module."
        )
    world = dist.group.WORLD
    assert world is not None, "a wrapped model means that there is a process group"
    given = groups_of(process_group, world)
    if not wrapped and math.prod(one.size() for one in given) == 1:
        return None
    if not wrapped:
        _check_parts_are_elsewhere(models, given)
    found = [_engine(model, sync, given) for model in models]
    groups = {_or_world(several, world) for _, several in found}
    if wrapped and process_group is not None and any(_members(one) != _members(given) for one in groups):
        raise UnsupportedError(
            f"process_group= names the processes {_members(given)}, and the model is wrapped for others. The wrapper "
            "knows over which its gradients are to be added up: leave process_group= out."
        )
    if len(groups) > 1:
        raise UnsupportedError(
            f"The {len(models)} models are spread over different groups of processes, so that one weight for all of "
            "them would divide some by the wrong number. Give each an accumulator and an optimizer of its own."
        )
    device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    return Ranks(groups.pop(), device, timeout), [engine for engine, _ in found]


def groups_of(process_group: ProcessGroup | DeviceMesh | None, world: ProcessGroup) -> tuple[ProcessGroup, ...]:
    """The groups over which to add up, one after another: one, or those of a mesh's dimensions; None for all.

    Raises:
        UnsupportedError: it is neither.
    """
    if process_group is None:
        return (world,)
    if isinstance(process_group, ProcessGroup):
        return _or_world((process_group,), world)
    if isinstance(process_group, DeviceMesh):
        return _or_world(tuple(process_group.get_all_groups()), world)
    raise UnsupportedError(
        f"process_group={process_group!r}: it is a torch.distributed.ProcessGroup or a DeviceMesh of the processes "
        'that have data of their own, this one among them: mesh["dp"], say.'
    )


def _or_world(groups: tuple[ProcessGroup, ...], world: ProcessGroup) -> tuple[ProcessGroup, ...]:
    """The default group in the place of those that span it: it may have a backend for the host."""
    return groups if math.prod(one.size() for one in groups) < world.size() else (world,)


def _members(groups: Sequence[ProcessGroup]) -> list[list[int]]:
    return sorted(dist.get_process_group_ranks(group) for group in groups)


def is_sharded(model: nn.Module, *, beyond: int = 0) -> bool:
    """Whether parameters of a model lie in parts on several processes, or on more than so many."""
    meshes: list[Any] = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    return any(mesh is not None and mesh.size() > beyond for mesh in meshes)


def _check_one_model_over_all(models: Sequence[nn.Module]) -> None:
    """Checks that tensor-parallel parameters, which nothing else wraps, make one model of all processes.

    These all have the same batch then, and the gradient is complete without being added up.

    Raises:
        UnsupportedError: some processes hold another copy of the model, and which is not known.
    """
    meshes = [getattr(parameter, "device_mesh", None) for model in models for parameter in model.parameters()]
    sizes = {mesh.size() for mesh in meshes if mesh is not None}
    if sizes != {dist.get_world_size()} or not all(map(is_sharded, models)):
        raise UnsupportedError(
            f"The model has tensor-parallel parameters over {min(sizes)} of {dist.get_world_size()} processes, and "
            "which of the others have data of their own is not known: gradients would be added up over the wrong "
            'ones. Pass process_group=mesh["dp"], the data-parallel dimension of their mesh, or wrap it in '
            "fully_shard(model, mesh=...) over that."
        )


def _check_parts_are_elsewhere(models: Sequence[nn.Module], groups: Sequence[ProcessGroup]) -> None:
    """Checks that none of the processes that add up hold parts of the same parameter.

    Raises:
        UnsupportedError: they do.
    """
    own = dist.get_rank()
    adding = {rank for group in groups for rank in dist.get_process_group_ranks(group)} - {own}
    meshes: list[Any] = [getattr(p, "device_mesh", None) for model in models for p in model.parameters()]
    shared = adding & {rank for mesh in meshes if mesh is not None for rank in mesh.mesh.flatten().tolist()}
    if shared:
        raise UnsupportedError(
            f"process_group= names rank {min(shared)}, which holds other parts of the same parameters as this one "
            f'(rank {own}): different parts would be added up. Pass the data-parallel dimension alone: mesh["dp"].'
        )


def refuse_late_group(sync: Sync) -> None:
    """Refuses a window of one process where there are several by now.

    Raises:
        UnsupportedError: the process group was made after this was to train.
    """
    if sync != "never" and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError(
            "The process group was made after this TrainStep or Accumulator, which would train each of the "
            f"{dist.get_world_size()} processes for itself: their models would drift apart. Make it after "
            'init_process_group(), or say sync="never".'
        )


def _is_wrapper(module: nn.Module) -> bool:
    name = type(module).__name__
    return name in ("DistributedDataParallel", "FullyShardedDataParallel") or name.startswith("FSDP")


def _engine(
    model: nn.Module, sync: Literal["auto", "last", "every"], given: tuple[ProcessGroup, ...]
) -> tuple[Engine, tuple[ProcessGroup, ...]]:
    wrappers = [module for module in model.modules() if _is_wrapper(module)]
    names = [type(module).__name__ for module in wrappers]
    if "FullyShardedDataParallel" in names:
        raise UnsupportedError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters hide which of them got "
            "gradients, and which divides by the number of processes in two steps of its own. With unequal processes "
            "the gradient could not be made the batch's. Use FSDP2: torch.distributed.fsdp.fully_shard(model)."
        )
    if not wrappers:
        from gradaccum.sync.ddp import PlainModule

        return PlainModule(model), given
    # Engines are imported only for models that need them: torch's distributed tensors take 0.3 s to import.
    if names[0] == "DistributedDataParallel":
        from torch.nn.parallel import DistributedDataParallel

        from gradaccum.sync.ddp import DDP

        wrapper = wrappers[0]
        if len(wrappers) > 1 or not isinstance(wrapper, DistributedDataParallel):
            raise UnsupportedError(
                f"{len(wrappers)} modules inside of the model are wrapped for several processes "
                f"({', '.join(sorted(set(names)))}). Wrap the whole model once."
            )
        return DDP(wrapper), (cast("ProcessGroup", wrapper.process_group),)
    from gradaccum.sync.fsdp2 import FSDP2

    engine = FSDP2(model, sync)
    return engine, engine.process_groups


def total_norm_of_shards(parameters: Sequence[nn.Parameter], order: float) -> Tensor:
    """The norm over all gradients together, of which each process has a part."""
    from gradaccum.sync.fsdp2 import total_norm  # for models that have shards: it takes 0.3 s to import

    return total_norm(parameters, order)
