"""Accelerate: its documented loop with the whole batch's updates, or `Accumulator` with what ``prepare`` returned.

    exact(accelerator)          the loop stays word for word: accumulate(), backward(), clip_grad_norm_(), step()
    accumulator(accelerator, model, optimizer, micro_batches=4)     the accumulator's loop, on prepared objects

The first changes what ``accelerator.backward`` of this one instance does: it weighs the loss, runs the backward, and
corrects ``.grad`` in a window's last one (`Window`). ``accelerator.sync_gradients`` says which that is.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

import gradaccum as ga
from gradaccum import tree
from gradaccum.losses.loss import Weight

_BACKWARD = ("self", "loss")


def exact(accelerator: Any) -> Any:
    """Makes the updates of Accelerate's documented loop the whole batch's, with every line of it as it is.

    ``accelerator.backward(loss)`` reads off the loss's graph what it is a mean over; where it cannot, it takes
    ``accelerator.backward(ga.Loss.mean(loss, over=n))``. The window's loss is ``accelerator.exact.loss`` after its last
    backward. ``accelerator.register_for_checkpointing(accelerator.exact)`` saves an open window with its gradients.
    ``accelerator.exact.undo()`` gives the accelerator's own backward back.

    Raises:
        UnsupportedError: the gradients lie where they cannot be weighted, or another Accelerate is installed than is
            known.
    """
    _check(accelerator)
    if not isinstance(getattr(accelerator, "exact", None), ExactBackward):
        accelerator.exact = ExactBackward(accelerator)
    return accelerator


def accumulator(accelerator: Any, model: Any, optimizer: Any, **options: Any) -> ga.Accumulator:
    """An `Accumulator` of a model and an optimizer that ``accelerator.prepare`` returned.

    The optimizer is unwrapped, the accelerator's loss scale is used, a prepared scheduler keeps its own rule, and
    ``accelerator.optimizer_step_was_skipped`` is set. The rows that a prepared loader repeats to give every process as
    many are cut off in ``over()``.

    Args:
        accelerator: with ``gradient_accumulation_steps=1``.
        model: one or a sequence.
        optimizer: one or a sequence, prepared or not.
        options: of `Accumulator`.

    Raises:
        MisuseError: the accelerator accumulates as well.
        UnsupportedError: see `exact`.
    """
    _check(accelerator)
    steps = accelerator.gradient_accumulation_steps
    if steps > 1:
        raise ga.MisuseError(
            f"Accelerator(gradient_accumulation_steps={steps}) accumulates as well: it would keep the prepared "
            f"scheduler and optimizer from {steps - 1} of {steps} updates. Leave it out there, and pass "
            f"accumulator(accelerator, model, optimizer, micro_batches={steps})."
        )
    wrapped = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    options.setdefault("scaler", accelerator.scaler)
    plain = [_unwrapped(one) for one in wrapped]
    return _PreparedAccumulator(accelerator, wrapped, model, plain if len(plain) > 1 else plain[0], options)


class ExactBackward:
    """What stands in for the ``backward`` of one accelerator.

    Attributes:
        loss: the last window's loss, detached; None before there was one.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._backward = accelerator.backward
        self._window: ga.Window | None = None
        self._models: tuple[int, ...] = ()
        self._state: Any = None
        self._has_warned = False
        self.loss: ga.Loss | None = None
        accelerator.backward = self.backward

    def backward(self, loss: Tensor | ga.Loss, *, over: Weight | None = None, **kwargs: Any) -> None:
        """``accelerator.backward`` with the loss weighed; ``over`` is what it is a mean over."""
        accelerator, window = self._accelerator, self._of_the_models()
        self._backward(window.weigh(loss, over=over), **kwargs)
        if accelerator.sync_gradients:
            self._warn_of_repeated_rows()
            self.loss = window.settle()

    def undo(self) -> None:
        """Gives the accelerator its own backward back."""
        self._accelerator.__dict__.pop("backward", None)
        self._accelerator.__dict__.pop("exact", None)

    def state_dict(self) -> dict[str, Any]:
        """The open window's, see `Window.state_dict`."""
        return {"window": None if self._window is None else self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Window.load_state_dict`."""
        self._state = state["window"]
        if self._window is not None and self._state is not None:
            self._window.load_state_dict(self._state)
            self._state = None

    def _of_the_models(self) -> ga.Window:
        """The window of all models that have been prepared by now."""
        models = self._accelerator._models
        if self._window is None or self._models != tuple(map(id, models)):
            self._window = ga.Window(list(models), scaler=self._accelerator.scaler)
            self._models = tuple(map(id, models))
            if self._state is not None:
                self._window.load_state_dict(self._state)
                self._state = None
        return self._window

    def _warn_of_repeated_rows(self) -> None:
        accelerator, state = self._accelerator, self._accelerator.gradient_state
        repeats = accelerator.num_processes > 1 and accelerator.even_batches
        if repeats and state.end_of_dataloader and state.remainder > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The last global batch of the prepared loader has {state.remainder} rows, and Accelerate repeats rows "
                "that it has used to give every process as many. They count twice in this update, which is that of "
                "another batch. Use accumulator(accelerator, model, optimizer, ...), which cuts them off, a batch size "
                "that divides the data, or ga.GlobalBatchSampler with a loader that is not prepared.",
                ga.GradAccumWarning,
                stacklevel=3,
            )


class _PreparedAccumulator(ga.Accumulator):
    def __init__(
        self, accelerator: Any, wrapped: list[Any], model: Any, optimizer: Any, options: dict[str, Any]
    ) -> None:
        self._accelerator, self._wrapped = accelerator, wrapped
        super().__init__(model, optimizer, **options)

    def over(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """See `Accumulator.over`; the rows that Accelerate repeats are cut off."""
        if not hasattr(micro_batches, "gradient_state") or self._accelerator.num_processes == 1:
            return super().over(micro_batches)
        return super().over(_WithoutRepeated(micro_batches, self._accelerator))

    def backward(self, loss: Any, *, samples: int | None = None) -> ga.Update | None:
        """See `Accumulator.backward`; Accelerate hears of a step that was skipped."""
        self._note(is_skipped=False)  # a prepared scheduler stands still as long as that is said
        update = super().backward(loss, samples=samples)
        if update is not None and self._accelerator.scaler is not None:
            self._note(is_skipped=update.skipped)
        return update

    def _note(self, *, is_skipped: bool) -> None:
        for one in self._wrapped:
            if hasattr(one, "_is_overflow"):
                one._is_overflow = is_skipped


class _WithoutRepeated:
    """A prepared loader without the rows that it has repeated."""

    def __init__(self, loader: Any, accelerator: Any) -> None:
        self._loader, self._accelerator = loader, accelerator

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        accelerator, state = self._accelerator, self._accelerator.gradient_state
        for batch in self._loader:
            if accelerator.even_batches and state.end_of_dataloader and state.remainder > 0:
                number = tree.rows(batch)
                own = min(max(state.remainder - accelerator.process_index * number, 0), number)
                batch = tree.take(batch, slice(0, own)) if own < number else batch
            yield batch


def _check(accelerator: Any) -> None:
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ga.UnsupportedError(
            f"{kind} keeps the gradients in memory of its own and divides them by itself, so they cannot be weighted. "
            "Use DDP, FSDP2 or one device a process."
        )
    found = tuple(inspect.signature(type(accelerator).backward).parameters)
    if found[:2] != _BACKWARD or not hasattr(accelerator, "_models") or not hasattr(accelerator, "sync_gradients"):
        raise ga.UnsupportedError(
            f"The installed Accelerate's backward({', '.join(found)}) is not the one that is known ({_BACKWARD[1]}, "
            "...), or it no longer knows its models or when gradients are synchronised. Known are accelerate 1.8 to "
            "1.15; use one of these, or ga.Window in the loop."
        )


def _unwrapped(optimizer: Any) -> Any:
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer
