"""The runner for losses over the whole batch: in-batch negatives, rankings, Dice, correlations.

Such a loss is no mean of micro-losses, so no weights make a sum of micro-gradients right. But it sees the model through
its outputs alone, and these are small. With y_b = f(x_b) for the micro-batches b and L = loss(y_1, ..., y_m):

    pass 1   y_b for all b, most of them without a graph
    loss     L and G = dL/dy over the whole batch's outputs, detached; parameters of the loss get their gradients here
    pass 2   for each b: y_b again with its graph, and its backward started with G_b        grad = sum_b (dy_b/dw)^T G_b

which is the chain rule, and exact (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", arXiv 2101.06983). What is different here: graphs that fit are kept, so pass 2 runs only what did not fit
(`kept_graphs`); what is run again is compared with what it gave before (`forward_replay`); sums of statistics need no
outputs at all (`outputs.SUM`), so a Dice loss over the batch takes the memory of four numbers.

The micro-batches whose graphs are kept run last, so that they are held for the shortest time, and their backwards run
first. A kept graph is freed as it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.errors import UnsupportedError
from gradaccum.memory.live_bytes import graph_bytes
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of
from gradaccum.types import Rows, Split, num_rows
from gradaccum.whole_batch.forward_replay import Drift, Replay
from gradaccum.whole_batch.kept_graphs import KeptGraphs
from gradaccum.whole_batch.outputs import Combination, Outputs
from gradaccum.whole_batch.whole_over_ranks import gathered_batch, gathered_outputs
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.fillers import Fillers
from gradaccum.window.runner import Ran
from gradaccum.window.snapshot import ChangingBuffers


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoPass:
    """Runs the micro-batches of a batch whose loss sees all of their outputs, as ``combination`` joins them."""

    output_of: Callable[[Any], Any]
    batch_loss: Callable[[Any, Any], Any]
    split: Split
    combination: Combination
    models: Sequence[nn.Module]
    kept: KeptGraphs
    fillers: Fillers = field(default_factory=Fillers)
    buffers: ChangingBuffers = field(default_factory=ChangingBuffers)

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """See `Runner`."""
        device, ranks = accumulation.device(), accumulation.ranks
        batch = tree.to_device(batch, device)  # the loss sees all of it
        if ranks is None and len(pieces) == 1:
            # The whole batch in one piece: torch's own graph from end to end.
            rows, outputs = num_rows(pieces[0]), self.output_of(self.split.cut(batch, pieces[0]))
            # What is wrong in pieces is wrong here too.
            Outputs(self.combination, rows).put(slice(0, rows), rows, outputs)
            accumulation.add_together([(self.batch_loss(outputs, batch), rows, None)])
            accumulation.count(rows)
            ran(1)
            return
        replay = Replay(self.models, self.buffers)
        at_most = len(pieces)
        if ranks is not None and ranks.runs_collectives:  # as many forwards everywhere, so none may be left out
            self.fillers.keep(batch, self.split)
            at_most = 0
        while True:
            window = _Window(self, accumulation, batch, pieces, replay)
            try:
                window.run(at_most, ran)
            except BaseException as error:
                if not is_out_of_memory(error) or (ranks is None and window.num_kept == 0):
                    raise
                failure = error
            else:
                self.kept.succeeded()
                replay.done()
                return
            window.graphs.clear()
            if ranks is not None:  # what other processes have got from this one cannot be taken back
                raise UnsupportedError(
                    f"Out of memory in a batch whose outputs {ranks.ranks.size} processes share ({failure}). It cannot "
                    f"be run again by one of them alone. Pass a smaller micro_batch_size than {max(window.sizes)}, or "
                    "kept_graphs=0."
                ) from failure
            let_go_of(failure)
            del failure
            at_most = window.num_kept // 2
            self.kept.failed(device)
            accumulation.discard()
            free_memory(device)
            replay.undo()
            accumulation.open()


class _Window:
    """One attempt at one batch."""

    def __init__(
        self, runner: TwoPass, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], replay: Replay
    ) -> None:
        self._runner = runner
        self._accumulation = accumulation
        self._batch = batch
        self._pieces = pieces
        self._replay = replay
        self.sizes = [num_rows(piece) for piece in pieces]
        self._rows = sum(self.sizes)
        self._outputs = Outputs(runner.combination, self._rows)
        self.graphs: dict[int, list[Tensor]] = {}  # output tensors by micro-batch, where its graph is kept
        self.num_kept = 0
        ranks = accumulation.ranks
        # Where every forward waits for all processes, each runs equally many: its own micro-batches and then fillers.
        self._in_step = ranks if ranks is not None and ranks.runs_collectives else None
        self._num_fillers = 0 if self._in_step is None else self._in_step.pieces - len(pieces)

    def run(self, at_most: int, ran: Ran) -> None:
        """Both passes; keeps at most so many graphs."""
        if self.sizes:
            self._first_pass(at_most)
        if self._num_fillers:
            with torch.no_grad():
                self._run_fillers(lambda done: None, then=lambda _: None)
        self._add_loss()
        self._second_pass(ran)

    def _first_pass(self, at_most: int) -> None:
        kept = self._runner.kept
        elements = max(1, sum(tensor.numel() for tensor in tree.tensors(self._batch)) // max(self._rows, 1))
        first: list[Tensor] = []
        if at_most and not kept.is_known(elements):
            # The first one's graph is counted, and with it is known how many fit.
            self.num_kept = 1
            first = self._counted(elements)
        self.num_kept = min(at_most, kept.number(self.sizes, self._accumulation.device()))
        first_kept = len(self._pieces) - self.num_kept
        start = 1 if first else 0
        if first and not first_kept:
            self.graphs[0] = first
        del first  # its graph, where it is not kept
        for index in range(start, len(self._pieces)):
            if index < first_kept:
                self._replay.note(index)
            elif index == first_kept and index:
                torch.clear_autocast_cache()  # casts of parameters without a graph would be taken for those with one
            with torch.set_grad_enabled(index >= first_kept):
                outputs = self._forward(index)
            self._outputs.put(self._pieces[index], self.sizes[index], outputs)
            if index >= first_kept:
                self.graphs[index] = list(tree.tensors(outputs))

    def _counted(self, elements: int) -> list[Tensor]:
        """The first micro-batch's output tensors, with a graph whose size has been counted."""
        not_counted = [
            *(tensor for model in self._runner.models for tensor in (*model.parameters(), *model.buffers())),
            *tree.tensors(self._batch),
        ]
        self._replay.note(0)
        with torch.enable_grad(), graph_bytes(not_counted) as saved:
            outputs = self._forward(0)
        self._runner.kept.counted(saved.count, rows=self.sizes[0], elements=elements)
        self._outputs.put(self._pieces[0], self.sizes[0], outputs)
        return list(tree.tensors(outputs))

    def _add_loss(self) -> None:
        """The loss and its gradient on the outputs; over processes each computes it from the outputs of all."""
        ranks = self._accumulation.ranks
        outputs, batch, own_rows = self._outputs, self._batch, slice(0, self._rows)
        if ranks is not None:
            outputs, own_rows = gathered_outputs(ranks, outputs, self._rows)
            batch = gathered_batch(ranks, batch, self._rows)
        leaves = outputs.leaves()
        loss = self._runner.batch_loss(outputs.whole(), batch)
        self._accumulation.add_together([(loss, outputs.rows, None)], also=leaves, is_shared=ranks is not None)
        if ranks is not None and self.sizes:
            self._outputs.take_gradients(outputs.gradients(own_rows))

    def _second_pass(self, ran: Ran) -> None:
        drift = Drift()
        if not self.num_kept:
            torch.clear_autocast_cache()
        for done, index in enumerate(reversed(range(len(self._pieces))), start=1):
            self._prepare(done)
            if index in self.graphs:
                self._push(index, self.graphs.pop(index))
            else:
                with self._replay.again(index), torch.enable_grad():
                    again = list(tree.tensors(self._forward(index)))
                    drift.compare(again, self._outputs.seen(index, self._pieces[index]))
                    self._push(index, again)  # before buffers are put back, which this graph may have saved
            self._accumulation.count(self.sizes[index])
            ran(done)
        if self._in_step is not None:
            self._run_fillers(self._prepare, then=self._in_step.backward_of_nothing)
        drift.check()

    def _prepare(self, done: int) -> None:
        """Before the forward and backward of the micro-batch of this number, where they wait for other processes."""
        if self._in_step is not None:
            self._in_step.prepare(is_last=done == self._in_step.pieces)

    def _run_fillers(self, prepare: Callable[[int], None], *, then: Callable[[Any], None]) -> None:
        for number in range(self._num_fillers):
            prepare(len(self._pieces) + number + 1)
            self._runner.fillers.run(self._runner.output_of, self._batch, self._accumulation, then=then)

    def _forward(self, index: int) -> Any:
        return self._runner.output_of(self._runner.split.cut(self._batch, self._pieces[index]))

    def _push(self, index: int, outputs: Sequence[Tensor]) -> None:
        gradients = self._outputs.gradients(self._pieces[index])
        reached = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if reached or self._in_step is None:
            self._accumulation.push([output for output, _ in reached], [gradient for _, gradient in reached])
        else:
            self._in_step.backward_of_nothing(outputs)
