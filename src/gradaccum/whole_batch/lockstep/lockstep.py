"""The runner for layers over the whole batch: BatchNorm, `gather`.

Micro-batches are treated as ranks in time. Each runs in a thread of its own, one at a time (`conductor`), and at every
layer over the batch they meet: SyncBatchNorm's exchange, between micro-batches instead of devices. Then one ordinary
backward runs over all losses: the graphs are joined through the statistics, so torch's own engine sums over the batch
where that is due. No thread waits in a backward. On CUDA it would wait for ever: one thread of the engine serves all
backwards of a device (pytorch#18949).

The price is memory: all graphs are alive, as the whole batch's would be, because the gradient of any sample needs those
of all others at every layer. What can be chosen is where they live (`host`), or that they are made again (`recompute`).
Less only comes from other mathematics: a few layers could do with one backward sweep each, frozen ones need none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.errors import BatchError, UnsupportedError
from gradaccum.losses.loss import Weight
from gradaccum.split.packing import restore_order
from gradaccum.types import Activations, Rows, Split
from gradaccum.whole_batch.batch_norm.exact import Exact, Whole
from gradaccum.whole_batch.batch_norm.find import refuse_compiled, refuse_synchronised
from gradaccum.whole_batch.lockstep.attributes import Attributes, noted_in, watched
from gradaccum.whole_batch.lockstep.conductor import Conductor, Member
from gradaccum.whole_batch.lockstep.gather import Gathers
from gradaccum.whole_batch.lockstep.host import CudaTransfer, HostMemory
from gradaccum.whole_batch.lockstep.recompute import find_blocks, recomputed
from gradaccum.whole_batch.lockstep.streams import Streams
from gradaccum.whole_batch.outputs import Concatenated, Outputs, Summed
from gradaccum.whole_batch.whole_over_ranks import SharesOfAll
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.prefetch import on_device
from gradaccum.window.runner import Runner
from gradaccum.window.weights import WeightsFunction, weights_by_name

logger = logging.getLogger("gradaccum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockstep:
    """Runs the micro-batches of a batch side by side, from layer to layer.

    Attributes:
        models: whose layers see the whole batch.
        run_one: from a micro-batch on the device to its loss; or to its outputs, where there is a ``batch_loss``.
        batch_loss: from the whole batch's outputs, with their graph, and the whole batch to the loss; None where each
            micro-batch has a loss.
        sums: whether outputs are statistics to be added up, instead of rows to be joined.
        whole: from ``run_one`` to what runs a batch that is not cut.
        split: what cuts batches.
        weights: counts what each plain mean is over; None for samples.
        is_exact: whether BatchNorm takes the statistics of the whole batch.
        activations: where what the backward needs waits for it.
        host_memory: makes the hooks of ``activations="host"``; by default for CUDA, and none elsewhere, where
            the host's memory is the device's.
    """

    models: Sequence[nn.Module]
    run_one: Callable[[Any], Any]
    batch_loss: Callable[[Any, Any], Any] | None = None
    sums: bool = False
    whole: Callable[[Callable[[Any], Any]], Runner]
    split: Split
    weights: WeightsFunction | None
    is_exact: bool = True
    activations: Activations = "device"
    host_memory: Callable[[Sequence[nn.Module], torch.device], HostMemory | None] | None = None

    def run(
        self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Callable[[int], None]
    ) -> None:
        """See `Runner`."""
        device = accumulation.device()
        if self.is_exact:
            refuse_compiled(self.models, wanted='batch_norm="exact"')
            refuse_synchronised(self.models)
        ranks = accumulation.ranks
        if ranks is not None:
            self._refuse_over_ranks(ranks, pieces)
        with ExitStack() as held:
            if self.activations == "recompute":
                held.enter_context(recomputed(find_blocks(self.models)))
            if len(pieces) == 1 and ranks is None:
                held.enter_context(self.saved(device)())
                run_one = held.enter_context(Whole(self.models).held(self.run_one)) if self.is_exact else self.run_one
                self.whole(run_one).run(accumulation, batch, pieces, ran=ran)
                return
            run = held.enter_context(_Run(self, device, pieces, ranks))
            micro_batches = on_device((self.split.cut(batch, piece) for piece in pieces), device)
            sizes, counts, results = run.forward(micro_batches)
            if self.batch_loss is None:
                losses = list(zip(results, sizes, counts, strict=True))
            else:
                outputs = _joined(pieces, sizes, results, sums=self.sums)
                losses = [(self.batch_loss(outputs, tree.to_device(batch, device)), sum(sizes), None)]
                del outputs
            results.clear()
            with run.backward():
                accumulation.add_together(losses)
            for done, samples in enumerate(sizes, start=1):
                accumulation.count(samples)
                ran(done)

    def _refuse_over_ranks(self, ranks: OverRanks, pieces: Sequence[Rows]) -> None:
        """What cannot be right where the batch is spread over processes."""
        if ranks.runs_collectives or self.batch_loss is not None:
            what = "FSDP2, whose forwards wait for all processes" if ranks.runs_collectives else "batch_loss="
            raise UnsupportedError(
                f"Layers over the batch together with {what}, over {ranks.ranks.size} processes: micro-batches in "
                "lockstep would wait for each other inside of what waits for other processes. Use "
                'DistributedDataParallel and loss_fn, or batch_norm="frozen" or ga.GhostBatch(n).'
            )
        if not pieces:
            raise BatchError(
                "This process has no samples in the batch, and its BatchNorm layers have statistics to exchange with "
                f'those of {ranks.ranks.size - 1} others. With batch_norm="exact" every process needs at least one.'
            )

    def saved(self, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        """Makes what a thread holds so that its saved tensors go where they should."""
        if self.activations != "host":
            return nullcontext
        make = _host_memory if self.host_memory is None else self.host_memory
        memory = make(self.models, device)
        return nullcontext if memory is None else memory.held


class _Run:
    """The lockstep of one batch; held while it runs."""

    def __init__(
        self, lockstep: Lockstep, device: torch.device, pieces: Sequence[Rows], ranks: OverRanks | None
    ) -> None:
        self._lockstep = lockstep
        self._device = device
        self._gathers = Gathers(pieces, is_all=ranks is None)
        self._saved = lockstep.saved(device)
        self._streams = Streams(len(pieces))
        across = None if ranks is None else SharesOfAll(ranks)
        self._exact = Exact(lockstep.models, across_ranks=across) if lockstep.is_exact else None
        self._held = ExitStack()

    def __enter__(self) -> _Run:
        with ExitStack() as held:
            if self._exact is not None:
                held.enter_context(self._exact.held())
            held.enter_context(watched())
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        if raised[0] is not None:
            self._streams.undo()
        return self._held.__exit__(*raised)

    def forward(self, micro_batches: Iterator[Any]) -> tuple[list[int], list[dict[str, Weight] | None], list[Any]]:
        """Of each micro-batch its rows, what its means are over where the user says so, and what it returned."""
        weights = self._lockstep.weights
        sizes: list[int] = []
        counts: list[dict[str, Weight] | None] = []
        attributes = [Attributes() for _ in range(self._streams.count)]

        def start(member: Member) -> Callable[[], Any]:
            micro_batch = next(micro_batches)
            sizes.append(tree.rows(micro_batch))
            counts.append(None if weights is None else weights_by_name(weights(micro_batch)))
            return lambda: self._run_one(member, micro_batch, attributes[member.index])

        conductor = Conductor(self._device, [self._streams, _Each(attributes)])
        results = conductor.run([start] * self._streams.count)
        self._streams.end()
        return sizes, counts, results

    @contextmanager
    def backward(self) -> Iterator[None]:
        """While held, the backward over all micro-batches may run."""
        with self._gathers.in_backward(), nullcontext() if self._exact is None else self._exact.backward():
            yield

    def _run_one(self, member: Member, micro_batch: Any, attributes: Attributes) -> Any:
        """In the member's thread."""
        with ExitStack() as held:
            held.enter_context(noted_in(attributes))
            held.enter_context(self._gathers.in_forward(member))
            held.enter_context(self._saved())
            if self._exact is not None:
                held.enter_context(self._exact.forward(member.meet))
            return self._lockstep.run_one(micro_batch)


