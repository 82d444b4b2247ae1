"""The seam to what wraps a model for several processes, and the two engines that need nothing.

An engine is asked for one thing: to be taken over while a window's micro-batches run. What it would do with gradients
by itself, it then does not do, or does when told; afterwards it is as it was, also where the user's code raised.

Who reduces what, for one window of K micro-batches on W processes:

    plain module    nothing by itself; `flat` reduces the window's sum, once
    DDP             taken over: forwards go past its reducer; `flat` reduces the window's sum, once
    FSDP2           reduce-scatters by itself, in every backward or the last one; its averaging is undone in the seeds

Why DDP's own reducer is left out: it reduces what the *last* backward touched. What only an earlier micro-batch used,
or only another process, would stay local (pytorch#69031); a process with fewer micro-batches, or none, would never
answer the others; and averages over W processes are wrong once these differ in weight. What it would give in return is
that a part of the reduction hides behind the last backward, one of K.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Engine(Protocol):
    """What wraps a model.

    Attributes:
        name: as users call it.
        averages_over: what gradients are divided by where the engine reduces by itself; 1 where it does not.
        runs_collectives: whether every forward and backward waits for all processes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def averages_over(self) -> float: ...  # noqa: D102
    @property
    def runs_collectives(self) -> bool: ...  # noqa: D102

    def taken_over(self) -> AbstractContextManager[None]:
        """While held, gradients are reduced when we say so."""
        ...


class PlainModule:
    """A module that nothing wraps: it knows nothing of other processes."""

    name = "plain module"
    averages_over = 1.0
    runs_collectives = False

    def taken_over(self) -> AbstractContextManager[None]:
        """There is nothing to take over."""
        return nullcontext()
