"""Gradients in buffers that stay from window to window: ``persistent_gradients=True``.

A replayed CUDA graph (``torch.compile(mode="reduce-overhead")``, ``torch.cuda.make_graphed_callables``) returns
gradients in memory of the graph, which the next replay overwrites. Torch's ``AccumulateGrad`` takes the first gradient
that it gets as ``.grad``, without a copy, if nobody else holds it: so the second micro-batch overwrites the first one's
gradient and is then added to itself, and nothing tells (pytorch issues 96693 and 181723;
``torch/csrc/autograd/functions/accumulate_grad.h``).

With a ``.grad`` that is there before the first backward, torch adds to it in place, always. That is all that is done
here: at a window's start each parameter gets a buffer of zeros, the same one in every window.

A parameter that got no gradient must have none when the optimizer steps, or weight decay and momentum would move it.
Which those are, tell the buffers' version counters, which every addition in place moves.

The cost is one pass that writes zeros once a window, 4 bytes a parameter in fp32, and that the first gradient is read,
added and written, where torch would take it as it is. Products that are added in place could write the first time
(beta = 0) instead; that they add to zeros is the price of one rule for all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import ParameterError, UnsupportedError
from gradaccum.gradients.fused.product import accumulate_dtype_of


def check_persistent(optimizers: Sequence[Optimizer], *, has_ranks: bool) -> None:
    """That the gradients of these optimizers can be in buffers that stay.

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


class PersistentGradients:
    """The ``.grad`` of parameters, in the same memory in one window after another.

    Args:
        parameters: frozen ones too; these get memory when they are unfrozen.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._begun: dict[nn.Parameter, tuple[Tensor, int]] = {}

    def begin(self, *, keeps: bool = True) -> None:
        """Gives each trainable parameter a gradient of zeros; none has one yet.

        Args:
            keeps: whether in the memory that stays; if not, in new memory, which is the user's afterwards.
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
        """The window is over."""
        self._begun = {}

    def _buffer(self, parameter: nn.Parameter, *, keeps: bool) -> Tensor:
        dtype = accumulate_dtype_of(parameter)
        kept = self._kept.get(parameter) if keeps else None
        # The model may have been converted or moved since.
        if kept is None or (kept.dtype, kept.device, kept.shape) != (dtype, parameter.device, parameter.shape):
            return torch.zeros_like(parameter, requires_grad=False, dtype=dtype)
        return kept.zero_()
