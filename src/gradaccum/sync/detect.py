"""From the models to who reduces their gradients, and over which processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from gradaccum.errors import UnsupportedError
from gradaccum.sync.engine import Engine, PlainModule
from gradaccum.sync.ranks import Ranks

Sync = Literal["auto", "last", "every", "never"]
"""When gradients are reduced over processes; see `detect`."""


@dataclass(frozen=True, slots=True)
class Found:
    """What `detect` found.

    Attributes:
        ranks: the processes that train together.
        engines: one for each model.
    """

    ranks: Ranks
    engines: Sequence[Engine]


def detect(models: Sequence[nn.Module], sync: Sync = "auto") -> Found | None:
    """Who reduces the gradients of some models.

    Args:
        models: wrapped or not.
        sync: "auto": once a window where that costs no memory (plain modules, DDP), in every backward for FSDP2;
            "last": once a window; "every": in every backward, which changes the result nowhere and only FSDP2 does;
            "never": this process trains for itself, whatever others do.

    Returns:
        None where this process trains for itself: no process group, or one of a single process, and nothing wrapped.

    Raises:
        UnsupportedError: wrapped in something whose averages cannot be undone, or in two ways at once.
    """
    if sync not in ("auto", "last", "every", "never"):
        raise UnsupportedError(
            f'sync={sync!r}: gradients are reduced over processes when it costs least ("auto"), once an update '
            '("last"), in every backward where FSDP2 can ("every"), or not at all ("never").'
        )
    wrapped = [module for model in models for module in model.modules() if _is_wrapper(module)]
    if not wrapped and (sync == "never" or not _several_processes()):
        return None
    if sync == "never":
        raise UnsupportedError(
            f'sync="never" leaves other processes alone, and the model is wrapped in {type(wrapped[0]).__name__}, '
            "which does not. Pass the plain module."
        )
    found = [_engine(model, sync) for model in models]
    groups = {groups for _, groups in found}
    if len(groups) > 1:
        raise UnsupportedError(
            f"The {len(models)} models are spread over different groups of processes, so that one weight for all of "
            "them would divide some by the wrong number. Give each an accumulator and an optimizer of its own."
        )
    device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    return Found(Ranks(groups.pop(), device), [engine for engine, _ in found])


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_wrapper(module: nn.Module) -> bool:
    name = type(module).__name__
    return name in ("DistributedDataParallel", "FullyShardedDataParallel") or name.startswith("FSDP")


def _engine(model: nn.Module, sync: Literal["auto", "last", "every"]) -> tuple[Engine, tuple[ProcessGroup, ...]]:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedError(
                "The model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters hide which of them "
                "got gradients, and which divides by the number of processes in two steps of its own. With unequal "
                "processes the gradient could not be made the batch's. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard(model)."
            )
    world = (_world(),)
    wrappers = [module for module in model.modules() if _is_wrapper(module)]
    if not wrappers:
        return PlainModule(), world
    # Imported only where they are met: torch's distributed tensors take 0.3 s to import.
    if type(wrappers[0]).__name__ == "DistributedDataParallel":
        from torch.nn.parallel import DistributedDataParallel

        from gradaccum.sync.ddp import DDP

        wrapper = wrappers[0]
        if len(wrappers) > 1 or not isinstance(wrapper, DistributedDataParallel):
            raise UnsupportedError(
                f"{len(wrappers)} modules inside of the model are wrapped for several processes "
                f"({', '.join(sorted({type(module).__name__ for module in wrappers}))}). Wrap the whole model once."
            )
        group: Any = wrapper.process_group
        return DDP(wrapper), _or_world((group,))
    from gradaccum.sync.fsdp2 import FSDP2

    engine = FSDP2(model, sync)
    return engine, _or_world(engine.process_groups)


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "a wrapped model means that there is a process group"
    return world


def _or_world(groups: tuple[ProcessGroup, ...]) -> tuple[ProcessGroup, ...]:
    """The default group where these span it: it may have a backend for the host."""
    size = 1
    for group in groups:
        size *= group.size()
    return (_world(),) if size == dist.get_world_size() else groups
