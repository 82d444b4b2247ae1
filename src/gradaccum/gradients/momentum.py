"""Gradients that add up in SGD's momentum buffers: ``accumulate_into="momentum"``, no gradient memory at all.

`torch.optim.SGD` makes of the window's gradient  g = sum_b g_b  (each g_b with its share of the whole already)

    b <- mu b + (g + wd p)          the momentum buffer
    p <- p - lr b

The first line is a sum as well, so it can be made piece by piece. A parameter's first gradient of a window is folded
into its buffer,  b <- mu b + wd p + g_1,  and from then on the buffer is its ``.grad`` until the window closes: the
engine, and products that are added in place, add to it like to any gradient. Then the optimizer's own step runs with
``.grad`` = b and its groups' momentum and weight decay at 0, which is the second line; so step hooks, schedules,
foreach and fused implementations are kept. What is alive besides the buffers is the gradient that the backward has just
made, of one layer.

A parameter without a gradient in the window is left alone, as by torch. Hence everything happens when its first
gradient is there: by a hook for what the engine makes (`MomentumSums.begin`), right before the first product for what
is added in place (`MomentumSums.prepare`).

The sum cannot be divided afterwards, since  mu b + wd p  would be divided too: a window's total weight has to be known
before its first backward. Nor can it be taken back. If a window is discarded, or its gradient is not finite, momentum
is lost; how much, and that it is logged, is said in `MomentumSums.skip` and `MomentumSums.end`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import LossError, MisuseError, ParameterError, UnsupportedError

logger = logging.getLogger("gradaccum")


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """That gradients can add up in the momentum buffers of all of these.

    Raises:
        ParameterError: they cannot.
    """
    for optimizer in optimizers:
        if type(optimizer) is not torch.optim.SGD:
            raise ParameterError(
                f'accumulate_into="momentum" with {type(optimizer).__name__}: only in torch.optim.SGD is the momentum '
                "buffer a plain sum of gradients. Elsewhere the update would be another one. Pass torch.optim.SGD("
                '..., momentum=0.9), or accumulate_into="grad".'
            )
    check_groups(optimizers)


def check_groups(optimizers: Iterable[Optimizer]) -> None:
    """The part of it that may change while training."""
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            for name, right in (("dampening", 0), ("nesterov", False), ("maximize", False), ("differentiable", False)):
                if group[name] != right:
                    raise ParameterError(
                        f'accumulate_into="momentum" with {name}={group[name]} in parameter group {index}: the update '
                        f"needs the gradient by itself, and it is in the momentum by then. Pass {name}={right}, or "
                        'accumulate_into="grad".'
                    )
            if group["momentum"] == 0:
                raise ParameterError(
                    f'accumulate_into="momentum" with momentum=0 in parameter group {index}: there is no buffer that '
                    "gradients could be added to. Pass torch.optim.SGD(..., momentum=0.9), or "
                    'accumulate_into="grad".'
                )
            if any(parameter.is_complex() for parameter in group["params"]):
                raise ParameterError(
                    f'accumulate_into="momentum" with complex parameters in group {index}: that was never shown to be '
                    'the whole batch\'s update. Pass accumulate_into="grad".'
                )


def check_rest(*, clip_norm: float | None, has_scaler: bool, has_ranks: bool) -> None:
    """That nothing else needs the gradient by itself.

    Raises:
        UnsupportedError: something does.
    """
    for is_there, what, why, instead in (
        (
            clip_norm is not None,
            f"clip_norm={clip_norm}",
            "the norm of the gradient is not known: what is there is the sum of momentum and gradient, and clipping "
            "would scale both",
            "Leave clip_norm= out",
        ),
        (has_scaler, "a GradScaler", "unscaling would divide the momentum by the loss scale, too", "Train in bf16"),
        (
            has_ranks,
            "several processes",
            "adding up over the processes would count the momentum once for each",
            'Pass sync="never" if each trains for itself',
        ),
    ):
        if is_there:
            raise UnsupportedError(
                f'accumulate_into="momentum" with {what}: {why}. {instead}, or pass accumulate_into="grad".'
            )


def check_own_loop(*, has_weights: bool, tail: str) -> None:
    """That in a loop of the user's the total of a window is known ahead, and no window is thrown away.

    Raises:
        LossError: the total is not known.
        UnsupportedError: windows are thrown away.
    """
    if not has_weights:
        raise LossError(
            'accumulate_into="momentum" without weights=: the total weight of a window has to be known before its '
            "first backward, since a sum in the momentum buffer cannot be divided afterwards. Say what the loss is a "
            "mean over: weights=lambda micro_batch: len(micro_batch[0])."
        )
    if tail == "drop":
        raise UnsupportedError(
            'accumulate_into="momentum" with tail="drop": the gradients of an incomplete window are in the momentum '
            'by the time it is thrown away, so each pass would end with momentum reset. Pass tail="step".'
        )


def check_whole_batch(*, micro_batch_size: int | None, has_batch_loss: bool, kept_graphs: int | None) -> None:
    """That no batch is run again after it ran out of memory.

    Raises:
        UnsupportedError: it would be.
    """
    again = 'micro_batch_size="auto"' if micro_batch_size is None else None
    instead = "micro_batch_size= as a number"
    if again is None and has_batch_loss and kept_graphs != 0:
        again, instead = f"batch_loss= and kept_graphs={kept_graphs}", "kept_graphs=0"
    if again is not None:
        raise UnsupportedError(
            f'accumulate_into="momentum" with {again}: a batch that runs out of memory is run again, and what it had '
            f"added to the momentum before cannot be taken out, so it would count twice. Pass {instead}, or "
            'accumulate_into="grad".'
        )


class MomentumSums:
    """Makes momentum buffers the gradients of one window after another.

    Args:
        optimizers: all those whose parameters are trained.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._homes: dict[nn.Parameter, tuple[Optimizer, dict[str, Any]]] = {}
        self._handles: list[Any] = []
        self._folded: dict[nn.Parameter, Tensor] = {}
        self.is_open = False

    def begin(self) -> None:
        """From now on, until `end`; no parameter has a gradient.

        Raises:
            ParameterError: an optimizer's options have changed since, to what cannot be done.
        """
        self._let_go()
        check_groups(self._optimizers)  # whose class is another inside a pass, see guards
        self._homes = {
            parameter: (optimizer, group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._fold)
            for parameter in self._homes
            if parameter.requires_grad
        ]
        self.is_open = True

    def prepare(self, parameter: nn.Parameter) -> None:
        """Right before a product is added to ``parameter.grad`` in place: makes it the buffer."""
        if not self.is_open or parameter not in self._homes or parameter.grad is not None:
            return
        buffer = self._decayed(parameter)
        if buffer is None:
            buffer = torch.zeros_like(parameter, requires_grad=False)
            self._decay_weight(parameter, buffer)
        self._keep(parameter, buffer)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """While held, the optimizers' own steps are  p <- p - lr b;  afterwards no parameter has a gradient."""
        if not self.is_open:
            yield
            return
        for parameter in self._homes:  # also one that was unfrozen inside the window, and has no hook
            self._fold(parameter)
        before = [
            (group, {name: group[name] for name in ("momentum", "weight_decay")})
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        try:
            for group, _ in before:
                group.update(momentum=0, weight_decay=0)
            yield
        finally:
            for group, values in before:
                group.update(values)
        for parameter in self._folded:
            parameter.grad = None
        self._folded = {}

    def skip(self) -> None:
        """There is no step, as the gradient is not finite. Buffers that are not finite are reset.

        The others keep what was added to them: their parameters were decayed and given this window's gradient in the
        momentum, and were not moved by it.
        """
        lost = [parameter for parameter, buffer in self._folded.items() if not bool(torch.isfinite(buffer).all())]
        self._reset(lost, "their gradient is not finite")
        self._folded = {}

    def end(self) -> None:
        """The window is over. Buffers that something was added to, and no step was made with, are reset."""
        if self.is_open:
            self._reset(list(self._folded), "the window was discarded")
            self._folded = {}
        self._let_go()

    def _fold(self, parameter: nn.Parameter) -> None:
        """What a parameter has as ``.grad`` goes into its buffer, which becomes its ``.grad``; nothing if it is."""
        gradient = parameter.grad
        buffer = self._folded.get(parameter)
        if gradient is buffer:
            return
        if gradient is None or buffer is not None:
            raise MisuseError(
                f"The gradient of a parameter of shape {tuple(parameter.shape)} was replaced inside a window. It is "
                "the momentum buffer that the window adds up in, and what was in it would be lost. Inside a window "
                'leave .grad alone, or pass accumulate_into="grad".'
            )
        if gradient.is_sparse:
            raise UnsupportedError(
                f'accumulate_into="momentum" with a sparse gradient, of a parameter of shape {tuple(parameter.shape)}: '
                "a buffer that sparse gradients are added to is no sparse gradient any more. Make the embedding with "
                'sparse=False, or pass accumulate_into="grad".'
            )
        buffer = self._decayed(parameter)
        if buffer is not None:
            buffer.add_(gradient)
        else:
            # A copy once in a training, as torch's SGD makes one: the memory may be a replayed CUDA graph's.
            buffer = gradient.detach().clone()
            self._decay_weight(parameter, buffer)
        self._keep(parameter, buffer)

    def _decayed(self, parameter: nn.Parameter) -> Tensor | None:
        """The buffer made  mu b + wd p,  in place; None before the first update."""
        optimizer, group = self._homes[parameter]
        # Not optimizer.state[parameter], which would make an entry.
        buffer: Tensor | None = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            self._folded[parameter] = buffer  # from here on it is not what it was, also if the next line fails
            buffer.mul_(group["momentum"])
            self._decay_weight(parameter, buffer)
        return buffer

    def _decay_weight(self, parameter: nn.Parameter, buffer: Tensor) -> None:
        weight_decay = self._homes[parameter][1]["weight_decay"]
        if weight_decay != 0:
            buffer.add_(parameter.detach(), alpha=weight_decay)

    def _keep(self, parameter: nn.Parameter, buffer: Tensor) -> None:
        self._folded[parameter] = buffer
        self._homes[parameter][0].state[parameter]["momentum_buffer"] = buffer
        parameter.grad = buffer

    def _reset(self, parameters: Sequence[nn.Parameter], why: str) -> None:
        for parameter in parameters:
            state = self._homes[parameter][0].state
            state.get(parameter, {}).pop("momentum_buffer", None)
            if not state.get(parameter):
                state.pop(parameter, None)
        if parameters:
            logger.warning(
                "the momentum of %d of %d parameters was reset, as before their first update: %s, and it had been "
                "added to the momentum",
                len(parameters),
                len(self._homes),
                why,
            )

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.is_open = False
