"""The answer: rows of sizes, what memory is made of, and which size to take."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gradaccum.errors import WindowError
from gradaccum.fit import picture
from gradaccum.fit import plan_text as words
from gradaccum.fit.curve import Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One micro-batch size.

    Attributes:
        micro_batch_size: samples that one forward sees, at most.
        micro_batches: how many an update has.
        peak_bytes: the largest memory of an update: parameters, gradients and optimizer included.
        is_measured: whether the peak was measured at this size; otherwise it is predicted from other sizes.
        seconds: median wall time of one micro-batch's forward and backward; None where nothing was timed.
        samples_per_second: through forward and backward; None where nothing was timed.
        fits: whether the peak is within the budget, and the size did not run out of memory.
        updates_per_epoch: None where the size of the dataset is not known.
    """

    micro_batch_size: int
    micro_batches: int
    peak_bytes: int
    is_measured: bool
    seconds: float | None
    samples_per_second: float | None
    fits: bool
    updates_per_epoch: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What the peak is made of, in bytes.

    The first five do not depend on the size. Gradients and optimizer state are there all the time while a batch is
    accumulated, so they count in full.

    Attributes:
        parameters: of models and optimizers.
        buffers: of models.
        gradients: of all parameters that get one.
        optimizer_state: after the first update.
        optimizer_step: what a step needs besides, while no activations are there.
        activations_per_sample: what one more sample adds, its inputs included.
        temporaries: what is left at size 0: what backward needs for a moment, libraries, inputs that are there anyway.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer_state: int
    optimizer_step: int
    activations_per_sample: int
    temporaries: int

    @property
    def resident(self) -> int:
        """What is there at any size: parameters, buffers, gradients and optimizer state."""
        return self.parameters + self.buffers + self.gradients + self.optimizer_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an update takes at each micro-batch size; made by `plan`. ``print(plan)`` is meant to be read.

    Attributes:
        method: "measure" or "estimate": how it was found out.
        device: where, or for what.
        batch_size: rows of the batch.
        memory: the budget in bytes; None where there is none.
        micro_batch_size: the fastest that fits; where nothing was timed the largest; None where none fits.
        largest_micro_batch_size: the largest that fits; None where none does.
        rows: one for each size looked at, small ones first.
        breakdown: what the peak is made of.
        notes: what to know of how this came about.
    """

    method: str
    device: str
    batch_size: int
    memory: int | None
    micro_batch_size: int | None
    largest_micro_batch_size: int | None
    rows: tuple[Row, ...]
    breakdown: Breakdown
    notes: tuple[str, ...] = ()
    _curve: Curve = field(repr=False)

    @property
    def whole_batch_fits(self) -> bool:
        """Whether the batch could run in one piece, so that nothing has to be accumulated."""
        return self.largest_micro_batch_size == self.batch_size

    @property
    def accumulation_helps(self) -> bool:
        """Whether the batch does not fit in one piece and does in several."""
        return self.micro_batch_size is not None and not self.whole_batch_fits

    @property
    def advice(self) -> str:
        """What to do, in a few sentences."""
        return words.advice(self)

    def peak_bytes(self, micro_batch_size: int) -> int:
        """The peak at any size, looked at or not: predicted from those that were.

        Below the batch's size gradients of other micro-batches wait meanwhile; from there on all is one piece.

        Raises:
            WindowError: the size is below 1.
        """
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise WindowError(
                f"peak_bytes({micro_batch_size!r}): a micro-batch has at least one sample. Pass its number of samples."
            )
        return self._curve.at(micro_batch_size)

    def row(self, micro_batch_size: int) -> Row:
        """The row of a size.

        Raises:
            KeyError: the size was not looked at.
        """
        for row in self.rows:
            if row.micro_batch_size == micro_batch_size:
                return row
        sizes = ", ".join(str(row.micro_batch_size) for row in self.rows)
        raise KeyError(f"no row of {micro_batch_size} samples; there are {sizes}. peak_bytes(n) predicts any size")

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws memory and throughput over the size, with the budget, into a file: .png, .svg or .pdf.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return picture.draw(self, Path(path))

    def __str__(self) -> str:
        return words.text(self)
