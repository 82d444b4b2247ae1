"""At which sizes to look, and what was found there, before what does not depend on the size is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradaccum.fit.curve import Curve
from gradaccum.fit.probe import Probe
from gradaccum.memory.out_of_memory import is_out_of_memory

_MOST_SIZES = 12


@dataclass(slots=True)
class Findings:
    """Bytes are those of gradients, activations and inputs at their peak: parameters and optimizer are not in it.

    Attributes:
        batch_size: rows of the batch.
        sizes: what the user is told about.
        step_bytes: what the optimizer's step takes besides gradients, and what is there anyway.
        peaks: by size, while gradients of other micro-batches wait.
        whole: the bytes at which the batch runs in one piece; None where it was not run.
        ran: sizes that were run with real data.
        failed: sizes that ran out of memory.
        seconds: by size, for forward and backward of one micro-batch.
        gradient_bytes: what waits between micro-batches.
        notes: what the user should know of how this came about.
    """

    batch_size: int
    sizes: list[int]
    step_bytes: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    whole: int | None = None
    ran: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    gradient_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def curve(self, *, resident: int = 0) -> Curve:
        """Peak over size, on top of what is resident anyway.

        Where the batch's own size was run in one piece only, gradients that wait are added for the sizes right below:
        never too little, and too much by what was already added to them at the peak.
        """
        floor = resident + self.gradient_bytes + self.step_bytes
        points = {size: peak + resident for size, peak in self.peaks.items()}
        if self.whole is None:
            return Curve.through(points, floor=floor)
        whole = (self.batch_size, self.whole + resident)
        if points and max(points) < self.batch_size:
            going_on = Curve.through(points).at(self.batch_size)
            points[self.batch_size] = max(going_on, whole[1] + self.gradient_bytes)
        return Curve.through(points, whole=whole, floor=floor)

    def take_note_of(self, probe: Probe) -> None:
        """What the probe knows after its first run."""
        self.gradient_bytes = probe.gradient_bytes
        if probe.num_sparse:
            which = "A gradient is sparse and grows" if probe.num_sparse == 1 else "Some gradients are sparse and grow"
            self.notes.append(f"{which} with each micro-batch until the update: peaks are those after a few.")

    def without_a_single_sample(self, note: str) -> None:
        """Takes note of why one sample cannot be run by itself."""
        self.notes.append(note)
        self.sizes = [size for size in self.sizes if size > 1] or self.sizes


def default_sizes(batch_size: int) -> list[int]:
    """Powers of two below the batch's size, the largest of them if there are many, and the batch's size."""
    powers = [1 << exponent for exponent in range((batch_size - 1).bit_length())]
    return [*powers[-_MOST_SIZES:], batch_size]


def sizes_to_accumulate(sizes: Sequence[int], batch_size: int) -> list[int]:
    """The sizes at which a batch is accumulated, at least two, so that they give a line."""
    found = [size for size in sizes if size < batch_size]
    for extra in (1, 2, 3):
        if len(found) < 2 and extra not in found:
            found.append(extra)
    return sorted(found)


def first_that_runs(sizes: Sequence[int], run: Callable[[int], None]) -> tuple[list[int], str | None]:
    """Runs the smallest size; where that is a single sample and fails, the next one.

    Some models cannot train on one sample (BatchNorm of a vector has no variance), which is no reason not to plan.

    Returns:
        The sizes that are left, still at least two, and a note where one is not.
    """
    try:
        run(sizes[0])
    except Exception as error:
        if sizes[0] != 1 or is_out_of_memory(error):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
    else:
        return list(sizes), None
    left = [*sizes[1:], *([sizes[-1] + 1] if len(sizes) < 3 else [])]
    run(left[0])
    return left, f"A single sample cannot be run by itself: {reason}"
