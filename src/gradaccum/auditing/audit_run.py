"""The gradient both ways: of the whole batch in one piece, and accumulated as training would accumulate it.

Every run starts from copies of the model as it is, with the same random draws for each sample, and leaves nothing
behind. The accumulated side is `TrainStep`'s own, so what is audited is what is run. Suspects are taken out of a run by
substitutions, on both sides alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.auditing.compare import Buffers, Gradients
from gradaccum.auditing.in_double import in_double, no_modes
from gradaccum.auditing.isolate_samples import isolate_samples
from gradaccum.auditing.isolate_state import copy_buffers, isolated_state, put_back_buffers
from gradaccum.auditing.pieces import FixedSplit, Piece, copied, pieces, whole
from gradaccum.auditing.random_ops import Draws
from gradaccum.auditing.random_replay import RandomReplay
from gradaccum.auditing.task import Task
from gradaccum.errors import MeanError
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.losses.loss import Loss
from gradaccum.losses.terms import as_terms
from gradaccum.train_step import TrainStep
from gradaccum.window.parameters import named_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitutions:
    """What runs in place of something that may be at fault.

    Attributes:
        isolated_layers: names of modules that see one sample at a time (BatchNorm: its running statistics).
        same_draws: what is drawn once for each forward is the same in all of them.
        reset_buffers: every forward starts with the buffers that the first one started with.
        loss_shares: the micro-batches' shares in the whole loss, in place of those that the library gives them.
        output_gradients: the whole batch's gradient on the model's outputs, in place of each micro-batch's own.
        parameter_change: by what part each parameter is changed, up or down: to see how far rounding may go.
    """

    isolated_layers: frozenset[str] = frozenset()
    same_draws: bool = False
    reset_buffers: bool = False
    loss_shares: tuple[float, ...] | None = None
    output_gradients: tuple[Tensor, ...] | None = None
    parameter_change: float = 0.0


AS_IT_IS = Substitutions()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run left.

    Attributes:
        gradients: of the trained parameters.
        buffers: as they were at the end.
        is_loss_inside: whether a model returned a single number, as those that compute their loss do.
        divisor: the number that the whole batch's loss was divided by last of all; None where it was not.
    """

    gradients: Gradients
    buffers: Buffers
    is_loss_inside: bool = False
    divisor: float | None = None


