"""One run while it runs: the model on copies, the batch and its pieces, and what the models return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.auditing.pieces import Piece, copied, whole
from gradaccum.auditing.replay import Replay
from gradaccum.auditing.states import State
from gradaccum.auditing.task import Task, Without
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.losses.terms import as_terms
from gradaccum.window import guards

Gradients = dict[str, Tensor | None]


@dataclass(slots=True)
class Run:
    """What one run left.

    Attributes:
        gradients: by the parameter's qualified name; None where there is none.
        before: the buffers it started from.
        after: the buffers it ended with.
        outputs: what the models returned, in order; those that have a graph, on the whole batch.
        pull: the loss's gradient on these.
        divisor: the number that the loss was divided by last of all; None where it was not.
    """

    gradients: Gradients
    before: State
    after: State
    outputs: list[Tensor] = field(default_factory=list)
    pull: tuple[Tensor, ...] | None = None
    divisor: float | None = None


class Bench:
    """One run while it runs.

    Args:
        task: what runs.
        batch: of its own, in the dtype of the run.
        replay: answers for random numbers.
        without: the faults that are taken out.
    """

    def __init__(self, task: Task, batch: Any, replay: Replay, without: Without) -> None:
        self.task = task
        self.whole_batch = batch
        self.outputs: list[Tensor] = []
        self._replay = replay
        self._without = without
        self._before = State.of(task)
        self._gradients = GradientSum(guards.named_parameters(task.models))

    def batch(self) -> Any:
        """The whole batch, in memory of its own."""
        return copied(self.whole_batch)

    def cut(self, piece: Piece) -> Any:
        """The micro-batch of a piece, in memory of its own."""
        return copied(tree.take(self.whole_batch, slice(piece.start, piece.stop)))

    def begin(self, piece: Piece) -> None:
        """The forward of a piece is about to run."""
        self.outputs.clear()
        if self._without.states and piece.start:
            self._before.restore()
        self._replay.begin(piece)

    def end(self) -> None:
        """The forward is done."""
        self._replay.end()

    def backward(self, roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> None:
        """Adds gradients to those of the models' own parameters, and of nothing else."""
        self._gradients.add(tuple(roots), tuple(seeds))

    def batch_loss(self, outputs: Any) -> Tensor:
        """The loss over the whole batch's outputs."""
        assert self.task.batch_loss is not None
        self._replay.begin_loss(whole(self.task.rows))
        return value_of(self.task.batch_loss(outputs, self.batch()), self.task.rows)

    def pulled(self, pull: Sequence[Tensor], piece: Piece) -> Tensor:
        """What has the given gradient on this piece's outputs, and no other."""
        outputs = [output for output in self.outputs if output.requires_grad]
        parts = [
            (output * part[piece.start : piece.stop].detach()).sum() for output, part in zip(outputs, pull, strict=True)
        ]
        return torch.stack(parts).sum()

    def run(self) -> Run:
        """What it left; to be asked before the copies go."""
        named = guards.named_parameters(self.task.models)
        return Run(
            gradients={name: parameter.grad for name, parameter in named if parameter.requires_grad},
            before=self._before,
            after=State.of(self.task),
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what the models return."""

        def keep(module: Any, args: Any, output: Any) -> None:
            self.outputs += [tensor for tensor in tree.tensors(output) if tensor.is_floating_point()]

        handles = [model.register_forward_hook(keep) for model in self.task.models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def value_of(loss: Any, rows: int) -> Tensor:
    """What a loss function returned as the number it stands for: terms are added.

    Raises:
        LossError: it is no loss.
    """
    values = [term.value for term in as_terms(loss, rows).values()]
    return values[0] if len(values) == 1 else torch.stack(values).sum()
