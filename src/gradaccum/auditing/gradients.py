"""The gradient both ways: of the whole batch in one piece, and accumulated as training would accumulate it.

Every run starts from copies of the model as it is, with the same random draws for each sample, and leaves nothing
behind. The accumulated side is `TrainStep`'s own, so what is audited is what is run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradaccum import tree
from gradaccum.auditing.bench import Bench, Gradients, Run, value_of
from gradaccum.auditing.in_double import InDouble, in_double, no_modes
from gradaccum.auditing.neutral import neutralised
from gradaccum.auditing.pieces import FixedSplit, copied, pieces, whole
from gradaccum.auditing.replay import Draws, Replay
from gradaccum.auditing.task import NOTHING, Task, Without
from gradaccum.errors import MeanError
from gradaccum.fit.borrowed_model import on_copies
from gradaccum.losses.loss import Loss
from gradaccum.train_step import TrainStep
from gradaccum.window import guards

Seen = TypeVar("Seen")


class Runs:
    """Runs of one task.

    Args:
        task: its model is borrowed for each run.
        is_double: whether in float64, or in the model's own dtype.

    Attributes:
        draws: what the whole batch drew last.
        refused: the error by which training refuses the loss, where it does; it is then taken as a mean over samples.
    """

    def __init__(self, task: Task, *, is_double: bool) -> None:
        self.task = task
        self.is_double = is_double
        self.draws = Draws()
        self.refused: MeanError | None = None

    def whole(self, without: Without = NOTHING) -> Run:
        """The whole batch's gradient."""
        with self.running(without) as bench:
            batch = bench.batch()
            bench.begin(whole(self.task.rows))
            if self.task.loss_fn is not None:
                value = value_of(self.task.loss_fn(self.task.model, batch), self.task.rows)
            else:
                assert self.task.forward is not None
                value = bench.batch_loss(self.task.forward(self.task.model, batch))
            bench.end()
            outputs = [output for output in bench.outputs if output.requires_grad]
            pull, divisor = _pull(value, outputs), _divisor(value)
            if without.pull is not None and pull is not None:
                bench.backward(outputs, pull)
            else:
                bench.backward([value], [torch.ones_like(value)])
            return replace(bench.run(), outputs=[one.detach() for one in outputs], pull=pull, divisor=divisor)

    def accumulated(self, sizes: Sequence[int], without: Without = NOTHING) -> Run:
        """The gradient of the batch in micro-batches of these sizes."""
        with self.running(without) as bench:
            try:
                if self.task.loss_fn is None:
                    self._train_over_the_batch(bench, sizes)
                else:
                    self._train(bench, sizes, without)
            except MeanError as error:
                if self.refused is not None:
                    raise
                self.refused = error
            else:
                return bench.run()
        return self.accumulated(sizes, without)

    def each(
        self, sizes: Sequence[int], without: Without, look: Callable[[Any, Tensor], Seen]
    ) -> Iterator[tuple[Gradients, Seen]]:
        """Of each micro-batch: its own gradient, and what ``look`` sees in its loss while its graph is there.

        Args:
            sizes: of the micro-batches.
            without: faults that are taken out.
            look: is shown what the loss function returned, and the number that stands for.
        """
        for piece in pieces(sizes):
            with self.running(without) as bench:
                bench.begin(piece)
                assert self.task.loss_fn is not None
                loss = self.task.loss_fn(self.task.model, bench.cut(piece))
                bench.end()
                value = value_of(loss, piece.rows)
                seen = look(loss, value)
                bench.backward([value], [torch.ones_like(value)])
                yield bench.run().gradients, seen

    @contextmanager
    def running(self, without: Without = NOTHING) -> Iterator[Bench]:
        """The model on copies, random draws replayed, faults taken out."""
        task = self.task
        with ExitStack() as stack:
            stack.enter_context(on_copies(task.models, cast=in_double if self.is_double else None))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # training tells of them, and the audit does in its own words
            stack.enter_context(_quiet("gradaccum"))
            stack.enter_context(_eager(task))
            # Fused attention draws its dropout where nobody sees it.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            _nudge(task, without.nudge)
            batch = tree.to_device(task.batch, task.device)
            batch = copied(tree.map_leaves(batch, in_double) if self.is_double else batch)
            replay = Replay(self.draws, task.modules(), rows=task.rows, shares=without.draws)
            bench = Bench(task, batch, replay, without)
            stack.enter_context(bench.watching())
            stack.enter_context(neutralised(task, without.layers))
            if self.is_double:
                stack.enter_context(InDouble())
            stack.enter_context(replay)
            yield bench

    def _train(self, bench: Bench, sizes: Sequence[int], without: Without) -> None:
        """`TrainStep` on micro-batches that carry the numbers of their rows."""
        task = self.task
        known = {piece.start: piece for piece in pieces(sizes)}
        loss_fn = task.loss_fn
        assert loss_fn is not None
        is_own = without.shares is None and without.pull is None and self.refused is None

        def loss_of(model: Any, numbered: Any) -> Any:
            micro_batch, numbers = numbered
            piece = known[int(numbers[0])]
            bench.begin(piece)
            loss = loss_fn(model, micro_batch)
            bench.end()
            if is_own:
                return loss
            value = value_of(loss, piece.rows)
            if without.pull is not None:
                return Loss.sum(bench.pulled(without.pull, piece))
            if without.shares is not None:
                return Loss.sum(value * without.shares[piece.index - 1])
            return Loss.mean(value, over=piece.rows)

        def weights_of(numbered: Any) -> Any:
            assert task.weights is not None
            return task.weights(numbered[0])

        step = TrainStep(
            task.model,
            _optimizer(task),
            loss_of,
            micro_batch_size=max(sizes),
            split=FixedSplit(tuple(sizes)),
            weights=None if task.weights is None or not is_own else weights_of,
        )
        step.backward((bench.whole_batch, torch.arange(task.rows)))

    def _train_over_the_batch(self, bench: Bench, sizes: Sequence[int]) -> None:
        """The same for a loss over the whole batch's outputs."""
        task = self.task
        known = {piece.start: piece for piece in pieces(sizes)}
        forward = task.forward
        assert forward is not None

        def outputs_of(_: Any, numbered: Any) -> Any:
            micro_batch, numbers = numbered
            bench.begin(known[int(numbers[0])])
            outputs = forward(task.model, micro_batch)
            bench.end()
            return outputs

        step = TrainStep(
            task.models,
            _optimizer(task),
            forward=outputs_of,
            batch_loss=lambda outputs, _: bench.batch_loss(outputs),
            combine=task.combine,
            micro_batch_size=max(sizes),
            split=FixedSplit(tuple(sizes)),
        )
        step.backward((bench.whole_batch, torch.arange(task.rows)))


