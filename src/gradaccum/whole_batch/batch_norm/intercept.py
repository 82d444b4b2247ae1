"""Batch norms in training mode, handed to whoever takes them over.

What is replaced, while anybody asks for it, is ``torch.nn.functional.batch_norm``: every BatchNorm layer ends there,
SyncBatchNorm in one process too, and so do layers of other libraries that derive from them and go on to an activation
(timm's ``BatchNormAct2d``). Replacing ``forward`` of the layers would lose what such a layer does besides.

Not seen are ``torch.batch_norm`` called directly, a function that was imported by name
(``from torch.nn.functional import batch_norm``), and compiled or scripted layers (`find` refuses these).

The replacement itself holds nothing: it asks the thread that calls, and passes on what nobody takes over. So several
trainers, each in a thread of its own, share one replacement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One training-mode call of ``batch_norm``.

    Attributes:
        input: ``[n, C, ...]``.
        running_mean: ``[C]``, like the rest; None where the layer does not track.
        running_var: None where ``running_mean`` is.
        weight: None where the layer has none.
        bias: None where the layer has none.
        momentum: how far the running statistics move towards these.
        eps: added to the variance.
    """

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


class InForward(Protocol):
    """Takes the batch norms of forwards over."""

    def first(self, call: Call) -> Tensor:
        """Normalises."""
        ...


class InBackward(Protocol):
    """Takes over the batch norms that a checkpoint calls in a backward."""

    def again(self, call: Call) -> Tensor | None:
        """Normalises as in the forward; None where the call is another's."""
        ...


class _Replaced:
    """The replaced function, and how many hold it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders = 0
        self.original: Callable[..., Tensor] = F.batch_norm
        self.in_backward: list[InBackward] = []
        self.here = threading.local()


_TORCHS = F.batch_norm
_replaced = _Replaced()


def torch_batch_norm(
    call: Call, input: Tensor, *, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> Tensor:
    """Torch's own, for another input or with other statistics than those of the call."""
    return _original(input, running_mean, running_var, call.weight, call.bias, training, call.momentum, call.eps)


@contextmanager
def replaced() -> Iterator[None]:
    """While held, the functions below have an effect."""
    with _replaced.lock:
        if _replaced.holders == 0:
            if F.batch_norm is not _batch_norm:  # as it is where somebody else has put it back
                _replaced.original = F.batch_norm
            F.batch_norm = _batch_norm  # pyright: ignore[reportAttributeAccessIssue]
        _replaced.holders += 1
    try:
        yield
    finally:
        with _replaced.lock:
            _replaced.holders -= 1
            if _replaced.holders == 0:
                if F.batch_norm is _batch_norm:  # else somebody has wrapped it, and keeps the wrapper
                    F.batch_norm = _replaced.original  # pyright: ignore[reportAttributeAccessIssue]
                _replaced.original = _TORCHS


@contextmanager
def in_forward(batch_norms: InForward) -> Iterator[None]:
    """While held, calls of this thread are taken over as a forward's."""
    before = getattr(_replaced.here, "batch_norms", None)
    _replaced.here.batch_norms = batch_norms
    try:
        yield
    finally:
        _replaced.here.batch_norms = before


@contextmanager
def in_backward(batch_norms: InBackward) -> Iterator[None]:
    """While held, calls outside of a forward are offered, from whatever thread: the engine's run checkpoints."""
    _replaced.in_backward.append(batch_norms)
    try:
        yield
    finally:
        _replaced.in_backward.remove(batch_norms)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if getattr(_replaced.here, "is_inside", False):
        return _TORCHS(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        call = Call(
            input=input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            momentum=momentum,
            eps=eps,
        )
        forward: InForward | None = getattr(_replaced.here, "batch_norms", None)
        if forward is not None:
            return forward.first(call)
        for batch_norms in reversed(_replaced.in_backward):
            found = batch_norms.again(call)
            if found is not None:
                return found
    return _original(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _original(*args: Any) -> Tensor:
    """What was there before; which may be a wrapper that somebody has put around the replacement meanwhile."""
    _replaced.here.is_inside = True
    try:
        return _replaced.original(*args)
    finally:
        _replaced.here.is_inside = False
