"""Checkpoints of FSDP2 models by ``torch.distributed.checkpoint``: each rank writes and reads its own shards.

Any number of ranks can read them. The folder of the shards is renamed, and its checksum made, when all are written.
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


def save(partial: Path, rest: Mapping[str, Any], sharded: Mapping[str, Any]) -> None:
    """Fills the folder ``partial``. Every rank has to call it.

    ``sharded`` has one model and the optimizers of its parameters; ``rest`` has the states of all other objects, the
    same on every rank.
    """
    model, optimizers = _split(sharded)
    if dist.get_rank() == 0:
        files.remove(partial)
        partial.mkdir(parents=True)
        torch.save(dict(rest), partial / "rest.pt")
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizers)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    dist.barrier()


def load(path: Path, sharded: Mapping[str, Any]) -> None:
    """Loads what `save` has written, on any number of ranks. Every rank has to call it."""
    model, optimizers = _split(sharded)
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers), strict=True))
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
