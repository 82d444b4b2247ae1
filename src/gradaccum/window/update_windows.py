"""One pass, window by window: a loop whose body is run equally often on every process.

In ``over()`` a process whose loader is exhausted makes the others' updates from inside of the loop's end, where no body
runs. So a body that calls a collective of its own at each update (a metric, a checkpoint) cannot be in it if loaders
are of unequal length. Here each update has its own turn of the loop, on every process; within it the micro-batches
that this process has for it, which may be none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from gradaccum.errors import MisuseError
from gradaccum.types import Update
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.fillers import SharedPasses

Item = TypeVar("Item")


class UpdateWindow(Generic[Item]):
    """The micro-batches that this process has for one update; the update itself once they have had their backwards."""

    def __init__(self, micro_batches: Iterator[Item], passes: SharedPasses) -> None:
        self._micro_batches = micro_batches
        self._passes = passes

    def __iter__(self) -> Iterator[Item]:
        return self._micro_batches

    @property
    def update(self) -> Update | None:
        """The update, on every process; None before the last backward, and for a window that was dropped."""
        return self._passes.last_update


def update_windows(
    items: Iterator[Item],
    passes: SharedPasses,
    accumulation: Accumulation,
    check_backward: Callable[[], None],
) -> Iterator[UpdateWindow[Item]]:
    """The windows of a pass, and those that other processes have after it.

    Args:
        items: the pass.
        passes: of the accumulator.
        accumulation: of the accumulator.
        check_backward: raises where a micro-batch has not had its backward.

    Raises:
        MisuseError: the micro-batches of a window were not all taken.
    """

    def of_window(first: Item) -> Iterator[Item]:
        item = first
        while True:
            yield item
            check_backward()
            if not accumulation.is_open:
                return
            following = next(items, _END)
            if following is _END:
                return
            item = following

    passes.ends_by_itself = False
    try:
        for first in items:
            passes.last_update = None
            taken = of_window(first)
            yield UpdateWindow(taken, passes)
            if next(taken, _END) is not _END:
                raise MisuseError(
                    "The loop over a window was left before all of its micro-batches had their backward. Its update "
                    "would lack them. Let it run to its end: for micro_batch in window: accumulator.backward(...)."
                )
        while passes.take_part():
            yield UpdateWindow(iter(()), passes)
    finally:
        passes.ends_by_itself = True


_END: Any = object()
