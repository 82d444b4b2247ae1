"""From the summed gradient to the update: unscale, correct, check, clip, step, schedule.

Each of these reads and writes every gradient once if done by itself. They are folded into as few passes as can be:

    no clipping, correction None      one read (is it finite?)
    clipping and/or a correction      one read (norm), one multiplication by  correction * min(1, clip_norm / norm)
    fused optimizer                   one read; the factor goes to the optimizer as ``grad_scale``, and the finite check
                                      as ``found_inf``, so that neither a pass nor a wait for the device is needed
    GradScaler                        its own unscaling pass, with the correction in the scale

``optimizer.grad_scale`` (the gradient is divided by it) and ``optimizer.found_inf`` are how torch's GradScaler hands
these to fused optimizers, see ``torch/amp/grad_scaler.py``, `GradScaler.step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.errors import ParameterError, WindowError

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm, so ours must, to be its equal


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a summed gradient.

    Attributes:
        grad_norm: 0-d tensor, the 2-norm before clipping; None where not asked for.
        skipped: whether the gradient was not finite; a 0-d tensor where the optimizer found out on the device.
    """

    grad_norm: Tensor | None
    skipped: bool | Tensor


class Updater:
    """Applies gradients: everything that happens once an update.

    Args:
        optimizers: all are stepped, or, where a gradient is not finite, none.
        clip_norm: largest 2-norm over all gradients together; None to not clip.
        schedulers: advanced once for each update that was made.
        scaler: of fp16 training; a disabled one counts as none.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        *,
        clip_norm: float | None = None,
        schedulers: Sequence[Any] = (),
        scaler: GradScaler | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise WindowError(
                f"clip_norm={clip_norm}: clipping to it would erase or reverse every gradient. Pass a positive norm, "
                'float("inf") to measure without clipping, or None.'
            )
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ParameterError(
                    "ReduceLROnPlateau is advanced with a validation metric, which an update does not have. Leave it "
                    "out here and call scheduler.step(metric) after each validation."
                )
        self._optimizers = optimizers
        self._clip_norm = clip_norm
        self._schedulers = schedulers
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._fused = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)
        self.is_stepping = False

    @property
    def loss_scale(self) -> GradScaler | None:
        """Whose ``scale()`` every seed has to pass through; None without fp16 scaling."""
        return self._scaler

    def apply(self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None) -> Applied:
        """One update from the gradients of ``parameters``.

        Args:
            parameters: those that have a gradient.
            correction: what the gradients have yet to be multiplied by; None for nothing.
        """
        with self._stepping():
            if self._scaler is None:
                applied = self._apply(parameters, correction)
            else:
                applied = self._apply_scaled(self._scaler, parameters, correction)
        if self._schedulers and not applied.skipped:  # a rate for the next update: here a fused optimizer is waited for
            for scheduler in self._schedulers:
                scheduler.step()
        return applied

    def unscale_into_grad(self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None) -> None:
        """Leaves the gradient itself in ``.grad``: corrected, and without the loss scale."""
        if self._scaler is not None and parameters:
            scale = self._scaler.scale(torch.ones((), device=parameters[0].device))
            assert isinstance(scale, Tensor)
            correction = (1.0 if correction is None else correction) / scale
        _multiply(parameters, correction)

    def _apply(self, parameters: Sequence[nn.Parameter], correction: float | Tensor | None) -> Applied:
        norm = _norm([_values(parameter) for parameter in parameters], 2.0 if self._clip_norm is not None else math.inf)
        grad_norm, factor = self._clipped(norm, correction)
        if self._fused:
            found_inf = (~torch.isfinite(norm)).to(torch.float32)
            if norm.dtype == torch.float64:  # the kernels take grad_scale in fp32, which would cost nine digits
                _multiply(parameters, factor)
                factor = None
            for optimizer in self._optimizers:
                with _handed_over(optimizer, grad_scale=_reciprocal(factor, norm.device), found_inf=found_inf):
                    optimizer.step()
            skipped = found_inf if norm.device.type != "cpu" else bool(found_inf)
            return Applied(grad_norm, skipped)
        if not math.isfinite(float(norm)):  # the optimizer cannot skip by itself, so the device is waited for
            return Applied(grad_norm, skipped=True)
        _multiply(parameters, factor)
        for optimizer in self._optimizers:
            optimizer.step()
        return Applied(grad_norm, skipped=False)

    def _apply_scaled(
        self, scaler: GradScaler, parameters: Sequence[nn.Parameter], correction: float | Tensor | None
    ) -> Applied:
        grad_norm = None
        finite = True
        if self._clip_norm is not None or len(self._optimizers) > 1 or not self._fused:
            with _scale_corrected(scaler, correction):
                for optimizer in self._optimizers:
                    scaler.unscale_(optimizer)
            if self._clip_norm is not None or len(self._optimizers) > 1:
                norm = _norm([_values(p) for p in parameters], 2.0 if self._clip_norm is not None else math.inf)
                grad_norm, factor = self._clipped(norm, None)
                # Torch would skip each optimizer by itself; half an update is not the batch's.
                finite = len(self._optimizers) == 1 or math.isfinite(float(norm))
                if finite:
                    _multiply(parameters, factor)
            correction = None
        skipped: bool | Tensor = not finite
        if finite:
            for optimizer in self._optimizers:
                grad_scale = _reciprocal(correction, parameters[0].device)
                with _watched_step(optimizer) as steps, _handed_over(optimizer, grad_scale=grad_scale):
                    scaler.step(optimizer)
                skipped = True if not steps else _resolved(steps[0])
        scaler.update()
        return Applied(grad_norm, skipped)

    def _clipped(self, norm: Tensor, correction: float | Tensor | None) -> tuple[Tensor | None, float | Tensor | None]:
        """The norm of the corrected gradient, and the factor that corrects and clips in one."""
        if self._clip_norm is None:
            return None, correction
        if correction is not None:
            norm = norm * correction
        factor = torch.clamp(self._clip_norm / (norm + _EPSILON), max=1.0)
        return norm, factor if correction is None else factor * correction

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False


def _values(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "only parameters that have a gradient are updated"
    return gradient._values() if gradient.is_sparse else gradient


def _norm(gradients: Sequence[Tensor], order: float) -> Tensor:
    """The norm over all gradients together, 0-d, on the first one's device; fp32 at least, since fp16 norms overflow.

    The largest absolute value (``order=inf``) answers whether all are finite, and cannot overflow itself.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():  # a maximum over nothing is an error
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    if not groups:
        return torch.zeros((), device=gradients[0].device if gradients else None)
    norms: list[Tensor] = []
    home = next(iter(groups))[0]
    for (_, dtype), group in groups.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        # The kernel under torch.nn.utils.get_total_norm, without its grouping by device, which takes longer than it.
        found = torch._foreach_norm(group, order, dtype=wide)
        norms.extend(norm.to(home) for norm in found)
    if len(norms) == 1:
        return norms[0]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.linalg.vector_norm(torch.stack([norm.to(widest) for norm in norms]), order)


def _multiply(parameters: Sequence[nn.Parameter], factor: float | Tensor | None) -> None:
    if factor is None:
        return
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        values = _values(parameter)
        groups.setdefault((values.device, values.dtype), []).append(values)
    for (device, _), group in groups.items():
        torch._foreach_mul_(group, factor.to(device) if isinstance(factor, Tensor) else factor)


def _reciprocal(factor: float | Tensor | None, device: torch.device) -> Tensor | None:
    if factor is None:
        return None
    wide = torch.as_tensor(factor, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    return wide.reciprocal().to(torch.float32)


def _resolved(found_inf: Tensor | None) -> bool | Tensor:
    if found_inf is None:
        return False
    return bool(found_inf) if found_inf.device.type == "cpu" else found_inf


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


@contextmanager
def _scale_corrected(scaler: GradScaler, correction: float | Tensor | None) -> Iterator[None]:
    """Unscaling divides by the scale, so a scale divided by the correction corrects in the same pass."""
    scale = scaler._scale
    if correction is None or scale is None:
        yield
        return
    try:
        scaler._scale = scale / correction
        yield
    finally:
        scaler._scale = scale
