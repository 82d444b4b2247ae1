"""Whether the optimizers have stepped, for whoever has to know after an error: Ctrl-C, a scheduler that fails.

An exception can come between any two lines, also between an optimizer's step and the line that would note it. So each
optimizer has a hook that runs inside of its ``step``, right after the parameters were written, and that is not Python
code: ``SimpleQueue.put`` is implemented in C and takes what a hook gets. Not seen is an exception in the middle of an
optimizer's own code, which leaves some parameters written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, cast

from torch.optim import Optimizer


class Stepped:
    """Context manager that counts steps of optimizers."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._steps: SimpleQueue[Any] = SimpleQueue()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_post_hook(cast(Any, self._steps.put)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def all(self) -> bool:
        """Whether each has stepped."""
        return self._steps.qsize() >= len(self._optimizers)


def call_each(function: Callable[[Any], Any], optimizers: Iterable[Optimizer]) -> None:
    """Calls a function with one optimizer after another, and no line of Python code in between."""
    deque(map(function, optimizers), maxlen=0)
