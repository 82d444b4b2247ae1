"""Everything a run needs to go on as if it had not stopped, saved so that a kill at any moment costs no more than that.

See `files` for how. What is saved are the ``state_dict()`` of whatever was given by name, and the random state of every
process; positions are in samples and updates, so a run may go on with another micro-batch size or number of processes.
With equal ones it goes on bit for bit.

On several processes rank 0 writes, and all read: the folder must be seen by all of them. Models of FSDP2, whose
parameters lie in parts on all processes, go through ``torch.distributed.checkpoint`` (see `sharded`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradaccum.checkpoint import files
from gradaccum.checkpoint.random_state import random_state, restore, restore_for_another_rank
from gradaccum.errors import StateError

logger = logging.getLogger("gradaccum")

_RANDOM = "random state"


class Checkpoint:
    """Saves and loads the states of several objects together.

    Args:
        path: the folder for checkpoints; made if it is not there.
        keep: how many of the last ones stay; at least 2, or a torn one could be the only one.
        objects: what is saved, by name: whatever has ``state_dict()`` and ``load_state_dict()``: ``model=``,
            ``optimizer=``, ``scheduler=``, ``train_step=`` (or ``accumulator=``), ``sampler=``, ``scaler=``. Models
            wrapped in DDP are saved as the module in them.

    A `GlobalBatchSampler` is saved where training stands, not where the loader has read ahead to, if a `TrainStep` or
    an `Accumulator` is given too. A ``DataLoader`` draws from the global random state whenever an iteration begins, so
    for dropout to go on bit for bit give it a state of its own: ``DataLoader(..., generator=torch.Generator())``.

    Raises:
        StateError: nothing to save, or something that has no state.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> train_step = ga.TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch_size=2)
        >>> checkpoint = ga.Checkpoint(
        ...     tempfile.mkdtemp(), model=model, optimizer=optimizer, train_step=train_step
        ... )
        >>> checkpoint.load() is None  # a fresh start
        True
        >>> update = train_step(torch.randn(5, 3))
        >>> checkpoint.save() == checkpoint.load()
        True
    """

    def __init__(self, path: str | Path, *, keep: int = 3, **objects: Any) -> None:
        stateless = [
            name
            for name, value in objects.items()
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict"))
        ]
        if stateless or not objects:
            raise StateError(
                f"There is nothing to save of {', '.join(stateless) or 'nothing'}: pass objects that have "
                "state_dict() and load_state_dict(), by name: Checkpoint(path, model=model, optimizer=optimizer, "
                "train_step=train_step)."
            )
        if type(keep) is not int or keep < 2:
            raise StateError(
                f"keep={keep!r}: at least 2 checkpoints stay, or a torn one could be the only one there is."
            )
        self._path = Path(path)
        self._keep = keep
        self._objects = {name: _unwrapped(value) for name, value in objects.items()}
        self._saves = 0

    def save(self) -> Path:
        """Saves a checkpoint; called by every process.

        Returns:
            Where it is; the same on every process.

        Raises:
            StateError: a window is open, whose gradients would be lost.
        """
        updates = self._updates()
        self._saves += 1
        shards = self._sharded_names()
        state = {name: self._state_of(name) for name in self._objects if name not in shards}
        state[_RANDOM] = _gathered(random_state())
        if shards:
            from gradaccum.checkpoint.sharded import save

            path = save(self._path, updates, state, {name: self._objects[name] for name in shards})
        else:
            path = _from_first(lambda: files.write(self._path, updates, lambda partial: torch.save(state, partial)))
        if _rank() == 0:
            files.keep_newest(self._path, self._keep)
        return path

    def load(self) -> Path | None:
        """Loads the newest checkpoint that is whole; called by every process, before training begins.

        Returns:
            Which it was, the same on every process; None where there is none, for a fresh start.

        Raises:
            StateError: there are some, but none is whole; or it was saved from other objects.
        """
        path = _from_first(self._newest_whole)
        if path is None:
            return None
        if not path.exists():
            raise StateError(
                f"Rank 0 goes on from {path}, which rank {_rank()} cannot see. Every process needs the folder: put it "
                "on a file system that all machines share."
            )
        rest = path / "rest.pt" if path.is_dir() else path
        state = torch.load(rest, map_location="cpu", weights_only=True)
        shards = self._sharded_names()
        missing = [name for name in self._objects if name not in state and name not in shards]
        if missing or path.is_dir() != bool(shards):
            held = ", ".join(name for name in state if name != _RANDOM)
            raise StateError(
                f"{path} holds the state of {held}{' and shards' if path.is_dir() else ''}, and not all of what is "
                f"to be loaded ({', '.join(self._objects)}). The run would go on as another. Pass the objects it was "
                "saved from, wrapped alike."
            )
        if shards:
            from gradaccum.checkpoint.sharded import load

            load(path, {name: self._objects[name] for name in shards})
        for name, value in self._objects.items():
            if name not in shards:
                value.load_state_dict(state[name])
        _restore_random(state[_RANDOM])
        logger.info("going on from %s", path)
        return path

    def _newest_whole(self) -> Path | None:
        found = files.newest_first(self._path)
        for path in found:
            if files.is_whole(path):
                return path
            logger.warning("%s is not whole any more, so the checkpoint before it is used", path)
        if found:
            raise StateError(
                f"None of the {len(found)} checkpoints in {self._path} is whole: what was written has changed since. A "
                "fresh start would lose what was trained in silence. Restore the folder, or pass an empty one."
            )
        return None

    def _state_of(self, name: str) -> Any:
        value = self._objects[name]
        counted = self._counter()
        if counted is not None and hasattr(value, "dataset_size") and hasattr(value, "collate"):
            return value.state_dict(samples=counted.samples)
        return value.state_dict()

    def _counter(self) -> Any:
        """The `TrainStep` or `Accumulator` that knows what has been trained with."""
        return next(
            (one for one in self._objects.values() if hasattr(one, "updates") and hasattr(one, "samples")), None
        )

    def _updates(self) -> int:
        counted = self._counter()
        return self._saves if counted is None else counted.updates

    def _sharded_names(self) -> list[str]:
        """Models of which each process has a part, and their optimizers."""
        models = [n for n, one in self._objects.items() if isinstance(one, nn.Module) and _is_sharded(one.parameters())]
        optimizers = [
            name
            for name, one in self._objects.items()
            if isinstance(one, torch.optim.Optimizer)
            and _is_sharded(parameter for group in one.param_groups for parameter in group["params"])
        ]
        return models + optimizers


def _unwrapped(value: Any) -> Any:
    return value.module if type(value).__name__ == "DistributedDataParallel" else value


def _is_sharded(parameters: Any) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in parameters)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _has_group() else 0


def _gathered(one: Any) -> list[Any]:
    """What each process has, by rank."""
    if not _has_group():
        return [one]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, one)
    return everything


def _from_first(make: Any) -> Any:
    """What rank 0 makes, on all processes; its error too, or the others would wait for it."""
    made: Any = None
    error: BaseException | None = None
    if _rank() == 0:
        try:
            made = make()
        except Exception as failed:  # noqa: BLE001 - raised below
            error = failed
    if _has_group():
        told = [made, None if error is None else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(told, src=0)
        if error is None and told[1] is not None:
            raise StateError(f"Rank 0 could not: {told[1]}")
        made = told[0]
    if error is not None:
        raise error
    return made


def _restore_random(by_rank: list[Mapping[str, Any]]) -> None:
    rank = _rank()
    if len(by_rank) == (dist.get_world_size() if _has_group() else 1):
        restore(by_rank[rank])
    elif rank == 0:
        restore(by_rank[0])
    else:
        restore_for_another_rank(by_rank[0], rank)
