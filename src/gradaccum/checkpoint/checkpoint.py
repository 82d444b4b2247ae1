"""Everything a run needs to go on as if it had not stopped. A kill at any moment leaves a whole checkpoint behind.

A checkpoint holds the ``state_dict()`` of each object that was given by name, and the random state of every process.
Positions are in samples and updates, so a run may go on with another micro-batch size or number of processes; with
equal ones it goes on bit for bit. How files are written is in `files`.

On several processes rank 0 writes and all ranks read, so all of them must see the folder. Models of FSDP2, whose
parameters are sharded over the ranks, go through ``torch.distributed.checkpoint`` (see `sharded`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradaccum.checkpoint import files
from gradaccum.errors import StateError
from gradaccum.window.snapshot import RandomState

logger = logging.getLogger("gradaccum")

_RANDOM = "random state"


class Checkpoint:
    """Saves and loads the states of several objects together.

    Args:
        path: the folder for checkpoints, which is made if it does not exist.
        keep: how many of the newest checkpoints stay; at least 2, or a torn one could be the only one.
        objects: what is saved, by name. Each has ``state_dict()`` and ``load_state_dict()``: ``model=``,
            ``optimizer=``, ``scheduler=``, ``train_step=`` (or ``accumulator=``), ``sampler=``, ``scaler=``. Of a model
            wrapped in DDP the module inside is saved.

    A `GlobalBatchSampler` is saved where training stands, not where the loader has read ahead to, if a `TrainStep` or
    an `Accumulator` is given too. A ``DataLoader`` draws from the global random state whenever an iteration begins, so
    for dropout to go on bit for bit give it a state of its own: ``DataLoader(..., generator=torch.Generator())``.

    Raises:
        StateError: there is nothing to save, or an object has no state.

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
        methods = ("state_dict", "load_state_dict")
        stateless = [name for name, value in objects.items() if not all(hasattr(value, method) for method in methods)]
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
        is_wrapped = {name: type(value).__name__ == "DistributedDataParallel" for name, value in objects.items()}
        self._objects = {name: value.module if is_wrapped[name] else value for name, value in objects.items()}
        self._saves = 0

    def save(self) -> Path:
        """Saves a checkpoint, and returns its path on every process. Every process has to call it.

        Raises:
            StateError: a window is open, whose gradients would be lost.
        """
        counter = self._counter()
        updates = self._saves if counter is None else counter.updates
        self._saves += 1
        shards = self._sharded()
        state = {name: self._state_of(name) for name in self._objects if name not in shards}
        state[_RANDOM] = _random_states()
        if shards:
            from gradaccum.checkpoint.sharded import save

            partial = files.partial_path(self._path, updates)
            save(partial, state, shards)
            path = _from_first(lambda: files.publish(partial, updates))
        else:
            path = _from_first(lambda: files.write(self._path, updates, lambda partial: torch.save(state, partial)))
        if _rank_and_world_size()[0] == 0:
            files.keep_newest(self._path, self._keep)
        return path

    def load(self) -> Path | None:
        """Loads the newest checkpoint that is whole. Every process has to call it, before training begins.

        Returns:
            The path of the checkpoint on every process; None where the folder has none, for a fresh start.

        Raises:
            StateError: there are checkpoints, but none is whole; or it was saved from other objects.
        """
        path = _from_first(self._newest_whole)
        if path is None:
            return None
        if not path.exists():
            raise StateError(
                f"Rank 0 goes on from {path}, which rank {_rank_and_world_size()[0]} cannot see. Every process needs "
                "the folder: put it on a file system that all machines share."
            )
        rest = path / "rest.pt" if path.is_dir() else path
        state = torch.load(rest, map_location="cpu", weights_only=True)
        shards = self._sharded()
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

            load(path, shards)
        for name, value in self._objects.items():
            if name not in shards:
                value.load_state_dict(state[name])
        _restore_random_state(state[_RANDOM])
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
        value, counter = self._objects[name], self._counter()
        # A sampler stands where the loader has read ahead to; what is saved is where training stands.
        if counter is not None and hasattr(value, "dataset_size") and hasattr(value, "collate"):
            return value.state_dict(samples=counter.samples)
        return value.state_dict()

    def _counter(self) -> Any:
        """Returns the `TrainStep` or `Accumulator` that counts updates and samples, or None."""
        values = self._objects.values()
        return next((one for one in values if hasattr(one, "updates") and hasattr(one, "samples")), None)

    def _sharded(self) -> dict[str, Any]:
        """Returns sharded models and their optimizers by name."""
        return {name: value for name, value in self._objects.items() if _is_sharded(value)}


def _is_sharded(value: Any) -> bool:
    if isinstance(value, torch.optim.Optimizer):
        return any(hasattr(parameter, "device_mesh") for group in value.param_groups for parameter in group["params"])
    return isinstance(value, nn.Module) and any(hasattr(parameter, "device_mesh") for parameter in value.parameters())


def _rank_and_world_size() -> tuple[int, int]:
    has_group = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if has_group else (0, 1)


def _from_first(make: Callable[[], Path | None]) -> Any:
    """Returns on all ranks what ``make`` returns on rank 0. An error is raised on all, or the others would wait."""
    rank, world_size = _rank_and_world_size()
    made, error = None, None
    if rank == 0:
        try:
            made = make()
        except Exception as failed:  # noqa: BLE001 - raised below
            error = failed
    messages = [made, None if error is None else f"{type(error).__name__}: {error}"]
    if world_size > 1:
        dist.broadcast_object_list(messages, src=0)
    if error is not None:
        raise error
    if messages[1] is not None:
        raise StateError(f"Rank 0 could not: {messages[1]}")
    return messages[0]


def _random_states() -> list[dict[str, Any]]:
    """Returns each rank's state of Python's and torch's generators, in types that are loaded without running code."""
    version, numbers, gauss = random.getstate()
    state = RandomState.now()
    mine = {"python": [version, list(numbers), gauss], "cpu": state.cpu, "cuda": list(state.cuda.values())}
    _, world_size = _rank_and_world_size()
    states = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(states, mine)
    return states


def _restore_random_state(by_rank: list[Mapping[str, Any]]) -> None:
    rank, world_size = _rank_and_world_size()
    is_another_size = len(by_rank) != world_size
    state = by_rank[0 if is_another_size else rank]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    RandomState(state["cpu"], dict(enumerate(state["cuda"][: torch.cuda.device_count()]))).restore()
    if is_another_size and rank > 0:  # a stream of its own, or it would draw what rank 0 draws
        seed = int(torch.randint(0, 1 << 62, ())) + rank
        torch.manual_seed(seed)
        random.seed(seed)
