"""A task on which accumulation may or may not give the whole batch's result, and what an adapter is given of it.

An adapter is one function that trains a model by somebody's trainer:

    train(model, optimizer, loss, batches, *, micro_batches, epochs, ...) -> parameters, reported losses

`Scenario.train` calls it. Further keywords (`OPTIONS`) are passed where the adapter has a parameter of that name; a
scenario that needs one which the adapter has not is not offered.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradaccum.conformance.processes import SECONDS, Place, place_of, run_processes
from gradaccum.errors import GradAccumError

MICRO_BATCH, MICRO_BATCHES = 10, 4
BATCH = MICRO_BATCH * MICRO_BATCHES

OPTIONS = {
    "clip_norm": "largest 2-norm of a batch's gradient, or None",
    "scheduler": "a learning-rate scheduler to be advanced once an update, or None",
    "scaler": "a torch.amp.GradScaler, or None",
    "folder": "a folder for what the trainer saves, or None",
    "stop_after": "after so many micro-batches the process ends; a second call, with the same folder, goes on",
    "weight": "weight(micro_batch): what its loss is a mean over; None where the loss is a sum",
    "terms": "terms(model, micro_batch): the loss's terms by name, each (mean, what it is a mean over); or None",
    "forward": "with batch_loss and combine, for losses over the batch, as gradaccum.TrainStep takes them; or None",
    "batch_loss": "batch_loss(outputs, batch)",
    "combine": '"concat" or "sum"',
    "processes": "so many processes run the adapter, each with its own share of each batch, in a gloo process group "
    "that is initialised; the adapter wraps the model itself, e.g. in DistributedDataParallel",
}
"""What an adapter may have parameters for, besides ``micro_batches`` and ``epochs``."""

SAME_PARAMETERS = 1e-6
"""Processes that differ by more than this, of the way that parameters went, do not train one model."""

Batch = tuple[Tensor, ...]
Adapter = Callable[..., "tuple[Iterable[Tensor], Sequence[float] | None]"]


class AdapterError(GradAccumError, TypeError):
    """An adapter cannot be called, or returned something else than parameters and losses."""


class DifferentParametersError(GradAccumError, RuntimeError):
    """Processes that should have trained one model have trained one each."""


class NotOffered(GradAccumError, NotImplementedError):
    """The trainer has nothing for this scenario; an adapter may raise any NotImplementedError to say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came out: parameters, flat and in float64, and the loss of each update where it was reported."""

    parameters: Tensor
    losses: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A task.

    Attributes:
        name: in the table.
        why: one sentence: what a mean over micro-batches gets wrong here.
        model: where training starts.
        data: the samples, index 0 of every tensor; the loader keeps their order.
        loss: ``loss(model, micro_batch)``: the loss as one writes it for a whole batch, a 0-d tensor.
        decay: what the learning rate is multiplied by at every update.
        needs: options of `OPTIONS` without which it cannot be trained.
        offers: what the adapter is told of the loss where it asks: weight, terms, forward, batch_loss, combine.
        compares: whether trained parameters are held against the whole batch's, or the losses that are reported.
        has_batch_norm: whether layers couple samples.
        stop_after: micro-batches after which a new process goes on.
        processes: how many train it. A whole batch has ``processes`` times `BATCH` samples; each process has the
            micro-batches of its own share of them, and is given the option of that name if there are several.
        seconds: the deadline of these processes.
        bound: what this library promises in float32; for benchmarks/scenarios.py.
    """

    name: str
    why: str
    model: nn.Module
    data: Batch
    loss: Callable[[nn.Module, Any], Tensor]
    epochs: int = 3
    lr: float = 0.05
    adamw: bool = False
    clip_norm: float | None = None
    decay: float | None = None
    is_stream: bool = False
    needs: frozenset[str] = frozenset()
    offers: Mapping[str, Any] = field(default_factory=dict)
    compares: Literal["parameters", "losses"] = "parameters"
    has_batch_norm: bool = False
    stop_after: int | None = None
    processes: int = 1
    seconds: float = SECONDS
    bound: float = 1e-6

    @property
    def batch(self) -> int:
        """Samples of a whole batch, of all processes."""
        return BATCH * self.processes

    def loader(
        self, batch_size: int, dtype: torch.dtype = torch.float64, *, rank: int | None = None
    ) -> DataLoader[Any]:
        """The data in order, or one process's share of them, in batches; a stream has no length."""
        parts = self.data
        if rank is not None:
            own = torch.arange(len(parts[0])) // BATCH % self.processes == rank
            parts = tuple(part[own] for part in parts)
        data = TensorDataset(*(part.to(dtype) if part.is_floating_point() else part for part in parts))
        return DataLoader(_Stream(data) if self.is_stream else data, batch_size=batch_size)

    def start(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR | None]:
        """A model, its optimizer and the scheduler, as training begins."""
        model = copy.deepcopy(self.model).to(dtype)
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW if self.adamw else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=self.lr)  # type: ignore[call-arg]
        decay = self.decay
        return model, optimizer, None if decay is None else LambdaLR(optimizer, lambda update: decay**update)

    def scaler(self) -> torch.amp.GradScaler | None:
        """A loss scale, where updates are to be skipped."""
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000) if "scaler" in self.needs else None

    def train(self, adapter: Adapter, dtype: torch.dtype = torch.float64) -> Trained:
        """Has a trainer train it.

        Raises:
            NotOffered: the trainer cannot do it.
            AdapterError: the adapter is none.
        """
        takes = _parameters(adapter)
        missing = sorted(self.needs - takes) if takes is not None else []
        if missing:
            raise NotOffered(f"the adapter has no parameter {', '.join(missing)}")
        with TemporaryDirectory() as folder:
            call = self._call if self.processes == 1 else self._call_in_processes
            if self.stop_after is not None:
                call(adapter, takes, dtype, {"folder": folder, "stop_after": self.stop_after})
            made = call(adapter, takes, dtype, {} if self.stop_after is None else {"folder": folder})
        if self.compares == "losses" and made.losses is None:
            raise NotOffered("it reports no loss")
        return made

    def _call_in_processes(
        self, adapter: Adapter, _: frozenset[str] | None, dtype: torch.dtype, more: Mapping[str, Any]
    ) -> Trained:
        place = place_of(adapter)
        if place is None:
            raise NotOffered(
                f"{getattr(adapter, '__name__', adapter)} cannot be imported by another process; write it at the top "
                "of a file: def train(...)"
            )
        if not dist.is_available():
            raise NotOffered("this torch is built without torch.distributed")
        if dist.is_initialized():  # also where the adapter's own file runs this again when it is imported
            raise NotOffered(
                "a process group is initialised here, and the processes are started where there is none. The part of a "
                'script that trains belongs under if __name__ == "__main__": each process imports the adapter\'s file'
            )
        more = {**more, "processes": self.processes}
        made = run_processes(_share, self, place, dtype, more, processes=self.processes, seconds=self.seconds)
        first = made[0]
        way = (first.parameters - flat(self.model.parameters())).norm()
        for rank, other in enumerate(made[1:], 1):
            apart = (other.parameters - first.parameters).norm()
            if apart > SAME_PARAMETERS * way:  # not where both are NaN
                raise DifferentParametersError(
                    f"Process {rank} has other parameters than process 0, {float(apart / way):.0e} of the way that "
                    "these went, so each process trains a model of its own. The adapter has to wrap it, e.g. model = "
                    "DistributedDataParallel(model)"
                )
        return first

    def _call(
        self,
        adapter: Adapter,
        takes: frozenset[str] | None,
        dtype: torch.dtype,
        more: Mapping[str, Any],
        rank: int | None = None,
    ) -> Trained:
        model, optimizer, scheduler = self.start(dtype)
        options = {"clip_norm": self.clip_norm, "scheduler": scheduler, "scaler": self.scaler(), **self.offers, **more}
        if takes is not None:
            options = {name: value for name, value in options.items() if name in takes}
        batches = self.loader(MICRO_BATCH, dtype, rank=rank)
        with _as_before(dtype):
            returned = adapter(
                model, optimizer, self.loss, batches, micro_batches=MICRO_BATCHES, epochs=self.epochs, **options
            )
        try:
            parameters, losses = returned
            trained = flat(parameters)
            reported = None if losses is None else tuple(float(loss) for loss in losses)
        except (TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"{getattr(adapter, '__name__', adapter)} returned {type(returned).__name__}, and has to return a "
                "pair: the trained parameters, and the loss of each update as a list of numbers or None. Write: return "
                "model.parameters(), None"
            ) from error
        return Trained(parameters=trained, losses=reported)

    def with_rows(self, rows: int, name: str, **changes: Any) -> Scenario:
        """The same on the first samples only."""
        return replace(self, name=name, data=tuple(part[:rows] for part in self.data), **changes)


