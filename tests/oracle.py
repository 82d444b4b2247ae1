"""The whole batch in float64 by plain torch: slow, obviously right, and what every path of the library is held against.

Both sides leave a list of `Made`, one for each update, and `assert_same` compares them: gradients first, since
parameters after Adam or clipping hide a constant factor.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum import Accumulator, TrainStep, Update
from tasks import Batch, pieces

Gradients = dict[str, Tensor | None]

# Of the largest component of what is compared. A component of a gradient adds up fewer than 1,000 numbers no larger
# than some ten times that scale, each off by 2**-53 = 1.1e-16, and both sides add in an order of their own: 2 * 1,000 *
# 1.1e-16 would be the worst, and errors of random sign leave a hundredth of it.
EXACT = 1e-12
# The same sum in fp32 (2**-24 = 6e-8), against float64.
SINGLE = 1e-5

RAGGED = [3, 1, 5, 4]
ROWS = sum(RAGGED)  # 13, a prime: no micro-batch size above 1 divides it


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """What one update did.

    Attributes:
        gradients: as the optimizer got them: normalised and clipped; empty for an update that was skipped.
        unclipped: before clipping; the oracle's only.
        parameters: after the update.
        loss: the whole batch's.
        grad_norm: before clipping; None where it was not asked for.
        rate: learning rate of the first group, after the scheduler.
    """

    gradients: Gradients
    unclipped: Gradients = field(default_factory=dict)
    parameters: dict[str, Tensor]
    loss: float
    grad_norm: float | None
    rate: float
    is_skipped: bool


def whole_batches(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    clip_norm: float | None = None,
    scheduler: Any = None,
) -> list[Made]:
    """Trains as one would with memory for the whole batch: one forward, one backward, one step.

    A batch with nothing to learn from (a mean over nothing is 0 / 0) or without a finite gradient makes no update.
    """
    made: list[Made] = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        unclipped = gradients_of(model)
        norm = _clip(model, math.inf if clip_norm is None else clip_norm)
        gradients = gradients_of(model)
        is_skipped = math.isnan(value.item()) or not math.isfinite(norm)
        if not is_skipped:
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        made.append(
            Made(
                gradients={} if is_skipped else gradients,
                unclipped=unclipped,
                parameters=parameters_of(model),
                loss=value.item(),
                grad_norm=norm.item(),
                rate=optimizer.param_groups[0]["lr"],
                is_skipped=is_skipped,
            )
        )
    optimizer.zero_grad()
    return made


def _clip(model: nn.Module, clip_norm: float) -> Tensor:
    if not any(parameter.grad is not None and parameter.grad.is_sparse for parameter in model.parameters()):
        return nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    # torch cannot clip sparse gradients
    dense = [gradient for gradient in gradients_of(model).values() if gradient is not None]
    norm = torch.cat([gradient.flatten() for gradient in dense]).norm()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
    return norm


def own_loop(
    accumulator: Accumulator,
    model: nn.Module,
    optimizer: Optimizer,
    passes: Iterable[Iterable[Any]],
    loss: Callable[[nn.Module, Any], Any],
) -> tuple[list[Made], list[Update]]:
    """Trains with the library, in the loop of the README; a window that the last pass leaves to carry is flushed."""

    def updates() -> Iterator[Update | None]:
        for one_pass in passes:
            for micro_batch in accumulator.over(one_pass):
                yield accumulator.backward(loss(model, micro_batch))
        yield accumulator.flush()

    return _noted(updates(), model, optimizer)


def whole_in_hand(
    train_step: TrainStep, model: nn.Module, optimizer: Optimizer, batches: Iterable[Any]
) -> tuple[list[Made], list[Update]]:
    """Trains with the library, handing it whole batches."""
    return _noted(map(train_step, batches), model, optimizer)


def _noted(updates: Iterable[Update | None], model: nn.Module, optimizer: Optimizer) -> tuple[list[Made], list[Update]]:
    made: list[Made] = []
    given: list[Update] = []
    with seen_by(optimizer, model) as seen:
        for update in updates:
            if update:
                given.append(update)
                made.append(_made(update, seen, model, optimizer))
    return made, given


def by_own_loop(
    model: nn.Module, optimizer: Optimizer, batches: list[Batch], loss: Callable[[nn.Module, Any], Any], **options: Any
) -> list[Made]:
    """Each batch of 13 rows as ragged micro-batches."""
    accumulator = Accumulator(model, optimizer, micro_batches=len(RAGGED), **options)
    micro_batches = [piece for batch in batches for piece in pieces(batch, RAGGED)]
    return own_loop(accumulator, model, optimizer, [micro_batches], loss)[0]


def by_train_step(
    model: nn.Module, optimizer: Optimizer, batches: list[Batch], loss: Callable[[nn.Module, Any], Any], **options: Any
) -> list[Made]:
    """Each batch in one call."""
    train_step = TrainStep(model, optimizer, loss, micro_batch_size=4, **options)
    return whole_in_hand(train_step, model, optimizer, batches)[0]


WAYS: dict[str, Callable[..., list[Made]]] = {"own loop": by_own_loop, "whole batch in hand": by_train_step}


@contextmanager
def seen_by(optimizer: Optimizer, model: nn.Module) -> Iterator[list[Gradients]]:
    """Collects the gradients that the optimizer finds at each of its steps."""
    seen: list[Gradients] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    try:
        yield seen
    finally:
        handle.remove()


def _made(update: Update, seen: list[Gradients], model: nn.Module, optimizer: Optimizer) -> Made:
    gradients = {} if update.skipped else seen[-1]
    seen.clear()
    return Made(
        gradients=gradients,
        parameters=parameters_of(model),
        loss=update.loss.item(),
        grad_norm=None if update.grad_norm is None else update.grad_norm.item(),
        rate=optimizer.param_groups[0]["lr"],
        is_skipped=update.skipped,
    )


def gradients_of(model: nn.Module) -> Gradients:
    """A copy of each parameter's gradient by name, dense; None where it has none."""
    return {
        name: None if parameter.grad is None else parameter.grad.detach().to_dense().clone()
        for name, parameter in model.named_parameters()
    }


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def doubled(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def assert_same(made: Sequence[Made], expected: Sequence[Made], *, tolerance: float = EXACT) -> None:
    """Each update is the whole batch's: gradients, parameters, loss, norm, learning rate, and whether there was one."""
    assert len(made) == len(expected), f"{len(made)} updates instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(made, expected, strict=True), start=1):
        where = f"update {index}: "
        assert one.is_skipped == other.is_skipped, f"{where}skipped={one.is_skipped} instead of {other.is_skipped}"
        assert_same_gradients(one.gradients, other.gradients, tolerance=tolerance, where=where)
        assert_same_gradients(one.parameters, other.parameters, tolerance=tolerance, where=f"{where}parameter ")
        assert_same_number(one.loss, other.loss, tolerance=tolerance, where=f"{where}loss")
        if one.grad_norm is not None and not other.is_skipped:
            assert_same_number(one.grad_norm, other.grad_norm, tolerance=tolerance, where=f"{where}grad_norm")
        assert one.rate == other.rate, f"{where}learning rate {one.rate} instead of {other.rate}"


def assert_same_gradients(
    made: Gradients | dict[str, Tensor],
    expected: Gradients | dict[str, Tensor],
    *,
    tolerance: float = EXACT,
    where: str = "",
) -> None:
    """The same names, None in the same places, and no component further apart than ``tolerance`` of the largest."""
    assert made.keys() == expected.keys(), f"{where}{sorted(made)} instead of {sorted(expected)}"
    present = [value for value in expected.values() if value is not None and value.numel()]
    scale = max((value.abs().max().item() for value in present), default=0.0)
    for name, right in expected.items():
        left = made[name]
        assert (left is None) == (right is None), f"{where}{name} is {left} instead of {right}"
        if left is None or right is None or not right.numel():
            continue
        difference = (left.to(right.dtype) - right).abs().max().item()
        # Written so that a NaN fails.
        assert difference <= tolerance * scale, f"{where}{name} is off by {difference:.2e} at a scale of {scale:.2e}"


def assert_same_number(made: float, expected: float | None, *, tolerance: float = EXACT, where: str = "") -> None:
    """Equal but for ``tolerance`` of its size; NaN equals NaN."""
    assert expected is not None, f"{where} is {made} instead of None"
    both_nan = math.isnan(made) and math.isnan(expected)
    assert both_nan or abs(made - expected) <= tolerance * max(abs(expected), 1.0), f"{where} {made} is not {expected}"