def _optimizer(task: Task) -> torch.optim.Optimizer:
    parameters = [parameter for _, parameter in guards.named_parameters(task.models)]
    return torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], lr=0.0)


def _nudge(task: Task, part: float) -> None:
    if not part:
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in guards.named_parameters(task.models):
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
                parameter.mul_(1 + part * signs)


def _pull(value: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    if not outputs:
        return None
    try:
        found = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
    except RuntimeError:  # a reentrant checkpoint, or a graph that is freed as it is walked
        return None
    return tuple(
        torch.zeros_like(output) if pull is None else pull.detach() for pull, output in zip(found, outputs, strict=True)
    )


def _divisor(value: Tensor) -> float | None:
    """What a loss was divided by, or multiplied with the inverse of, right before it was returned."""
    node: Any = value.grad_fn
    try:
        if node is not None and node.name() in ("DivBackward0", "MulBackward0") and node._saved_other.dim() == 0:
            with no_modes():
                other = float(node._saved_other)
            return other if node.name() == "DivBackward0" else 1 / other
    except (AttributeError, RuntimeError, ZeroDivisionError):  # not kept: the other factor needs no gradient
        pass
    return None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger still: the plan line is for training."""
    logger = logging.getLogger(name)
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


@contextmanager
def _eager(task: Task) -> Iterator[None]:
    """Compiled models run as they were written: compiled code draws where nobody sees it."""
    if not any(type(module).__name__ == "OptimizedModule" for module in task.modules().values()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
