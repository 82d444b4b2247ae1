"""Checkpoints of FSDP2 models by ``torch.distributed.checkpoint``: each rank writes and reads its own shards.

Any other number of ranks can read them. The shards are written into a folder, which is renamed when all ranks are done;
its checksum is over all of its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gradaccum.checkpoint import files
from gradaccum.errors import StateError


def save(folder: Path, updates: int, rest: Mapping[str, Any], sharded: Mapping[str, Any]) -> Path:
    """Writes one checkpoint and returns its path. Every rank has to call it.

    Args:
        folder: the folder of the checkpoints.
        updates: the number of updates, which is part of the name.
        rest: the states of objects that are not sharded, the same on every rank.
        sharded: one model, and the optimizers of its parameters, by name.
    """
    model, optimizers = _split(sharded)
    partial = files.partial_path(folder, updates)
    if dist.get_rank() == 0:
        files.remove(partial)
        partial.mkdir(parents=True)
        torch.save(dict(rest), partial / "rest.pt")
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizers)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    dist.barrier()
    message: list[Any] = [files.publish(partial, updates) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def load(path: Path, sharded: Mapping[str, Any]) -> None:
    """Loads what `save` has written, on any number of ranks. Every rank has to call it."""
    model, optimizers = _split(sharded)
    model_state, optimizer_state = get_state_dict(model, optimizers)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _split(sharded: Mapping[str, Any]) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    models = [value for value in sharded.values() if isinstance(value, nn.Module)]
    if len(models) != 1:
        raise StateError(
            f"{len(models)} sharded models in one checkpoint: torch.distributed.checkpoint names parameters within one "
            "model. Pass one model, with its optimizers, to each Checkpoint."
        )
    return models[0], [value for value in sharded.values() if isinstance(value, torch.optim.Optimizer)]
