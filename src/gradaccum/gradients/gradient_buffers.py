"""What gradients are added up in, other than what torch gives them: fp32 sums, and buffers that stay.

**In fp32** (``accumulate_dtype=torch.float32``, for bf16 and fp16 parameters). A sum of K gradients kept in bf16 is
rounded K times: 2% of the gradient is lost at 256 micro-batches and 10% at 1,024. Kept in fp32 it is rounded once, when
the optimizer takes it, which is what the whole batch's own gradient suffers. For a window, ``Tensor.grad_dtype`` (torch
2.10) lets the backward add up in fp32; normalising, clipping, unscaling and the finite check work on that. AdamW and
others refuse such a gradient in all their implementations, so right before the step each becomes one of the
parameter's dtype, one parameter after the other: the copy that exists at the same time is of one parameter.

**In buffers that stay** (``persistent_gradients=True``). A replayed CUDA graph (``mode="reduce-overhead"``,
``torch.cuda.make_graphed_callables``) returns gradients in memory that the next replay overwrites. Torch's
``AccumulateGrad`` takes the first gradient it gets as ``.grad``, without a copy, if nobody else holds it: the second
micro-batch then overwrites the first one's gradient and is added to itself, in silence (pytorch issues 96693, 181723;
``torch/csrc/autograd/functions/accumulate_grad.h``). With a ``.grad`` that is there before the first backward, torch
always adds in place; so each parameter starts a window with a buffer of zeros, the same one in every window. The cost
is writing zeros once a window (4 bytes a parameter in fp32), and that the first gradient is added instead of taken.
A parameter that got no gradient must have none when the optimizer steps, or weight decay and momentum would move it;
the buffers' version counters, which every addition in place moves, tell which those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import ParameterError, UnsupportedError
from gradaccum.gradients.fused.product import accumulate_dtype_of
from gradaccum.types import HALF_DTYPES


def checked_accumulate_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Checks the option ``accumulate_dtype``.

    Raises:
        ParameterError: it is neither None nor ``torch.float32``.
        UnsupportedError: this torch has no gradients of another dtype than the parameter's.
    """
    if dtype is None:
        return None
    if dtype is not torch.float32:
        raise ParameterError(
            f"accumulate_dtype={dtype!r}: gradients of bf16 and fp16 parameters are added up in torch.float32 or, with "
            "None, in their own dtype, which loses 2% of the gradient at 256 micro-batches. Parameters of other dtypes "
            "keep theirs either way."
        )
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise UnsupportedError(
            f"accumulate_dtype= needs Tensor.grad_dtype, which torch {torch.__version__} does not have. Use torch 2.11 "
            "or newer, or fp32 parameters under autocast, whose gradients are added up in fp32 anyway."
        )
    return dtype


def check_persistent(optimizers: Sequence[Optimizer], *, has_ranks: bool) -> None:
    """Checks that the gradients of these optimizers can be in buffers that stay.

    Raises:
        ParameterError: an optimizer takes sparse gradients only.
        UnsupportedError: several processes exchange gradients.
    """
    if any(isinstance(optimizer, torch.optim.SparseAdam) for optimizer in optimizers):
        raise ParameterError(
            "persistent_gradients=True with SparseAdam: sparse gradients are added to a buffer that is dense, which "
            "SparseAdam does not take. Pass persistent_gradients=False."
        )
    if has_ranks:
        raise UnsupportedError(
            "persistent_gradients=True with several processes: these put gradients into memory of their own when they "
            "add them up, and that was never shown to be right together. Pass persistent_gradients=False, or "
            'sync="never" if each process trains for itself.'
        )


class WideGradients:
    """Gradients of bf16 and fp16 parameters that add up in another dtype, for one window after another."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = list(parameters)
        self._dtype = dtype
        self._begun: list[tuple[nn.Parameter, torch.dtype | None]] = []

    def begin(self) -> None:
        """Sets the dtype of the gradients to come; no parameter has one yet."""
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.dtype in HALF_DTYPES and parameter.grad_dtype != self._dtype:
                before = parameter.grad_dtype
                # What follows the parameter's dtype, as by default, cannot be set again: a fixed dtype would stay what
                # it is when the model is converted. None takes what comes, which is of the parameter's dtype.
                self._begun.append((parameter, None if before == parameter.dtype else before))
                parameter.grad_dtype = self._dtype

    def narrow(self) -> None:
        """Gives each parameter its gradient in its own dtype, which is what optimizers take."""
        for parameter, before in self._begun:
            wide = parameter.grad
            parameter.grad = None
            parameter.grad_dtype = before
            if wide is not None:
                parameter.grad = wide.to(parameter.dtype)
            del wide  # before the next one is made
        self._begun = []

    def end(self) -> None:
        """Resets the dtypes of parameters that have no gradient any more."""
        self.narrow()


class PersistentGradients:
    """Gradients in the same memory in one window after another; a frozen parameter gets its memory once unfrozen."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._begun: dict[nn.Parameter, tuple[Tensor, int]] = {}

    def begin(self, *, keeps: bool = True) -> None:
        """Gives each trainable parameter a gradient of zeros; none has one yet.

        With ``keeps=False`` it is in new memory, which belongs to the user afterwards.
        """
        buffers = {
            parameter: self._buffer(parameter, keeps=keeps) for parameter in self._parameters if parameter.requires_grad
        }
        for parameter, buffer in buffers.items():
            parameter.grad = buffer
        if keeps:
            self._kept = buffers
        self._begun = {parameter: (buffer, buffer._version) for parameter, buffer in buffers.items()}

    def is_untouched(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter's gradient is only the zeros that it began with."""
        begun = self._begun.get(parameter)
        return begun is not None and parameter.grad is begun[0] and begun[0]._version == begun[1]

    def end(self) -> None:
        """Ends the window; the buffers stay for the next one."""
        self._begun = {}

    def _buffer(self, parameter: nn.Parameter, *, keeps: bool) -> Tensor:
        dtype = accumulate_dtype_of(parameter)
        kept = self._kept.get(parameter) if keeps else None
        # The model may have been converted or moved since.
        if kept is None or (kept.dtype, kept.device, kept.shape) != (dtype, parameter.device, parameter.shape):
            return torch.zeros_like(parameter, requires_grad=False, dtype=dtype)
        return kept.zero_()
