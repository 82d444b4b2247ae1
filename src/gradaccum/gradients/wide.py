"""Sums in more precision than the parameters have: ``accumulate_dtype=torch.float32`` for bf16 and fp16 models.

A sum of K gradients kept in bf16 is rounded K times: 2% of the gradient is lost at 256 micro-batches and 10% at 1,024.
Kept in fp32 it is rounded once, when the optimizer takes it, which is what the whole batch's own gradient suffers.

For a window, ``Tensor.grad_dtype`` (torch 2.10) lets the backward add up in fp32; normalising, clipping, unscaling and
the finite check work on that. AdamW and others refuse such a gradient in all their implementations, so right before
the step it becomes one of the parameter's dtype, one parameter after the other: the copy that is there at the same
time is of one parameter, not of the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gradaccum.errors import ParameterError, UnsupportedError
from gradaccum.types import HALF_DTYPES


def checked_accumulate_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The option ``accumulate_dtype``.

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


class WideSums:
    """Makes the gradients of parameters of low precision add up in fp32, for one window after another.

    Args:
        parameters: of any dtype.
        dtype: what to add up in.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = list(parameters)
        self._dtype = dtype
        self._begun: list[tuple[nn.Parameter, torch.dtype | None]] = []

    def begin(self) -> None:
        """From now on; no parameter has a gradient."""
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
        """Leaves the parameters as they were; they have no gradient any more."""
        for parameter, before in self._begun:
            parameter.grad_dtype = before
        self._begun = []
