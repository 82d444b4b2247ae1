"""The loss scale of fp16 training: what one window's seeds are multiplied by, and its gradients divided by again.

A ``GradScaler`` may be shared: by two accumulators, whose windows end at different times, or with the user, who steps
after ``train_step.backward``. So a window keeps the scale that it began with, whatever ``update()`` makes of the
scaler's own meanwhile, and the scaler is told which gradients have been divided already.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from gradaccum.errors import LossError, MisuseError
from gradaccum.window.guards import user_line

_MAX_FACTORS = 4


class LossScale:
    """A scaler, and the scale of one window after another."""

    def __init__(self, scaler: GradScaler, optimizers: Sequence[Optimizer]) -> None:
        self.scaler = scaler
        self._optimizers = optimizers
        self._of_window: Tensor | None = None
        self._has_marked = False

    def begin(self, device: torch.device) -> None:
        """A window begins: its scale is the scaler's of now."""
        scale = self.scaler.scale(torch.ones((), dtype=torch.float32, device=device))
        assert isinstance(scale, Tensor)
        self._of_window = scale

    def end(self) -> None:
        """The window has ended."""
        self._of_window = None

    def scale(self, seed: Tensor) -> Tensor:
        """The seed times the window's scale."""
        if self._of_window is None:
            self.begin(seed.device)
        assert self._of_window is not None
        return seed * self._of_window.to(seed.device, non_blocking=True)

    def of_window(self) -> Tensor | None:
        """The window's scale, 0-d in fp32; None where nothing has been scaled yet."""
        return self._of_window if self._of_window is not None else self.scaler._scale

    @contextmanager
    def in_scaler(self, correction: float | Tensor | None = None) -> Iterator[None]:
        """Context manager in which the scaler divides by the window's scale.

        A ``correction`` of the gradients is made in the same pass: the scale is divided by it.
        """
        before, scale = self.scaler._scale, self.of_window()
        if before is None or scale is None:
            yield
            return
        try:
            self.scaler._scale = scale if correction is None else scale / correction
            yield
        finally:
            self.scaler._scale = before

    def take_over(self) -> None:
        """Before the window's gradients are unscaled: forgets marks of ``mark_unscaled`` that no step has used up."""
        if self._has_marked:
            self._has_marked = False
            for optimizer in self._optimizers:
                self.scaler._per_optimizer_states.pop(id(optimizer), None)

    def update(self) -> None:
        """Advances the scaler; what it knows of gradients that are another's, and not stepped with yet, stays."""
        states, own = self.scaler._per_optimizer_states, set(map(id, self._optimizers))
        waiting = {key: states.pop(key) for key in list(states) if key not in own and _is_unscaled(states[key])}
        self.scaler.update()
        self.scaler._per_optimizer_states.update(waiting)

    def mark_unscaled(self) -> None:
        """Has ``scaler.step(optimizer)`` take the gradients that are in ``.grad`` as they are: divided already.

        The scaler looks at once whether they are finite, as ``unscale_`` would have.
        """
        for optimizer in self._optimizers:
            if not has_gradient(optimizer):
                continue
            state: Any = self.scaler._per_optimizer_states[id(optimizer)]
            if state["stage"] is OptState.STEPPED:  # without an update() since: torch has an error for the next step
                continue
            self.scaler._check_inf_per_device(optimizer)
            state["stage"] = OptState.UNSCALED
            self._has_marked = True


def check_stays_scaled(
    loss_scale: LossScale | None, scaler: GradScaler | None, optimizers: Sequence[Optimizer]
) -> None:
    """Checks that gradients may be left scaled in ``.grad``, for the user's own scaler to divide.

    Raises:
        MisuseError: nothing scales them; or there are gradients in ``.grad`` that have been divided already.
    """
    if scaler is None:
        raise MisuseError(
            f"train_step.backward(batch, unscale=False) was called at {user_line()}, and nothing scales losses here: a "
            "scaler that steps with these gradients would divide them by a scale that is not in them. Pass "
            "scaler=scaler to the TrainStep, or leave unscale= out."
        )
    for optimizer in optimizers if loss_scale is not None else ():
        state = scaler._per_optimizer_states.get(id(optimizer))
        if state is not None and _is_unscaled(state) and has_gradient(optimizer):
            raise MisuseError(
                f"train_step.backward(batch, unscale=False) was called at {user_line()}, and .grad holds gradients "
                "that have been divided by the loss scale already. The sum of the two would be neither's. Pass "
                "unscale=False in all calls before scaler.step(optimizer), or in none."
            )


def has_gradient(optimizer: Optimizer) -> bool:
    """Whether any of the optimizer's parameters has a gradient."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _is_unscaled(state: Any) -> bool:
    return state["stage"] is OptState.UNSCALED


def refuse_scaled(roots: Sequence[Tensor], *, is_scaled_here: bool) -> None:
    """Refuses losses that have been multiplied by a ``GradScaler``'s scale.

    Seen is the product with that scaler's own tensor, at the root or above a few more products. Whether a tensor is a
    scaler's is asked of the garbage collector, which takes 30 ms, so ask once, and it is asked only for a product with
    a 0-d tensor in fp32 that is no parameter.

    Raises:
        LossError: one has.
    """
    for root in roots:
        node = root.grad_fn
        for _ in range(_MAX_FACTORS):
            if node is None or type(node).__name__ not in ("MulBackward0", "DivBackward0"):
                break
            scale = getattr(node, "_saved_other", None)
            if type(node).__name__ == "MulBackward0" and _is_of_scaler(scale):
                what = "scaled twice and unscaled once" if is_scaled_here else "that of a loss many thousand times"
                remedy = "" if is_scaled_here else ", and scaler=scaler to the accumulator"
                raise LossError(
                    f"The loss at {user_line()} was multiplied by the scale of a GradScaler: scaler.scale(loss). The "
                    f"gradient would be {what}{' it' if not is_scaled_here else ''}. Pass the loss itself{remedy}: it "
                    "is scaled in the backward, and the gradient unscaled once an update."
                )
            node = node.next_functions[0][0]


def _is_of_scaler(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or tensor.dim() or tensor.dtype != torch.float32 or tensor.requires_grad:
        return False
    for referrer in gc.get_referrers(tensor):
        if isinstance(referrer, GradScaler) and referrer._scale is tensor:
            return True
        # Before Python 3.13 an object's attributes are in a dict of their own.
        if type(referrer) is dict and referrer.get("_scale") is tensor and "_growth_tracker" in referrer:
            return True
    return False
