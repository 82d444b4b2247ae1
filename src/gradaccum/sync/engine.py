"""The seam to what wraps a model for several processes, and the engine of a model that nothing wraps.

An engine is taken over while a window's micro-batches run: it then leaves gradients alone, or reduces them when told.
Afterwards it is as it was, also where the user's code raised.

Who reduces what, for one window of K micro-batches on W processes:

    plain module    `flat` reduces the window's sum, once
    DDP             taken over: forwards go past its reducer; `flat` reduces the window's sum, once
    FSDP2           reduce-scatters in every backward or the last one; its averaging is undone in the seeds

Why DDP's own reducer is left out: it reduces what the *last* backward touched. What only an earlier micro-batch used,
or only another process, would stay local (pytorch#69031); a process with fewer micro-batches, or none, would never
answer the others; and averages over W processes are wrong once these differ in weight. What it would give in return is
that a part of the reduction hides behind the last backward, one of K.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Engine:
    """What wraps a model; as it stands, the engine of a plain module."""

    name: str = "plain module"
    is_wrapper: bool = False  # the model's own forward and backward would reduce gradients
    averages_over: float = 1.0  # what gradients are divided by where the engine reduces them
    runs_collectives: bool = False  # every forward and backward waits for all processes

    @property
    def left_alone(self) -> list[nn.Parameter]:
        """Parameters that are each process's own."""
        return []

    @property
    def description(self) -> str:
        """What the plan line says: the engine, and when gradients are reduced."""
        return f"{self.name}, reduced once an update"

    def taken_over(self) -> AbstractContextManager[None]:
        """Context manager in which the engine reduces gradients only when it is told to."""
        return nullcontext()

    def prepare(self, *, is_last: bool) -> None:
        """Called before a forward that waits for all processes; ``is_last`` where its window ends with it."""

    def take_outputs(self) -> list[Tensor]:
        """What the forward since `prepare` put out, where its backward waits for all processes."""
        return []
