"""Lightning: a callback that makes the updates of automatic optimisation the whole batch's.

    trainer = L.Trainer(accumulate_grad_batches=4, callbacks=[ExactAccumulation()])

Lightning keeps its loop. The callback has what ``training_step`` returns weighed before Lightning divides it by the
number of micro-batches, and corrects ``.grad`` in ``on_before_optimizer_step``, which is after gradients were unscaled
and before they are clipped (`Window`). It moves to the front of the trainer's callbacks, so that others see the
gradient as it will be applied. Both packages are served: ``lightning`` and ``pytorch_lightning``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import gradaccum as ga
from gradaccum.losses.loss import Weight
from gradaccum.report import extra_needed

_HOOKS = {
    "on_before_optimizer_step": ("self", "trainer", "pl_module", "optimizer"),
    "on_train_batch_start": ("self", "trainer", "pl_module", "batch", "batch_idx"),
}


class _ExactAccumulation:
    """Gradient accumulation that gives the whole batch's update, for Lightning's automatic optimisation.

    ``training_step`` may return a mean, a `Loss`, or a dict with ``"loss"`` and perhaps ``"weight"``, what the loss is
    a mean over; or None for a micro-batch that is left out. ``accumulate_grad_batches`` is read live, so
    ``GradientAccumulationScheduler`` works.

    Args:
        weight: ``weight(batch)`` counts what the loss of a micro-batch is a mean over, where its graph does not say it.
        log: the name under which the window's loss is logged; it is ``callback.loss`` as well.

    Raises:
        UnsupportedError: when training begins: manual optimisation, a strategy that divides gradients by itself, an
            optimizer that evaluates the loss several times, or another Lightning than is known.
    """

    def __init__(self, weight: Callable[[Any], Weight] | None = None, log: str | None = None) -> None:
        self._weight, self._log = weight, log
        self._window: ga.Window | None = None
        self._state: Any = None
        self._batch: Any = None
        self._module: Any = None
        self.loss: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep it."""
        return "gradaccum.ExactAccumulation"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks what trains, and has what ``training_step`` of this one module returns weighed."""
        if stage != "fit":
            return
        _check(trainer, pl_module)
        trainer.callbacks.remove(self)
        trainer.callbacks.insert(0, self)
        own = pl_module.training_step

        @functools.wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._weighed(own(*args, **kwargs))

        pl_module.training_step = training_step
        self._module = pl_module

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Gives the module its own ``training_step`` back."""
        if self._module is not None:
            self._module.__dict__.pop("training_step", None)
            self._module = self._window = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the window: parameters are where they train by now."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ga.UnsupportedError(
                    "LBFGS evaluates the loss several times for one update, each time of the last micro-batch alone. "
                    "Use manual optimisation with ga.TrainStep.backward in the closure."
                )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        averaged = True if trainer.world_size > 1 else None
        self._window = ga.Window(pl_module.parameters(), averaged=averaged, scaler=scaler)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes the micro-batch, and puts an open window back that a checkpoint had."""
        self._batch = batch
        state, self._state = self._state, None
        if state is not None and self._window is not None:
            if len(state) != trainer.world_size and any(one["sizes"] for one in state):
                raise ga.StateError(
                    f"The checkpoint has an open window of {len(state)} processes, and {trainer.world_size} train now. "
                    "Its gradients cannot be shared out. Resume with as many processes, or from a checkpoint that was "
                    "saved at an update."
                )
            self._window.load_state_dict(state[trainer.global_rank % len(state)])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Corrects the gradient, which has been unscaled by now and is not clipped yet."""
        assert self._window is not None
        if trainer.world_size == 1 and not self._window.micro_batches:
            return  # every training_step of the window returned None
        self.loss = self._window.settle().value.to(torch.float32)
        if self._log is not None:
            pl_module.log(self._log, self.loss, prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        """The open window of every process, with its gradients."""
        if self._window is None:
            return {}
        own: Any = self._window.state_dict()
        states = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        return {"windows": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with the window of the checkpoint, with the next micro-batch."""
        self._state = state_dict.get("windows")

    def _weighed(self, output: Any) -> Any:
        is_dict = isinstance(output, Mapping)
        loss = output.get("loss") if is_dict else output
        if loss is None or self._window is None:
            return output
        over = output.get("weight") if is_dict else None
        if over is None and self._weight is not None and not isinstance(loss, ga.Loss):
            over = self._weight(self._batch)
        weighed = self._window.weigh(loss, over=over)
        return {**output, "loss": weighed} if is_dict else weighed


def exact(trainer: Any, *, weight: Callable[[Any], Weight] | None = None, log: str | None = None) -> Any:
    """Gives a Lightning ``Trainer`` the callback, in front of its others; returns the trainer."""
    if not any(isinstance(callback, _ExactAccumulation) for callback in trainer.callbacks):
        trainer.callbacks.insert(0, __getattr__("ExactAccumulation")(weight=weight, log=log))
    return trainer


if TYPE_CHECKING:
    ExactAccumulation = _ExactAccumulation


def __getattr__(name: str) -> Any:
    if name != "ExactAccumulation":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = tuple(_callbacks())
    documented = {"__doc__": _ExactAccumulation.__doc__, "__module__": __name__}
    found = globals()[name] = type(name, (_ExactAccumulation, *bases), documented)
    return found


def _callbacks() -> list[type]:
    """``Callback`` of the packages that are loaded; of ``lightning`` where none is."""
    loaded = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    if not loaded:
        with extra_needed("lightning", "Exact accumulation in Lightning"):
            import lightning.pytorch
        loaded = [lightning.pytorch.__name__]
    return [sys.modules[name].Callback for name in loaded]


def _check(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise ga.UnsupportedError(
            f"{type(module).__name__} optimises manually, so Lightning does not run its backwards. Use ga.Accumulator "
            "in training_step: self.accumulator = ga.Accumulator(self, self.optimizers().optimizer, micro_batches=4)."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ga.UnsupportedError(
            f"{type(trainer.strategy).__name__} accumulates and divides gradients by itself, in memory of its own, so "
            "they cannot be weighted. Use DDP, FSDP or one device."
        )
    for base in _callbacks():
        for name, expected in _HOOKS.items():
            found = tuple(inspect.signature(getattr(base, name)).parameters)
            if found != expected:
                raise ga.UnsupportedError(
                    f"Lightning's hook {name}({', '.join(found)}) is not the one that is known, "
                    f"({', '.join(expected)}). Known are lightning 2.4 to 2.6; use one of these, or manual "
                    "optimisation with ga.Accumulator."
                )