class _Each:
    """Switches what there is one of for each micro-batch; see `Switched`."""

    def __init__(self, attributes: Sequence[Attributes]) -> None:
        self._attributes = attributes

    def enter(self, index: int) -> None:
        self._attributes[index].enter()

    def leave(self, index: int) -> None:
        self._attributes[index].leave()


def _host_memory(models: Sequence[nn.Module], device: torch.device) -> HostMemory | None:
    if device.type == "cuda":
        return HostMemory(models, CudaTransfer(device))
    logger.info('activations="host" changes nothing here: the model is on the %s already', device.type)
    return None


def _joined(pieces: Sequence[Rows], sizes: Sequence[int], results: Sequence[Any], *, sums: bool) -> Any:
    """The micro-batches' outputs as those of the batch, in its order and with their graph."""
    checked: Outputs = Summed() if sums else Concatenated(sum(sizes))
    for piece, samples, result in zip(pieces, sizes, results, strict=True):
        checked.put(piece, samples, result)  # what is wrong with them is found here
    columns = [list(column) for column in zip(*(tree.tensors(result) for result in results), strict=True)]
    whole = iter([_sum(column) if sums else restore_order(pieces, column) for column in columns])
    return tree.map_leaves(results[0], lambda leaf: next(whole) if isinstance(leaf, Tensor) else leaf)


def _sum(statistics: list[Tensor]) -> Tensor:
    wide = [one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for one in statistics]
    return torch.stack(wide).sum(0)
