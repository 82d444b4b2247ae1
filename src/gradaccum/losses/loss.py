"""A loss that knows what its mean was taken over.

A mean over ``n`` items is the pair *(total, n)*. Micro-batches add up only as pairs:

    loss of the batch = (total_1 + total_2 + ...) / (n_1 + n_2 + ...)

which differs from the mean of the means as soon as the counts do.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import register_pytree_node

from gradaccum.errors import LossError, MisuseError
from gradaccum.types import HALF_DTYPES

Weight = float | int | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """A 0-d loss and what it was averaged over; made by `Loss.mean` or `Loss.sum`.

    It keeps the tensor as the user's code made it, which costs no graph node: the backward is seeded with the weight.

    Attributes:
        root: 0-d tensor that carries the graph: the mean if ``is_mean``, else the sum.
        weight: number of items (samples, tokens, sum of class weights): a number or a 0-d tensor; None for a
            sum that is not to be divided by anything.
        is_mean: whether ``root`` has already been divided by ``weight``.
        ignored: labels and the label whose items add nothing, neither to ``root`` nor to ``weight``, where
            ``ga.criterion`` made the loss and knows them. What is computed from a loss does not have it any more.

    Example:
        >>> losses = torch.tensor([1.0, 2.0, 6.0])
        >>> ga.Loss.mean(losses.mean(), over=3).total
        tensor(9.)
        >>> loss = ga.Loss.sum(losses.sum(), over=3)
        >>> print(loss, f"{0.5 * loss:.2f}", (loss + loss).item())
        Loss(3, over=3) 1.50 6.0
    """

    root: Tensor
    weight: Weight | None
    is_mean: bool
    ignored: tuple[Tensor, int] | None = None

    @staticmethod
    def mean(value: Tensor, over: Weight) -> Loss:
        """A mean over ``over`` items.

        Args:
            value: 0-d tensor, a mean.
            over: how many items it is a mean of: int, float or 0-d tensor, not negative. Where this is 0 the
                micro-batch adds nothing, even if ``value`` is the NaN of 0 / 0.

        Raises:
            LossError: ``value`` is not a 0-d floating tensor, or ``over`` is not a count.
        """
        return Loss(_checked_root(value, name="ga.Loss.mean"), checked_weight(over, name="ga.Loss.mean"), is_mean=True)

    @staticmethod
    def sum(value: Tensor, over: Weight | None = None) -> Loss:
        """A sum that is still to be divided by ``over``; without ``over`` it stays a sum.

        Args:
            value: 0-d tensor, a sum.
            over: the number of items the mean will be taken over (int, float or 0-d tensor, not negative), or None.

        Raises:
            LossError: ``value`` is not a 0-d floating tensor, or ``over`` is not a count.
        """
        weight = None if over is None else checked_weight(over, name="ga.Loss.sum")
        return Loss(_checked_root(value, name="ga.Loss.sum"), weight, is_mean=False)

    @property
    def value(self) -> Tensor:
        """0-d tensor: the mean, or the sum where there is nothing to divide by."""
        return self.root if self.is_mean or self.weight is None else self.root / self.weight

    @property
    def total(self) -> Tensor:
        """0-d tensor: the sum over the items; zero, not NaN, where there are none."""
        if not self.is_mean or self.weight is None:
            return self.root
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight == 0, torch.zeros_like(self.root), self.root * self.weight)
        return self.root * self.weight if self.weight != 0 else torch.zeros_like(self.root)

    def item(self) -> float:
        """The value as a number, as people log it; waits for the device."""
        return self.value.item()

    def detach(self) -> Tensor:
        """The value without its graph, 0-d."""
        return self.value.detach()

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self) -> str:
        if self.weight is None:
            return f"Loss({self.item():.6g}, a sum)"
        return f"Loss({self.item():.6g}, over={self.weight:g})"

    def __mul__(self, factor: float | Tensor) -> Loss:
        if isinstance(factor, Loss) or not isinstance(factor, (int, float, Tensor)):
            return NotImplemented
        return Loss(self.root * factor, self.weight, self.is_mean)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Loss:
        if isinstance(divisor, Loss) or not isinstance(divisor, (int, float, Tensor)):
            return NotImplemented
        return Loss(self.root / divisor, self.weight, self.is_mean)

    def __neg__(self) -> Loss:
        return Loss(-self.root, self.weight, self.is_mean)

    def __add__(self, other: Loss) -> Loss:
        if isinstance(other, (int, float)) and other == 0:  # where sum() of a list begins
            return self
        if not isinstance(other, Loss):
            raise LossError(
                f"A ga.Loss and a {type(other).__name__} do not add up: it is not said what the other was a mean over, "
                "so its share of the gradient is unknown. Say it: loss + ga.Loss.mean(other, over=n)."
            )
        if not _is_same_weight(self.weight, other.weight):
            raise LossError(
                f"The losses are over different things, {self.weight} and {other.weight}, and each is divided by its "
                'own total, so their sum has no single weight. Return them by name: {"first": loss, "second": other}, '
                "and pass weights=, which counts both."
            )
        if self.is_mean == other.is_mean:
            return Loss(self.root + other.root, self.weight, self.is_mean)
        return Loss(self.total + other.total, self.weight, is_mean=False)

    __radd__ = __add__

    def __sub__(self, other: Loss) -> Loss:
        return self + -other

    def backward(self, *_: Any, **__: Any) -> None:
        """Raises an error: the loss is weighed in its backward, so it is not for the user to run.

        Raises:
            MisuseError: always.
        """
        raise MisuseError(
            "loss.backward() was called on a ga.Loss, whose share of the batch only the accumulator knows; unweighted, "
            "its gradient would be that of this micro-batch. Write accumulator.backward(loss), or return the loss from "
            "TrainStep's loss_fn. Outside of training: loss.value.backward()."
        )


# A model may return its loss from its forward. FSDP2, and fillers for it, look there for the tensors that a backward
# starts from, inside of what torch knows as containers.
register_pytree_node(
    Loss,
    lambda loss: ([loss.root], (loss.weight, loss.is_mean)),
    lambda roots, rest: Loss(*roots, *rest),
)


def _is_same_weight(one: Weight | None, other: Weight | None) -> bool:
    """Whether two losses are over as many items; counts on a device are waited for, unless they are one tensor."""
    if one is None or other is None or one is other:
        return one is other
    return bool(one == other)


def _checked_root(value: Any, *, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise LossError(
            f"{name} needs a 0-d tensor and got {type(value).__name__}. A number has no graph, so it would add "
            "nothing to the gradient. Pass the loss tensor itself, before .item()."
        )
    if value.dim() != 0:
        raise LossError(
            f"{name} needs a 0-d tensor and got one of shape {tuple(value.shape)}. A loss for each element has "
            "no gradient yet. Reduce it: ga.Loss.sum(losses.sum(), over=losses.numel())."
        )
    if not value.is_floating_point():
        raise LossError(
            f"{name} needs a floating-point tensor and got {value.dtype}, which has no gradient. "
            "Convert before the loss is computed, not after."
        )
    return value


def checked_weight(over: Any, *, name: str) -> Weight:
    """A user's count, which a mean is taken over; a tensor is detached.

    Raises:
        LossError: it is not one finite number that is at least 0, or its dtype is too small for it. Counts on a device
            are not looked at here.
    """
    if isinstance(over, Tensor):
        if over.dim() != 0:
            raise LossError(
                f"{name} got a tensor of shape {tuple(over.shape)} as the count; it must be one number, or each item "
                "would get a weight of its own. Sum it first: over=mask.sum()."
            )
        weight = over.detach()
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(weight, FakeTensor):
            return weight  # nothing waits for a device, or breaks a graph, to be checked
        number = weight.item()
    elif isinstance(over, numbers.Real) and not isinstance(over, bool):
        number = weight = over if isinstance(over, (int, float)) else float(over)
    else:
        raise LossError(
            f"{name} got {type(over).__name__} as the count; it must be an int, a float or a 0-d tensor. It is what "
            "the mean is taken over: the number of samples or tokens, or the sum of class weights."
        )
    if not 0 <= number < math.inf:
        raise LossError(
            f"{name} got {number} as the count; a mean is taken over a finite number of items, at least 0. A negative "
            "or infinite weight would reverse the gradient or erase it."
        )
    refuse_inexact(over, number, name=name)
    return weight


def refuse_inexact(over: Any, number: float, *, name: str) -> None:
    """Refuses a count of a dtype that does not hold all whole numbers up to it.

    Raises:
        LossError: it is of 16 bits, and above 256 (bf16) or 2,048 (fp16).
    """
    if not isinstance(over, Tensor) or over.dtype not in HALF_DTYPES:
        return
    exact = 2 / torch.finfo(over.dtype).eps
    if number > exact:
        raise LossError(
            f"{name} got the count {number:g} in {over.dtype}, which holds whole numbers only up to {exact:g}: 1,001 "
            f"tokens are {torch.tensor(1001.0, dtype=over.dtype).item():g} there, and 3,001 are "
            f"{torch.tensor(3001.0, dtype=over.dtype).item():g}. The micro-batch's share of the gradient would be off "
            "by as much. Count in whole numbers: over=mask.sum(dtype=torch.long), or mask.float().sum()."
        )
