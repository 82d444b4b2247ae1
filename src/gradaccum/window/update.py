"""From the summed gradient to the update: unscale, correct, check, clip, step, schedule.

Each of these reads and writes every gradient once if done by itself. They are folded into as few passes as can be:

    no clipping, correction None      one read (is it finite?)
    clipping and/or a correction      one read (norm), one multiplication by  correction * min(1, clip_norm / norm)
    fused optimizer                   one read; the factor goes to the optimizer as ``grad_scale``, and the finite check
                                      as ``found_inf``, so that neither a pass nor a wait for the device is needed
    GradScaler                        its own unscaling pass, with the correction in the scale
    before_step or a step pre-hook    the gradient itself has to be in ``.grad`` first: nothing is handed over

``optimizer.grad_scale`` (the gradient is divided by it) and ``optimizer.found_inf`` are how torch's GradScaler hands
these to fused optimizers, see ``torch/amp/grad_scaler.py``, `GradScaler.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.norms import are_finite, combined, grouped, norms
from gradaccum.window.guards import has_step_hooks
from gradaccum.window.loss_scale import LossScale, has_gradient
from gradaccum.window.stepped import call_each

_STEP = methodcaller("step")
_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm, so ours must, to be its equal


class Applied(NamedTuple):
    """What became of a summed gradient.

    ``skipped`` says that the gradient was not finite; it is a 0-d tensor where the optimizer found out on the device.
    """

    grad_norm: Tensor | None  # 0-d, the 2-norm before clipping
    skipped: bool | Tensor


class Updater:
    """Applies gradients: everything that happens once an update.

    Args:
        optimizers: all are stepped, or, where a gradient is not finite, none.
        clip_norm: largest 2-norm over all gradients together; None to not clip.
        schedulers: advanced once for each update that was made.
        scaler: of fp16 training; a disabled one counts as none.
        before_step: called once for each update that is made, when ``.grad`` holds the gradient itself: corrected,
            unscaled and clipped. Hooks that run before an optimizer's step see the same.
        narrow: called right before the optimizers step, where gradients are of more precision than these take: gives
            them the dtype of their parameters. Then nothing is folded into fused optimizers, whose factor would come
            after the rounding.

    Attributes:
        loss_scale: what every seed has to be scaled by; None without fp16 scaling.
        is_stepping: whether an update is being made.
        total_norm: from parameters and an order to the norm of all their gradients together, where these lie in parts
            on several processes; None where they are whole.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        *,
        clip_norm: float | None = None,
        schedulers: Sequence[Any] = (),
        scaler: GradScaler | None = None,
        before_step: Callable[[], Any] | None = None,
        narrow: Callable[[], None] | None = None,
    ) -> None:
        self._optimizers = optimizers
        self._clip_norm = clip_norm
        # The largest absolute value answers whether all are finite, and cannot overflow itself.
        self._order = math.inf if clip_norm is None else 2.0
        self._schedulers = schedulers
        self.loss_scale = LossScale(scaler, optimizers) if scaler is not None and scaler.is_enabled() else None
        self._before_step = before_step
        self._narrow = narrow
        self.is_stepping = False
        self.total_norm: Callable[[Sequence[nn.Parameter], float], Tensor] | None = None

    def apply(self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None) -> Applied:
        """One update from the gradients of ``parameters``.

        Args:
            parameters: those of the optimizers that have a gradient, at least one.
            correction: what the gradients have yet to be multiplied by; None for nothing.
        """
        self.is_stepping = True
        try:
            if self.loss_scale is None:
                applied = self._apply(parameters, correction)
            else:
                applied = self._apply_scaled(self.loss_scale, parameters, correction)
            if self._schedulers and not applied.skipped:  # a rate for the next update: a fused optimizer is waited for
                for scheduler in self._schedulers:
                    scheduler.step()
        except BaseException:
            self._forget_step()
            raise
        finally:
            self.is_stepping = False
            if self.loss_scale is not None:
                self.loss_scale.end()
        return applied

    def _forget_step(self) -> None:
        """After a step that raised: what torch's scaler has noted of it would spoil the next one."""
        if self.loss_scale is not None:
            self.loss_scale.scaler._per_optimizer_states.clear()
        for optimizer in self._optimizers:
            optimizer.__dict__.pop("grad_scale", None)
            optimizer.__dict__.pop("found_inf", None)

    def into_grad(
        self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None, *, unscales: bool = True
    ) -> None:
        """Leaves the gradient itself in ``.grad``: corrected and, with ``unscales``, without the loss scale."""
        scale = None if self.loss_scale is None or not unscales else self.loss_scale.of_window()
        if scale is not None and parameters:
            scale = scale.to(parameters[0].device, torch.float32 if scale.device.type == "mps" else torch.float64)
            correction = (1.0 if correction is None else correction) / scale
        _multiply(parameters, correction)

    def _is_looked_at(self) -> bool:
        """Whether somebody looks at the gradients before the optimizers step, and may change them."""
        return self._before_step is not None or any(map(has_step_hooks, self._optimizers))

    def _apply(self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None) -> Applied:
        skips_by_itself = (
            self._narrow is None and all(map(_skips_by_itself, self._optimizers)) and not self._is_looked_at()
        )
        if self._clip_norm is None and not skips_by_itself and self.total_norm is None:
            return self._step_if(are_finite(_values_of(parameters)), parameters, correction, None)
        norm = self._norm(parameters)
        grad_norm, factor = self._clipped(norm, correction)
        if not skips_by_itself:
            return self._step_if(math.isfinite(norm.item()), parameters, factor, grad_norm)
        found_inf = (~torch.isfinite(norm)).to(torch.float32)
        if norm.dtype == torch.float64:  # the kernels take grad_scale in fp32, which would cost nine digits
            _multiply(parameters, factor)
            factor = None
        for optimizer in self._optimizers:
            with _handed_over(optimizer, grad_scale=_reciprocal(factor, norm.device), found_inf=found_inf):
                optimizer.step()
        return Applied(grad_norm, _read_if_on_host(found_inf))

    def _step_if(
        self, finite: bool, parameters: Sequence[nn.Parameter], factor: float | Tensor | None, grad_norm: Tensor | None
    ) -> Applied:
        """For optimizers that cannot skip by themselves, so that the device has been waited for."""
        if finite and factor is not None:
            _multiply(parameters, factor)
        if finite and self._narrow is not None:
            finite = self._narrowed(parameters)
        if finite:
            self._call_before_step()
            call_each(_STEP, self._optimizers)
        return Applied(grad_norm, skipped=not finite)

    def _call_before_step(self) -> None:
        if self._before_step is not None:
            self._before_step()

    def _apply_scaled(
        self, loss_scale: LossScale, parameters: Sequence[nn.Parameter], correction: float | Tensor | None
    ) -> Applied:
        scaler = loss_scale.scaler
        loss_scale.take_over()
        # Torch's scaler refuses an optimizer none of whose parameters has a gradient.
        optimizers = [optimizer for optimizer in self._optimizers if has_gradient(optimizer)]
        if any(values.dtype == torch.float64 for values in _values_of(parameters)):
            _multiply(parameters, correction)  # an fp32 scale would cost nine digits
            correction = None
        is_plain = (
            self._narrow is None and self._clip_norm is None and len(optimizers) == 1 and not self._is_looked_at()
        )
        if is_plain and _skips_by_itself(optimizers[0]):
            with loss_scale.in_scaler():
                skipped = self._step_scaled(scaler, optimizers[0], correction, parameters[0].device)
            loss_scale.update()
            return Applied(None, skipped)
        with loss_scale.in_scaler(correction):
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        grad_norm = None
        if is_plain and not _is_fused(optimizers[0]):
            skipped = self._step_scaled(scaler, optimizers[0], None, parameters[0].device)
        else:
            # The scaler would skip each optimizer by itself, but half an update is not the batch's.
            norm = self._norm(parameters)
            grad_norm, factor = self._clipped(norm, None)
            skipped = not math.isfinite(norm.item())
            if not skipped:
                _multiply(parameters, factor)
                skipped = not self._narrowed(parameters)
            if not skipped:
                self._call_before_step()
                call_each(scaler.step, optimizers)
        loss_scale.update()
        return Applied(grad_norm, skipped)

    def _narrowed(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Gives the gradients the dtype that the optimizers take; whether they are finite in it, too."""
        if self._narrow is None:
            return True
        self._narrow()
        in_fp16 = [values for values in _values_of(parameters) if values.dtype == torch.float16]
        return not in_fp16 or are_finite(in_fp16)  # its largest number is 65,504; bf16 has the range of fp32

    def _step_scaled(
        self, scaler: GradScaler, optimizer: Optimizer, correction: float | Tensor | None, device: torch.device
    ) -> bool | Tensor:
        """One step by the scaler, and whether it skipped."""
        with _watched_step(optimizer) as steps, _handed_over(optimizer, grad_scale=_reciprocal(correction, device)):
            scaler.step(optimizer)
        if not steps:
            return True
        return False if steps[0] is None else _read_if_on_host(steps[0])

    def _norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        if self.total_norm is not None:
            return self.total_norm(parameters, self._order)
        return combined(norms(_values_of(parameters), self._order), self._order)

    def _clipped(self, norm: Tensor, correction: float | Tensor | None) -> tuple[Tensor | None, float | Tensor | None]:
        """The norm of the corrected gradient, and the factor that corrects and clips in one."""
        if self._clip_norm is None:
            return None, correction
        if correction is not None:
            norm = norm * correction
        if math.isinf(self._clip_norm):  # the norm alone is wanted: nothing is longer
            return norm, correction
        factor = torch.clamp(self._clip_norm / (norm + _EPSILON), max=1.0)
        return norm, factor if correction is None else factor * correction


def _values_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [_values(parameter) for parameter in parameters]


def _values(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "only parameters that have a gradient are updated"
    if type(gradient) is not Tensor and hasattr(gradient, "to_local"):  # a DTensor, importing which takes 0.3 s
        local: Any = gradient
        return local.to_local()
    return gradient._values() if gradient.is_sparse else gradient


def _multiply(parameters: Sequence[nn.Parameter], factor: float | Tensor | None) -> None:
    if factor is None:
        return
    for group in grouped(_values_of(parameters)):
        if isinstance(factor, Tensor):
            wide = group[0].dtype in (torch.float64, torch.complex128)
            torch._foreach_mul_(group, factor.to(group[0].device, torch.float64 if wide else torch.float32))
        else:
            torch._foreach_mul_(group, factor)


def _reciprocal(factor: float | Tensor | None, device: torch.device) -> Tensor | None:
    if factor is None:
        return None
    wide = torch.as_tensor(factor, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    return wide.reciprocal().to(torch.float32)


def _read_if_on_host(found_inf: Tensor) -> bool | Tensor:
    return bool(found_inf) if found_inf.device.type == "cpu" else found_inf


def _is_fused(optimizer: Optimizer) -> bool:
    # Asked anew each time: loading a state brings the groups of another optimizer, which may not have been fused.
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(group.get("fused") for group in optimizer.param_groups)


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves everything as it is when told so on the device.

    Fused SGD does not in its first step: the momentum buffers it allocates stay uninitialised memory if it skips.
    """
    if not _is_fused(optimizer):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    return all(
        not group["momentum"]
        or parameter.grad is None
        or optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


@contextmanager
def _handed_over(optimizer: Optimizer, **handed: Tensor | None) -> Iterator[None]:
    """The attributes by which a fused optimizer takes a factor and a finite check, for one step."""
    given = {name: value for name, value in handed.items() if value is not None}
    for name, value in given.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in given:
            optimizer.__dict__.pop(name, None)


@contextmanager
def _watched_step(optimizer: Optimizer) -> Iterator[list[Tensor | None]]:
    """Collects each step that really ran, with the ``found_inf`` it was given: GradScaler tells neither."""
    ran: list[Tensor | None] = []
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: ran.append(getattr(opt, "found_inf", None)))
    try:
        yield ran
    finally:
        handle.remove()
