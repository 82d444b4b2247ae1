"""The gradient both ways: of the whole batch in one piece, and accumulated as training would accumulate it.

Every run starts from copies of the model as it is, with the same random draws for each sample, and leaves nothing
behind. The accumulated side is a `TrainStep` of its own, so what is audited is what is run. Suspects are taken out of a
run by substitutions, on both sides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.auditing.in_double import InDouble, in_double, no_modes
from gradaccum.auditing.isolate_samples import isolate_samples
from gradaccum.checking.compare import Buffers, Gradients
from gradaccum.checking.isolate_state import copy_state, isolated_state, put_state
from gradaccum.checking.pieces import FixedSplit, Piece, copied, whole
from gradaccum.checking.random_ops import Draws
from gradaccum.checking.random_replay import RandomReplay
from gradaccum.errors import MeanError
from gradaccum.fit.workload import Workload
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.losses.loss import Loss
from gradaccum.losses.terms import as_terms
from gradaccum.types import GhostBatch, Split
from gradaccum.whole_batch.batch_norm.ghost import Ghosts
from gradaccum.whole_batch.batch_norm.layers import frozen
from gradaccum.whole_batch.runners import RunnerOptions
from gradaccum.window.parameters import named_parameters


class Step(Protocol):
    """What accumulates: a `TrainStep`."""

    def backward(self, batch: Any) -> Loss:
        """Adds the batch's gradient to ``.grad``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Workload):
    """A workload, of two rows at least, that is audited."""

    options: RunnerOptions  # how the step runs micro-batches
    split: Split  # how it cuts a batch
    more_options: Mapping[str, Any]  # of the step: how gradients add up
    make_step: Callable[..., Step]
    others: Mapping[str, nn.Module] = field(default_factory=dict)  # that the user's functions hold on to, by name

    @property
    def function(self) -> Callable[[Any, Any], Any]:
        """What runs on each micro-batch."""
        function = self.loss_fn or self.forward
        assert function is not None
        return function

    def modules(self) -> dict[str, nn.Module]:
        """Every module by its qualified name, a model itself by its class's."""
        found: dict[str, nn.Module] = {}
        for i, model in enumerate(self.models):
            prefix = f"{i}." if len(self.models) > 1 else ""
            for name, module in model.named_modules():
                found[prefix + (name or type(module).__name__)] = module
        known = set(map(id, found.values()))
        for prefix, other in self.others.items():
            for name, module in other.named_modules():
                if id(module) not in known:
                    found[f"{prefix}.{name}" if name else prefix] = module
        return found

    def all_models(self) -> list[nn.Module]:
        """The models that are trained, and those that the user's functions hold on to."""
        return [*self.models, *self.others.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitutions:
    """What runs in place of something that may be at fault."""

    # Names of modules that see one sample at a time (BatchNorm: its running statistics).
    isolated_layers: frozenset[str] = frozenset()
    # What is drawn once for each forward is the same in all of them.
    same_draws: bool = False
    # Every forward starts with the state that the first one started with.
    resets_state: bool = False
    # One forward runs before all others, for layers that set themselves up from what they see first.
    starts_after_forward: bool = False
    # Names of modules in evaluation mode.
    evaluated: frozenset[str] = frozenset()
    # What the whole batch's loss is multiplied with.
    loss_scale: float = 1.0
    # The micro-batches' shares in the whole loss, in place of those that the library gives them.
    loss_shares: tuple[float, ...] | None = None
    # The whole batch's gradient on the model's outputs, in place of each micro-batch's own.
    output_gradients: tuple[Tensor, ...] | None = None
    # Options of the step that are to be tried.
    step_options: Mapping[str, Any] = field(default_factory=dict)
    # By what part each parameter is changed, up or down: to see how far rounding may go.
    parameter_change: float = 0.0


AS_IT_IS = Substitutions()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run left: gradients of the trained parameters, and the state of all modules."""

    gradients: Gradients
    state: Buffers  # of all modules, parameters too: a forward may write them
    divisor: float | None = None  # what the whole batch's loss was divided by last of all


@dataclass(slots=True)
class Run:
    """One run while it runs."""

    task: Task
    whole_batch: Any  # a copy of the batch, in the dtype of the run
    replay: RandomReplay
    substitutions: Substitutions
    first_state: Buffers
    outputs: list[Tensor] = field(default_factory=list)  # of the models in the present forward, in order

    def cut(self, piece: Piece) -> Any:
        """Returns a copy of the piece's rows."""
        return copied(self.task.split.cut(self.whole_batch, piece.where))

    @contextmanager
    def forward(self, piece: Piece) -> Iterator[None]:
        """Context manager around the forward of a piece."""
        self.outputs.clear()
        if self.substitutions.resets_state and piece.index > 1:
            put_state(self.task.modules(), self.first_state)
        with self.replay.forward(piece):
            yield

    def call(self, piece: Piece, batch: Any) -> Any:
        """Returns what the user's function makes of a micro-batch, which is a piece of the batch."""
        with self.forward(piece):
            return self.task.function(self.task.model, batch)

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
        GradientSum(named).add((value,), (torch.ones_like(value),))
        return self.accumulated_gradients()

    def accumulated_gradients(self) -> Gradients:
        """Returns what ``.grad`` of the models' parameters holds."""
        return {name: one.grad for name, one in named_parameters(self.task.models) if one.requires_grad}

    def substituted(self, loss: Any, piece: Piece) -> Loss:
        """Returns the loss of a micro-batch with the share or the gradient on outputs that it is to have."""
        value = loss_value(loss, piece.rows)
        if self.substitutions.output_gradients is not None:
            outputs = [output for output in self.outputs if output.requires_grad]
            parts = [
                (output * gradient[piece.where]).sum()
                for output, gradient in zip(outputs, self.substitutions.output_gradients, strict=True)
            ]
            return Loss.sum(torch.stack(parts).sum())
        if self.substitutions.loss_shares is not None:
            return Loss.sum(value * self.substitutions.loss_shares[piece.index - 1])
        # As sums, whose counts training takes as they are declared: what it would refuse is what is audited.
        if isinstance(loss, Loss) and loss.weight is not None:
            return Loss.sum(loss.total, over=loss.weight)
        return Loss.sum(value * piece.rows, over=piece.rows)


class Runs:
    """Runs of one task, in float64 or in the model's own dtype; the model is borrowed for each run."""

    def __init__(self, task: Task, *, is_double: bool) -> None:
        self.task = task
        self.is_double = is_double
        self.draws = Draws(task.rows)  # what the whole batch drew last
        # The error by which training refuses the loss, where it does; it is then taken as a mean over samples.
        self.refused: MeanError | None = None

    def in_own_dtype(self) -> Runs:
        """Returns runs of the same task in the model's own dtype, which take its loss in the same way."""
        own = Runs(self.task, is_double=False)
        own.refused = self.refused
        return own

    @contextmanager
    def running(self, substitutions: Substitutions = AS_IT_IS) -> Iterator[Run]:
        """Context manager for one run: copies of the model, random draws replayed, suspects taken out."""
        task, modules = self.task, self.task.modules()
        cast = in_double if self.is_double else None
        is_frozen = substitutions.step_options.get("batch_norm", task.options.batch_norm) == "frozen"
        with (
            isolated_state(task.all_models(), cast=cast),
            InDouble() if self.is_double else nullcontext(),
            frozen(task.models) if is_frozen else nullcontext(),
        ):
            if substitutions.parameter_change:
                _change_parameters(task, substitutions.parameter_change)
            batch = tree.to_device(task.batch, task.device)
            batch = copied(tree.map_leaves(batch, in_double) if self.is_double else batch)
            replay = RandomReplay(self.draws, modules, is_alike=substitutions.same_draws)
            for name in substitutions.evaluated:
                modules[name].eval()
            if substitutions.starts_after_forward:
                with torch.no_grad():
                    task.function(task.model, copied(batch))
            run = Run(task, batch, replay, substitutions, copy_state(modules))
            for model in task.models:  # the hooks go with all attributes of the modules
                model.register_forward_hook(lambda _, args, output: run.outputs.extend(floats_in(output)))
            isolate_samples(modules[name] for name in substitutions.isolated_layers)
            with replay:
                yield run

    def whole(self, substitutions: Substitutions = AS_IT_IS) -> RunResult:
        """Returns the whole batch's gradient."""
        rows, groups = self.task.rows, self.task.options.batch_norm
        with self.running(substitutions) as run, ExitStack() as held:
            function = partial(self.task.function, self.task.model)
            if isinstance(groups, GhostBatch):
                ghosts = Ghosts(self.task.models, groups)
                held.enter_context(ghosts.held())
                function = ghosts.forward(function, split=self.task.split)
            with run.forward(whole(rows)):
                made = function(copied(run.whole_batch))
                value = run.batch_loss(made) if self.task.loss_fn is None else loss_value(made, rows)
            divisor = _divisor(value)  # before the gradients are taken, which frees the graph
            gradients = run.gradients(value * substitutions.loss_scale)
            held.close()  # running statistics of groups advance at the end
            return RunResult(gradients, copy_state(self.task.modules()), divisor)

    def accumulated(self, cut: Sequence[Piece], substitutions: Substitutions = AS_IT_IS) -> RunResult:
        """Returns the gradient of the batch in these micro-batches."""
        with self.running(substitutions) as run:
            try:
                self._train_step(run, cut).backward(torch.arange(self.task.rows))
            except MeanError as error:
                if self.refused is not None:
                    raise
                self.refused = error
            else:
                return RunResult(run.accumulated_gradients(), copy_state(self.task.modules()))
        return self.accumulated(cut, substitutions)

    def _train_step(self, run: Run, cut: Sequence[Piece]) -> Step:
        """A step whose batch are the numbers of the rows: what it cuts is ours to look up, also with a user's split."""
        task, substitutions = self.task, run.substitutions
        known = {piece.start: piece for piece in cut}
        replacing = (substitutions.loss_shares, substitutions.output_gradients, self.refused)
        is_replaced = any(one is not None for one in replacing)

        def call(_: Any, numbers: Tensor) -> Any:
            piece = known[int(numbers[0])]
            made = run.call(piece, run.cut(piece))
            return run.substituted(made, piece) if is_replaced and task.loss_fn is not None else made

        def weights(numbers: Tensor) -> Any:
            is_whole = len(numbers) == task.rows
            assert task.options.weights is not None
            return task.options.weights(run.whole_batch if is_whole else run.cut(known[int(numbers[0])]))

        options = {one.name: getattr(task.options, one.name) for one in fields(task.options)}
        if task.loss_fn is None:
            options |= {"forward": call, "batch_loss": lambda outputs, _: run.batch_loss(outputs)}
        else:
            has_weights = task.options.weights is not None and not is_replaced
            options |= {"loss_fn": call, "weights": weights if has_weights else None}
        # Groups of BatchNorm are cut by a split of the step's own.
        split = None if isinstance(task.options.batch_norm, GhostBatch) else FixedSplit(cut)
        optimizer = torch.optim.SGD([one for _, one in named_parameters(task.models) if one.requires_grad], lr=0.0)
        largest = max(piece.rows for piece in cut)
        given = {**options, **task.more_options, **substitutions.step_options, "check": "off"}  # the audit is one
        return task.make_step(task.models, optimizer, micro_batch_size=largest, split=split, **given)


def loss_value(loss: Any, rows: int) -> Tensor:
    """Returns the number that a loss function's result stands for; terms are added.

    Raises:
        LossError: it is no loss.
    """
    values = [term.value for term in as_terms(loss, rows).values()]
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def floats_in(value: Any) -> list[Tensor]:
    """Returns the tensors of floats in nested outputs."""
    return [tensor for tensor in tree.tensors(value) if tensor.is_floating_point()]


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
