"""Memory that runs out on purpose: layers that raise what torch raises, and a clock for how long a piece took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


def torch_error() -> BaseException:
    return torch.OutOfMemoryError(TEXT)


@dataclass(eq=False)
class Memory:
    """What fits: at most ``limit`` of whatever is asked for; ``countdown`` lets so many pieces pass and fails the next.

    Attributes:
        failures: how often it ran out.
    """

    limit: float = float("inf")
    countdown: int | None = None
    error: Callable[[], BaseException] = torch_error
    failures: int = 0

    def take(self, amount: int) -> None:
        """Raises where this does not fit."""
        is_due = False
        if self.countdown is not None:
            self.countdown -= 1
            is_due = self.countdown < 0
        if is_due or amount > self.limit:
            self.countdown = None
            self.failures += 1
            raise self.error()


class Scarce(nn.Module):
    """Does nothing, and takes as much memory as its input has rows (or elements): in its forward or in its backward."""

    def __init__(self, memory: Memory, *, where: str = "forward", counts: str = "rows") -> None:
        super().__init__()
        self.memory, self.where, self.counts = memory, where, counts

    def forward(self, x: Tensor) -> Tensor:
        amount = len(x) if self.counts == "rows" else x.numel()
        if self.where == "forward":
            self.memory.take(amount)
        elif x.requires_grad:
            x.register_hook(lambda _: self.memory.take(amount))
        return x


@dataclass
class Clock:
    """A clock that stands still but for what is done: a piece takes ``fixed`` seconds and ``per_row`` for each row."""

    fixed: float = 1.0
    per_row: float = 0.0
    now: float = 0.0
    sizes: list[int] = field(default_factory=list)

    def ran(self, rows: int) -> None:
        self.now += self.fixed + self.per_row * rows
        self.sizes.append(rows)


@contextmanager
def known_times(clock: Clock) -> Iterator[None]:
    """While held, the search for a size reads this clock, so that it decides alike on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradaccum.fit.transaction.time", SimpleNamespace(perf_counter=lambda: clock.now))
        yield


def counting(clock: Clock, loss: Callable[[nn.Module, Any], Any], rows_of: Callable[[Any], int]) -> Callable[..., Any]:
    """A loss that also tells the clock what was run."""

    def counted(model: nn.Module, batch: Any) -> Any:
        value = loss(model, batch)
        clock.ran(rows_of(batch))
        return value

    return counted
