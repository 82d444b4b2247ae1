"""A random stream for each micro-batch, whoever runs in between.

One after another, the second micro-batch would draw where the first had stopped. In lockstep it starts before the first
has drawn its last number, and how many that will be nobody knows. So each micro-batch draws from a stream of its own,
seeded from the CPU's generator; and because a checkpoint puts back the state that its forward had found, the stream
must not move while others run: the generators are switched with the micro-batches.

Afterwards all generators are one number further, or untouched where nothing was drawn, as after an update that finds
its micro-batch size: what comes next does not depend on how the batch was cut. Python's and numpy's generators are not
switched; micro-batches draw from them in the order in which they run, which is always the same.
"""

from __future__ import annotations

import torch

from gradaccum.window.snapshot import RandomState


class Streams:
    """The streams of one batch's micro-batches.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._before = RandomState.now()
        generator = torch.Generator("cpu")
        generator.set_state(self._before.cpu)
        self._seeds: list[int] = torch.randint(0, 1 << 62, (count,), generator=generator, device="cpu").tolist()
        self._states: dict[int, RandomState] = {}
        self._drew = False
        self._started: RandomState | None = None

    def enter(self, index: int) -> None:
        """The micro-batch of this index goes on."""
        state = self._states.get(index)
        if state is None:
            torch.default_generator.manual_seed(self._seeds[index])
            for device in self._before.cuda:
                torch.cuda.default_generators[device].manual_seed(self._seeds[index])
            self._started = RandomState.now()
        else:
            state.restore()
            self._started = state

    def leave(self, index: int) -> None:
        """It waits, or has ended."""
        now = self._states[index] = RandomState.now()
        if not self._drew and self._started is not None:
            self._drew = not now.equals(self._started)

    def end(self) -> None:
        """Leaves the generators one number further; untouched, where no micro-batch drew anything."""
        self._before.restore()
        if self._drew:
            torch.randint(0, 1 << 62, (), device="cpu")
            for device in self._before.cuda:
                torch.rand((), device=f"cuda:{device}")

    def undo(self) -> None:
        """Leaves the generators as they were."""
        self._before.restore()
