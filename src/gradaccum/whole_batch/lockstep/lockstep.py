"""The runner for layers over the whole batch: BatchNorm, `gather`.

In lockstep, micro-batches are treated as ranks in time. Each runs in a thread of its own, one at a time (`conductor`),
and at every layer over the batch they meet: SyncBatchNorm's exchange, between micro-batches instead of devices. Then
one ordinary backward runs over all losses: the graphs are joined through the statistics, so torch's own engine sums
over the batch where that is due. No thread waits in a backward. On CUDA it would wait for ever: one thread of the
engine serves all backwards of a device (pytorch#18949).

The price is memory: all graphs are alive, as the whole batch's would be, because the gradient of any sample needs those
of all others at every layer. What can be chosen is where they live, or that they are made again (`activations`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradaccum import tree
from gradaccum.errors import BatchError, UnsupportedError
from gradaccum.types import Activations, Rows, Split, num_rows
from gradaccum.whole_batch.activations import host_memory, recomputed
from gradaccum.whole_batch.batch_norm.exact import Exact
from gradaccum.whole_batch.lockstep.conductor import Conductor, Member
from gradaccum.whole_batch.lockstep.gather import Gathers
from gradaccum.whole_batch.lockstep.micro_batch_state import (
    Attributes,
    Streams,
    attributes_seen,
    refuse_shared_hooks,
)
from gradaccum.whole_batch.outputs import Combination, Outputs, rebuilt
from gradaccum.whole_batch.whole_over_ranks import shares_of_all
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.prefetch import on_device
from gradaccum.window.runner import Ran, Runner
from gradaccum.window.weights import WeightsFunction, weights_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockstep:
    """Runs the micro-batches of a batch side by side, from layer to layer; a batch that is not cut by ``uncut``.

    ``run_one`` makes a micro-batch's loss; or its outputs where there is a ``batch_loss``, which gets the whole batch's
    as ``combination`` joins them, with their graph. ``is_exact`` is whether BatchNorm's statistics are the whole
    batch's, also those of ``others``, networks that the loss runs and does not train.
    """

    models: Sequence[nn.Module]
    run_one: Callable[[Any], Any]
    batch_loss: Callable[[Any, Any], Any] | None
    combination: Combination
    uncut: Runner
    split: Split
    weights: WeightsFunction | None
    is_exact: bool
    activations: Activations
    others: Callable[[], Sequence[nn.Module]] = tuple

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """See `Runner`."""
        device = accumulation.device()
        ranks = accumulation.ranks
        if ranks is not None:
            self._refuse_over_ranks(ranks, pieces)
        memory = host_memory(self.models, device) if self.activations == "host" else None
        saved = nullcontext if memory is None else memory.held  # around what a thread saves for the backward
        with ExitStack() as held:
            if self.activations == "recompute":
                held.enter_context(recomputed(self.models, is_exact=self.is_exact))
            if len(pieces) == 1 and ranks is None:
                held.enter_context(saved())
                self.uncut.run(accumulation, batch, pieces, ran=ran)
                return
            refuse_shared_hooks(self.models, self.run_one)
            across = None if ranks is None else shares_of_all(ranks)
            exact = Exact(self.models, others=self.others(), across_ranks=across) if self.is_exact else None
            if exact is not None:
                held.enter_context(exact.held())
            gathers = Gathers(pieces, is_all=ranks is None)
            streams, attributes = Streams(len(pieces)), Attributes(len(pieces))
            held.enter_context(attributes_seen())
            held.enter_context(streams.held())
            micro_batches = on_device((self.split.cut(batch, piece) for piece in pieces), device)

            def run_one(member: Member) -> tuple[Any, int, Any]:
                """In the member's thread: the loss or the outputs, their rows, and what plain means are over."""
                micro_batch = next(micro_batches)
                rows = num_rows(pieces[member.index])
                weights = None if self.weights is None else weights_by_name(self.weights(micro_batch))
                with (
                    attributes.noted(member.index),
                    gathers.in_forward(member),
                    saved(),
                    nullcontext() if exact is None else exact.forward(member.meet),
                ):
                    return self.run_one(micro_batch), rows, weights

            losses = Conductor(device, [streams.of, attributes.of], run_one).run(len(pieces))
            streams.end()
            sizes = [rows for _, rows, _ in losses]
            if self.batch_loss is not None:
                outputs = self._joined(pieces, sizes, [result for result, _, _ in losses])
                losses = [(self.batch_loss(outputs, tree.to_device(batch, device)), sum(sizes), None)]
                del outputs
            with gathers.in_backward(), nullcontext() if exact is None else exact.backward():
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

    def _joined(self, pieces: Sequence[Rows], sizes: Sequence[int], results: Sequence[Any]) -> Any:
        """The micro-batches' outputs as those of the batch, in its order and with their graph."""
        checked = Outputs(self.combination, sum(sizes))
        for piece, samples, result in zip(pieces, sizes, results, strict=True):
            checked.put(piece, samples, result)  # what is wrong with them is found here
        columns = zip(*(tree.tensors(result) for result in results), strict=True)
        return rebuilt(results[0], [self.combination.join(pieces, column) for column in columns])
