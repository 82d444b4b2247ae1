"""The ways to take less memory than a batch in one piece, and the lines that ask for them.

    micro-batches                fewer samples at a time                     micro_batch_size=
    chunks of the head           one chunk's logits at a time                ga.chunked_head, criterion(head=, chunk=)
    recomputed blocks            inputs of blocks, and one block             activations="recompute"
    activations on the host      what the next layers of a backward need     activations="host"

A way is one of each: all give the same gradient. `plan` runs each way as training would, so there is no model of what
recomputing saves: the same probes as for micro-batches alone give the bytes, measured or estimated, and the times.

Without times, ways are compared by the work of one sample: products of matrices and convolutions in its forward and
backward, counted. That leaves out all that only moves memory, and what copies to the host and back cost; so ways with
the same work are as few and as large micro-batches as fit, and the host comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import tree
from gradaccum.chunks.causal_head import chunked_head
from gradaccum.errors import UnsupportedError
from gradaccum.fit.size_model import SizeModel, Times
from gradaccum.fit.workload import Workload
from gradaccum.types import Activations
from gradaccum.whole_batch.activations import HostMemory, waiting

CHUNKS = (1024, 128, 16)  # rows
_TRANSFERS: dict[str, tuple[Activations, ...]] = {"cuda": ("device", "recompute", "host")}


@dataclass(frozen=True, slots=True, order=True)
class Way:
    """What is done besides cutting the batch; nothing, by default."""

    activations: Activations = "device"
    chunk: int | None = None  # rows of the head at a time

    @property
    def words(self) -> str:
        """What is done, in words."""
        parts = {"device": "", "recompute": "recomputed blocks", "host": "activations on the host"}
        chunks = "" if self.chunk is None else f"the head in chunks of {self.chunk}"
        return ", ".join(part for part in (chunks, parts[self.activations]) if part) or "micro-batches alone"

    def line(self, size: int, *, has_batch_loss: bool = False) -> str:
        """What to type for it, where ``model``, ``optimizer``, ``loss_fn`` and ``batch`` are the user's own names."""
        functions = "forward=forward, batch_loss=batch_loss" if has_batch_loss else "loss_fn"
        activations = "" if self.activations == "device" else f', activations="{self.activations}"'
        step = f"ga.TrainStep(model, optimizer, {functions}, micro_batch_size={size}{activations})"
        return step if self.chunk is None else f"with ga.chunked_head(model, size={self.chunk}): {step}(batch)"

    @contextmanager
    def held(self, workload: Workload, *, is_fake: bool = False) -> Iterator[None]:
        """Context manager in which micro-batches are run in this way.

        Raises:
            UnsupportedError: the models have no repeated blocks, or no head that could be run in chunks.
        """
        with ExitStack() as held:
            if self.chunk is not None:
                held.enter_context(chunked_head(workload.models[0], self.chunk))
            memory = _nowhere(workload.models) if is_fake and self.activations == "host" else None
            held.enter_context(waiting(workload.models, self.activations, workload.device, memory=memory))
            yield


def ways_besides(workload: Workload, target: torch.device) -> list[Way]:
    """The ways that can be asked for with these models, but for micro-batches alone; those that cost least first."""
    rows = max((tensor.numel() for tensor in tree.tensors(workload.batch)), default=0)
    chunks = [None, *(chunk for chunk in CHUNKS if chunk < rows and len(workload.models) == 1)]
    found = [Way(kind, chunk) for kind in _TRANSFERS.get(target.type, ("device", "recompute")) for chunk in chunks]
    return [way for way in found if way != Way() and _can_run(way, workload)]


def _can_run(way: Way, workload: Workload) -> bool:
    try:
        with way.held(workload, is_fake=True):
            return True
    except UnsupportedError:
        return False


def _nowhere(models: Sequence[nn.Module]) -> HostMemory:
    from torch._subclasses.fake_tensor import FakeTensor

    return HostMemory(models, _Nowhere(), ahead_bytes=0, types=(FakeTensor,))


class _Nowhere:
    """A `Transfer` of tensors without data: what is out takes no memory, and what comes back takes it again."""

    def out(self, tensor: Tensor) -> Any:
        """See `Transfer`."""
        return tensor.size(), tensor.stride(), tensor.dtype, tensor.device

    def back(self, host: Any) -> Callable[[], Tensor]:
        """See `Transfer`."""
        size, stride, dtype, device = host
        tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
        return lambda: tensor


class WorkCounter(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions, by torch's own formulas."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self._formulas: dict[Any, Callable[..., int]] = flop_registry
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class FittingWay:
    """A way that fits into the budget, at its best size.

    ``seconds`` and ``work`` are of an update's forwards and backwards.
    """

    words: str  # what is done besides micro-batches
    micro_batch_size: int  # the fastest of those timed; where nothing was, the largest that fits
    peak_bytes: int
    seconds: float | None  # measured; None where nothing was timed
    work: float | None  # products, of those that micro-batches alone take; None where they were not counted
    copies: bool  # whether activations go to the host and back, which ``work`` leaves out
    line: str  # what to type


def explored(
    workload: Workload, base: SizeModel, ways: Sequence[Way], run: Callable[[SizeModel, Way], None]
) -> tuple[tuple[FittingWay, ...], list[str]]:
    """The ways that fit, those that cost least first, and notes about those that could not be run.

    Args:
        workload: what is run.
        base: what is known of micro-batches alone.
        ways: the others, to be looked at.
        run: adds to a model of sizes what is found out about a way.
    """
    found, notes = [(Way(), base)], list[str]()
    for way in ways:
        sizes = replace(base, sizes=list(base.sizes), peaks={}, whole=None, ran=set(), failed=set())
        sizes.times, sizes.work, sizes.notes = Times(), None, []
        try:
            run(sizes, way)
        except UnsupportedError:  # a head whose logits are changed before the loss
            continue
        except Exception as error:  # noqa: BLE001  # a model that cannot be run in this way is trained in another
            reason = (str(error) or repr(error)).splitlines()[0].split(". ")[0]
            notes.append(f"Not looked at: {way.words}. It could not be run: {reason}.")
            continue
        found.append((way, sizes))
    fitting = [made for way, sizes in found if (made := _fitting(workload, way, sizes, base.work)) is not None]
    return tuple(sorted(fitting, key=_cost)), notes


def _fitting(workload: Workload, way: Way, found: SizeModel, work_of_base: float | None) -> FittingWay | None:
    seconds, largest = found.times.seconds(), found.largest()
    if largest is None:
        return None
    size = min(seconds, key=seconds.__getitem__, default=largest)
    return FittingWay(
        words=way.words,
        micro_batch_size=size,
        peak_bytes=found.curve().at(size),
        seconds=seconds[size] * found.rows if size in seconds else None,
        work=found.work / work_of_base if found.work and work_of_base else None,
        copies=way.activations == "host",
        line=way.line(size, has_batch_loss=workload.loss_fn is None),
    )


def _cost(way: FittingWay) -> tuple[Any, ...]:
    """What ways are compared by: those with times by these, before the others by their work."""
    work = way.copies, round(way.work or 1.0, 2), -way.micro_batch_size, "head" in way.words
    return way.seconds is None, way.seconds or 0.0, *work
