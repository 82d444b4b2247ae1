"""Everything a run needs to go on as if it had not stopped. A kill at any moment leaves a whole checkpoint behind.

A checkpoint holds the ``state_dict()`` of each object that was given by name, and the random state of every process.
Positions are in samples and updates, so a run may go on with another micro-batch size or number of processes; with
equal ones it goes on bit for bit. How files are written is in `files`; what can be in a state in `plain_data`.

On several processes rank 0 writes and all ranks read, so all of them must see the folder. Models of FSDP2, whose
parameters are sharded over the ranks, go through ``torch.distributed.checkpoint`` (see `sharded`). Each step is taken
by all processes or by none (see `together`).
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradaccum.checkpoint import files
from gradaccum.checkpoint.plain_data import as_plain_data, from_plain_data
from gradaccum.checkpoint.random_state import random_state, restore_random_state
from gradaccum.checkpoint.together import Together, reason_of
from gradaccum.errors import StateError
from gradaccum.sync.messages import Kind
from gradaccum.sync.ranks import Ranks
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.stopping import Stopping

logger = logging.getLogger("gradaccum")

# Names that no object can have, since they have a space.
_RANDOM, _FORMAT = "random state", "checkpoint format"
_THIS_FORMAT = 2


class Checkpoint:
    """Saves and loads the states of several objects together.

    Args:
        folder: where checkpoints are, which is made if it does not exist.
        keep: how many of the newest checkpoints stay; at least 2, or a torn one could be the only one.
        keep_every: the first checkpoint of each so many updates stays for good; None for none.
        on_signal: ``signal.SIGTERM``, or several signals, at which the run saves and ends, with status 0: a signal to
            one process stops all, at the same update, when the loop's body has been run for it. None to handle none.
        objects: what is saved, by name. Each has ``state_dict()`` and ``load_state_dict()``: ``model=``,
            ``optimizer=``, ``scheduler=``, ``train_step=`` (or ``accumulator=``), ``sampler=``, ``scaler=``. Of a model
            wrapped in DDP the module inside is saved.

    A `GlobalBatchSampler` is saved where training stands, not where the loader has read ahead to, if a `TrainStep` or
    an `Accumulator` is given too. A ``DataLoader`` draws from the global random state whenever an iteration begins, so
    for dropout to go on bit for bit give it a state of its own: ``DataLoader(..., generator=torch.Generator())``.

    Raises:
        StateError: there is nothing to save, an object has no state, or the folder is a file.

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

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        on_signal: int | Sequence[int] | None = None,
        **objects: Any,
    ) -> None:
        methods = ("state_dict", "load_state_dict")
        stateless = [name for name, value in objects.items() if not all(hasattr(value, method) for method in methods)]
        if stateless or not objects:
            raise StateError(
                f"There is nothing to save of {', '.join(stateless) or 'nothing'}: pass objects that have "
                "state_dict() and load_state_dict(), by name: Checkpoint(folder, model=model, optimizer=optimizer, "
                "train_step=train_step)."
            )
        if type(keep) is not int or keep < 2:
            raise StateError(
                f"keep={keep!r}: at least 2 checkpoints stay, or a torn one could be the only one there is."
            )
        if keep_every is not None and (type(keep_every) is not int or keep_every < 1):
            raise StateError(f"keep_every={keep_every!r}: it is a number of updates, an int of at least 1, or None.")
        self._path = Path(folder)
        self._refuse_file()
        self._keep, self._keep_every = keep, keep_every
        is_wrapped = {name: type(value).__name__ == "DistributedDataParallel" for name, value in objects.items()}
        self._objects = {name: value.module if is_wrapped[name] else value for name, value in objects.items()}
        self._saves = 0
        self._together = Together(None, updates=0)
        self._stopping = None if on_signal is None else self._stop_at(on_signal)
        # Checkpoints of this run, by name, and those it found in its folder when it loaded one of them; None before.
        self._known: set[str] | None = None
        self._outdated: list[Path] = []

    @property
    def stops(self) -> bool:
        """Whether a signal has asked for a stop, and all processes know: the next window saves and ends the run.

        What takes long between updates, a validation say, asks it and is left out. It is the same on all processes.
        """
        return self._stopping is not None and self._stopping.is_agreed

    def save(self) -> Path:
        """Saves a checkpoint, and returns its path on every process. Every process has to call it.

        Checkpoints of later updates than the one that was loaded are set aside when the first one is saved: they are
        renamed, and neither loaded nor removed any more.

        Raises:
            RankError: an update failed on one process alone, so there is no state of all of them.
            StateError: a window is open, whose gradients would be lost; a state holds what could not be loaded again;
                another run saves into the folder; or the files could not be written.
        """
        counter = self._counter()
        updates = self._saves if counter is None else counter.updates
        shards = self._sharded()
        state: dict[str, Any] = {_FORMAT: _THIS_FORMAT}

        def collect() -> Mapping[str, Any]:
            self._refuse_file()
            state.update((name, self._state_of(name)) for name in self._objects if name not in shards)
            return random_state()

        over_ranks = self._over_ranks()
        if over_ranks is not None:
            over_ranks.refuse_after_half_update()
        self._together = Together(self._ranks(), updates=updates)
        state[_RANDOM] = self._together.everywhere(collect, doing="Saving")
        self._together.on_first(lambda: self._look_for_another_run(updates), doing="Saving")
        if shards:
            path = self._save_sharded(updates, state, shards)
        else:
            path = self._together.on_first(
                lambda: files.write(self._path, updates, lambda to: _write(state, to)), doing="Saving"
            )
        self._saves = updates + 1
        self._known = {*(self._known or ()), path.name}
        if self._together.rank == 0:
            self._tidy(path)
        return path

    def load(self, path: str | Path | None = None) -> Path | None:
        """Loads a checkpoint. Every process has to call it, before training begins.

        Args:
            path: which one; the newest that is whole by default.

        Returns:
            The path of the checkpoint on every process; None where the folder has none, for a fresh start.

        Raises:
            StateError: there are checkpoints, but none is whole; it was saved from other objects, or by a later
                version; or the given one is not whole.
        """
        self._together = Together(self._ranks(), updates=0, kind=Kind.LOADING)
        found = self._together.on_first(self._found, doing="Loading")
        chosen = self._newest_whole(found) if path is None else self._whole(Path(path))
        if chosen is None:
            return None
        rest = chosen / "rest.pt" if chosen.is_dir() else chosen
        state: dict[str, Any] = {}
        self._together.everywhere(lambda: state.update(_read(rest)), doing=f"Loading {chosen}")
        self._check_fit(chosen, state)
        shards = self._sharded()
        if shards:
            from gradaccum.checkpoint.sharded import load

            load(chosen, shards, self._together)
        self._together.everywhere(lambda: self._load_states(chosen, state, shards), doing=f"Loading {chosen}")
        restore_random_state(state[_RANDOM], rank=self._together.rank, world_size=self._together.size)
        updates = files.updates_of(chosen)
        self._saves = updates + 1
        self._known = {one.name for one in found}
        self._outdated = [one for one in found if files.updates_of(one) > updates]
        logger.info("going on from %s", chosen)
        return chosen

    def _stop_at(self, on_signal: int | Sequence[int]) -> Stopping:
        accumulation = self._accumulation()
        if accumulation is None:
            raise StateError(
                f"on_signal={on_signal!r}: where a run may stop is known to its TrainStep or Accumulator, and none is "
                "among the objects. Pass it too: Checkpoint(folder, train_step=train_step, on_signal=signal.SIGTERM)."
            )
        signals = [on_signal] if isinstance(on_signal, int) else list(on_signal)
        accumulation.stopping = Stopping(signals, self._save_between_windows, is_alone=accumulation.ranks is None)
        return accumulation.stopping

    def _save_between_windows(self) -> bool:
        """Saves unless one of several accumulators has a window open; returns whether it did."""
        if any(getattr(getattr(value, "_accumulation", None), "is_open", False) for value in self._objects.values()):
            return False
        self.save()
        return True

    def _load_states(self, chosen: Path, state: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
        for name, value in self._objects.items():
            if name not in shards:
                try:
                    value.load_state_dict(state[name])
                except Exception as error:
                    raise StateError(
                        f"The state of {name} in {chosen} does not fit: {type(error).__name__}: {error}. It was saved "
                        "from another one, or by another version. What stands before it in Checkpoint(...) has been "
                        "loaded, so begin anew before training."
                    ) from error

    def _save_sharded(self, updates: int, state: Mapping[str, Any], shards: Mapping[str, Any]) -> Path:
        from gradaccum.checkpoint.sharded import save

        partial = self._together.on_first(lambda: files.partial_path(self._path, updates), doing="Saving")
        try:
            self._together.on_first(lambda: _begin_folder(state, partial), doing="Saving")
            save(partial, shards, self._together)
            sums = _sums(partial, self._together)
            return self._together.on_first(lambda: files.publish(partial, updates, sums), doing="Saving")
        except BaseException:
            if self._together.rank == 0:
                files.remove(partial)
            raise

    def _tidy(self, saved: Path) -> None:
        """Sets outdated checkpoints aside and removes old ones; what cannot be done is no reason to end a run."""
        try:
            outdated = [one for one in self._outdated if one.exists() and one != saved]
            self._outdated = []
            if outdated:
                files.set_aside(outdated)
                logger.info("%d checkpoints of later updates than the one loaded were set aside", len(outdated))
            files.keep_newest(self._path, self._keep, every=self._keep_every, just_saved=saved)
        except OSError as error:
            logger.warning("%s was saved, but older checkpoints could not be removed: %s", saved, reason_of(error))

    def _look_for_another_run(self, updates: int) -> None:
        found = files.newest_first(self._path)
        if self._known is None:
            others = [path for path in found if files.updates_of(path) > updates]
        else:
            others = [path for path in found if path.name not in self._known]
        if not others:
            self._known = {*(self._known or ()), *(path.name for path in found)}
            return
        raise StateError(
            f"{self._path} holds {others[0].name}, which this run has neither saved nor loaded, and this run is at "
            f"update {updates}. Two runs in one folder would remove each other's checkpoints, and load() would go on "
            "from the wrong one. To go on from it, call checkpoint.load() before training; for a new run pass a folder "
            "of its own."
        )

    def _newest_whole(self, found: Sequence[Path]) -> Path | None:
        for path in found:
            if files.is_whole(path, _sums(path, self._together)):
                return path
            logger.warning("%s is not whole any more, so the checkpoint before it is used", path)
        if found:
            raise StateError(
                f"None of the {len(found)} checkpoints in {self._path} is whole: what was written has changed since. A "
                "fresh start would lose what was trained in silence. Restore the folder, or pass an empty one."
            )
        return None

    def _whole(self, path: Path) -> Path:
        if not files.is_checkpoint(path):
            raise StateError(
                f"{path} is no checkpoint: its name carries its update and the checksum of its content, as in "
                "update-000000012-<32 digits>.pt. Pass a path that save() returned, under its own name."
            )
        if not files.is_whole(path, _sums(path, self._together)):
            raise StateError(
                f"{path} is not whole: it is not there, or what was written has changed since. A run would go on from "
                "something else. Pass another one, or none, for the newest that is whole."
            )
        return path

    def _check_fit(self, path: Path, state: Mapping[str, Any]) -> None:
        version = state.get(_FORMAT, 1)
        if not isinstance(version, int) or version > _THIS_FORMAT:
            raise StateError(
                f"{path} has format {version}, and this version of gradaccum reads up to {_THIS_FORMAT}. Go on with "
                "the version that saved it."
            )
        shards = self._sharded()
        missing = [name for name in self._objects if name not in state and name not in shards]
        if missing or _RANDOM not in state or path.is_dir() != bool(shards):
            held = ", ".join(name for name in state if " " not in name)
            raise StateError(
                f"{path} holds the state of {held}{' and shards' if path.is_dir() else ''}, and not all of what is "
                f"to be loaded ({', '.join(self._objects)}). The run would go on as another. Pass the objects it was "
                "saved from, wrapped alike."
            )

    def _found(self) -> list[Path]:
        self._refuse_file()
        return files.newest_first(self._path)

    def _refuse_file(self) -> None:
        if self._path.exists() and not self._path.is_dir():
            raise StateError(f"{self._path} is a file, and checkpoints are kept in a folder. Pass a folder's path.")

    def _state_of(self, name: str) -> Any:
        value, counter = self._objects[name], self._counter()
        if hasattr(value, "consolidate_state_dict"):  # ZeroRedundancyOptimizer: rank 0 gets the others' parts
            value.consolidate_state_dict()
            if self._together.rank:
                return None
        # A sampler stands where the loader has read ahead to; what is saved is where training stands.
        if counter is not None and hasattr(value, "dataset_size") and hasattr(value, "collate"):
            return value.state_dict(samples=counter.samples)
        return as_plain_data(value.state_dict(), name)

    def _counter(self) -> Any:
        """Returns the `TrainStep` or `Accumulator` that counts updates and samples, or None."""
        values = self._objects.values()
        return next((one for one in values if hasattr(one, "updates") and hasattr(one, "samples")), None)

    def _accumulation(self) -> Any:
        """Returns what adds up in the `TrainStep` or `Accumulator`, or None."""
        return getattr(self._counter(), "_accumulation", None)

    def _ranks(self) -> Ranks | None:
        """Returns the processes that train together, which save together; None where nothing says so."""
        over_ranks = self._over_ranks()
        return None if over_ranks is None else over_ranks.ranks

    def _over_ranks(self) -> OverRanks | None:
        return getattr(self._accumulation(), "ranks", None)

    def _sharded(self) -> dict[str, Any]:
        """Returns sharded models and their optimizers by name."""
        return {name: value for name, value in self._objects.items() if _is_sharded(value)}


def _is_sharded(value: Any) -> bool:
    if isinstance(value, torch.optim.Optimizer):
        return any(hasattr(parameter, "device_mesh") for group in value.param_groups for parameter in group["params"])
    return isinstance(value, nn.Module) and any(hasattr(parameter, "device_mesh") for parameter in value.parameters())


def _write(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # not by its name: torch's own writer keeps the reason to itself when a disk is full
        torch.save(dict(state), file)


def _begin_folder(state: Mapping[str, Any], partial: Path) -> None:
    files.remove(partial)
    partial.mkdir(parents=True)
    _write(state, partial / "rest.pt")


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StateError(
            f"{path} holds something else than the data of a checkpoint, and nothing of it was run or loaded. It was "
            "not saved by Checkpoint.save(). Pass the folder that save() writes to."
        ) from error
    if not isinstance(state, dict):
        raise StateError(f"{path} holds a {type(state).__name__}; it was not saved by Checkpoint.save().")
    return {name: from_plain_data(value) for name, value in state.items()}


def _sums(path: Path, together: Together) -> dict[str, str]:
    """The digests of a checkpoint's files, of which each process has read its part."""
    rank, world_size = together.rank, together.size

    def mine() -> dict[str, str]:
        if not path.exists():
            return {"": ""}  # agrees with no name
        if not path.is_dir():
            return files.digests(path) if rank == 0 else {}
        return files.digests(path, part=rank, parts=world_size)

    found: dict[str, str] = {}
    for one in together.everywhere(mine, doing=f"Reading {path}"):
        found.update(one)
    return found