def flat(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters in one vector, in float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def _share(rank: int, scenario: Scenario, place: Place, dtype: torch.dtype, more: Mapping[str, Any]) -> Trained:
    """One process's part in a training."""
    adapter = place.load()
    return scenario._call(adapter, _parameters(adapter), dtype, more, rank)


@contextmanager
def _as_before(dtype: torch.dtype) -> Iterator[None]:
    """Context manager with a default dtype; it, random state and the environment, which trainers change, come back."""
    before, environment = torch.get_default_dtype(), dict(os.environ)
    torch.set_default_dtype(dtype)  # Fabric turns outputs into it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)
        os.environ.clear()
        os.environ.update(environment)


def _parameters(adapter: Adapter) -> frozenset[str] | None:
    """Which options an adapter takes; None for all of them."""
    try:
        parameters = inspect.signature(adapter).parameters.values()
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{adapter!r} is no function: train(model, optimizer, loss, batches, *, ...)") from error
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return None
    names = frozenset(one.name for one in parameters)
    absent = sorted({"micro_batches", "epochs"} - names)
    if absent:
        raise AdapterError(
            f"{getattr(adapter, '__name__', adapter)} has no parameter {' and '.join(absent)}, so what it trains is "
            "not said. Write: def train(model, optimizer, loss, batches, *, micro_batches, epochs)"
        )
    return names


class _Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, data: TensorDataset) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return (self._data[index] for index in range(len(self._data)))