@dataclass(slots=True)
class Run:
    """One run while it runs.

    Attributes:
        task: what runs.
        whole_batch: a copy of the batch, in the dtype of the run.
        replay: answers for random numbers.
        substitutions: what runs in place of suspects.
        outputs: what the models returned in the present forward, in order.
    """

    task: Task
    whole_batch: Any
    replay: RandomReplay
    substitutions: Substitutions
    outputs: list[Tensor] = field(default_factory=list)
    _first_buffers: Buffers = field(init=False)

    def __post_init__(self) -> None:
        self._first_buffers = copy_buffers(self.task.modules())

    def cut(self, piece: Piece) -> Any:
        """Returns a copy of the piece's rows."""
        return copied(tree.take(self.whole_batch, slice(piece.start, piece.stop)))

    @contextmanager
    def forward(self, piece: Piece) -> Iterator[None]:
        """Context manager around the forward of a piece."""
        self.outputs.clear()
        if self.substitutions.reset_buffers and piece.start:
            put_back_buffers(self.task.modules(), self._first_buffers)
        with self.replay.forward(piece):
            yield

    def batch_loss(self, outputs: Any) -> Tensor:
        """Returns the value of the loss over the whole batch's outputs."""
        assert self.task.batch_loss is not None
        self.replay.begin_loss(whole(self.task.rows))
        return loss_value(self.task.batch_loss(outputs, copied(self.whole_batch)), self.task.rows)

    def gradients(self, value: Tensor) -> Gradients:
        """Returns the gradient of a value on the models' own parameters; nothing else gets one."""
        named = named_parameters(self.task.models)
        for _, parameter in named:
            parameter.grad = None
        own = GradientSum(named)
        own.add((value,), (torch.ones_like(value),))
        return self.accumulated_gradients()

    def accumulated_gradients(self) -> Gradients:
        """Returns what ``.grad`` of the models' parameters holds."""
        named = named_parameters(self.task.models)
        return {name: parameter.grad for name, parameter in named if parameter.requires_grad}

    def keep_outputs(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook of the models."""
        self.outputs += [tensor for tensor in tree.tensors(output) if tensor.is_floating_point()]

    def substituted(self, loss: Any, piece: Piece) -> Loss:
        """Returns the loss of a micro-batch with the share or the gradient on outputs that it is to have."""
        value = loss_value(loss, piece.rows)
        if self.substitutions.output_gradients is not None:
            outputs = [output for output in self.outputs if output.requires_grad]
            parts = [
                (output * gradient[piece.start : piece.stop]).sum()
                for output, gradient in zip(outputs, self.substitutions.output_gradients, strict=True)
            ]
            return Loss.sum(torch.stack(parts).sum())
        if self.substitutions.loss_shares is not None:
            return Loss.sum(value * self.substitutions.loss_shares[piece.index - 1])
        return Loss.mean(value, over=piece.rows)


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
        self.draws = Draws(task.rows)
        self.refused: MeanError | None = None

    @contextmanager
    def running(self, substitutions: Substitutions = AS_IT_IS) -> Iterator[Run]:
        """Context manager for one run: copies of the model, random draws replayed, suspects taken out."""
        task = self.task
        modules = task.modules()
        with isolated_state(task.models, is_double=self.is_double):
            if substitutions.parameter_change:
                _change_parameters(task, substitutions.parameter_change)
            batch = tree.to_device(task.batch, task.device)
            batch = copied(tree.map_leaves(batch, in_double) if self.is_double else batch)
            run = Run(task, batch, RandomReplay(self.draws, modules, is_alike=substitutions.same_draws), substitutions)
            for model in task.models:  # the hooks go with all attributes of the modules
                model.register_forward_hook(run.keep_outputs)
            isolate_samples(modules[name] for name in substitutions.isolated_layers)
            with run.replay:
                yield run

    def whole(self, substitutions: Substitutions = AS_IT_IS) -> RunResult:
        """Returns the whole batch's gradient."""
        task = self.task
        with self.running(substitutions) as run:
            batch = copied(run.whole_batch)
            with run.forward(whole(task.rows)):
                if task.loss_fn is not None:
                    value = loss_value(task.loss_fn(task.model, batch), task.rows)
                else:
                    assert task.forward is not None
                    value = run.batch_loss(task.forward(task.model, batch))
            divisor = _divisor(value)
            is_inside = any(output.requires_grad and output.dim() == 0 for output in run.outputs)
            return RunResult(run.gradients(value), copy_buffers(task.modules()), is_inside, divisor)

    def accumulated(self, sizes: Sequence[int], substitutions: Substitutions = AS_IT_IS) -> RunResult:
        """Returns the gradient of the batch in micro-batches of these sizes."""
        with self.running(substitutions) as run:
            step = self._train_step(run, sizes)
            try:
                step.backward((run.whole_batch, torch.arange(self.task.rows)))
            except MeanError as error:
                if self.refused is not None:
                    raise
                self.refused = error
            else:
                return RunResult(run.accumulated_gradients(), copy_buffers(self.task.modules()))
        return self.accumulated(sizes, substitutions)

    def _train_step(self, run: Run, sizes: Sequence[int]) -> TrainStep:
        """`TrainStep` on micro-batches that carry the numbers of their rows, by which their piece is known."""
        task, substitutions = self.task, run.substitutions
        known = {piece.start: piece for piece in pieces(sizes)}
        named = named_parameters(task.models)
        optimizer = torch.optim.SGD([parameter for _, parameter in named if parameter.requires_grad], lr=0.0)
        split = FixedSplit(tuple(sizes))
        is_own_loss = (
            substitutions.loss_shares is None and substitutions.output_gradients is None and self.refused is None
        )
        function = task.loss_fn or task.forward
        assert function is not None

        def call(_: Any, numbered: Any) -> Any:
            micro_batch, numbers = numbered
            piece = known[int(numbers[0])]
            with run.forward(piece):
                made = function(task.model, micro_batch)
            return made if task.loss_fn is None or is_own_loss else run.substituted(made, piece)

        if task.loss_fn is None:
            return TrainStep(
                task.models, optimizer, forward=call, batch_loss=lambda outputs, _: run.batch_loss(outputs),
                combine=task.combine, micro_batch_size=max(sizes), split=split,
            )  # fmt: skip
        weights = task.weights if is_own_loss else None
        return TrainStep(
            task.model, optimizer, call, micro_batch_size=max(sizes), split=split,
            weights=None if weights is None else lambda numbered: weights(numbered[0]),
        )  # fmt: skip


def loss_value(loss: Any, rows: int) -> Tensor:
    """Returns the number that a loss function's result stands for; terms are added.

    Raises:
        LossError: it is no loss.
    """
    values = [term.value for term in as_terms(loss, rows).values()]
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _change_parameters(task: Task, part: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in named_parameters(task.models):
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
                parameter.mul_(1 + part * signs)


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
