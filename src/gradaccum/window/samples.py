"""How many samples a micro-batch of one's own loop has: counted as it was said, seen in it, or not known.

Nothing is cut there, so a micro-batch may be anything. Only windows measured in samples, and plain losses, which are
means over samples, need a count. Where it could only be guessed it is None, and what needs it raises an error that
names ``samples=``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from gradaccum import tree
from gradaccum.errors import BatchError, LossError, WindowError

SamplesFunction = Callable[[Any], int]
"""From a micro-batch to its number of samples."""


def sample_counter(samples: SamplesFunction | None) -> Callable[[Any], int | None]:
    """What counts the samples of micro-batches: the user's function, checked, or a look at them.

    Raises:
        WindowError: ``samples`` is no function.
    """
    if samples is None:
        return tree.rows_or_none
    if not callable(samples):
        raise WindowError(
            f"samples={samples!r}: it is a function that counts the samples of each micro-batch. Pass "
            "samples=lambda micro_batch: len(micro_batch[0]), say."
        )
    return lambda micro_batch: _checked(samples(micro_batch), "samples(micro_batch) returned")


def said_samples(samples: Any, *, counted: int | None = None) -> int:
    """The number that ``backward(loss, samples=)`` was given; ``counted`` is what the window has counted already.

    Raises:
        WindowError: no whole number of at least 0, or another one than was counted.
    """
    number = _checked(samples, "backward(loss, samples=) was given")
    if counted is not None and counted != number:
        raise WindowError(
            f"backward(loss, samples={number}) for a micro-batch that over() has counted as {counted} samples towards "
            "batch_size: the window would end in the wrong place. Pass the accumulator samples=lambda micro_batch: "
            "..., which counts them before their forward."
        )
    return number


def _checked(samples: Any, said: str) -> int:
    """A number of samples as an int; ``said`` begins the error."""
    try:
        number = operator.index(samples)
    except TypeError:
        number = -1
    if number < 0 or isinstance(samples, bool):
        raise WindowError(
            f"{said} {samples!r}: it is how many samples the micro-batch has, an int of at least 0. A wrong number "
            "would give its mean the wrong share of the gradient."
        )
    return number


def not_counted(micro_batch: Any) -> LossError:
    """The error for a micro-batch that ``batch_size=`` has to count, and that could only be guessed."""
    try:
        tree.rows(micro_batch)
        why = "samples= returned nothing."
    except BatchError as error:
        why = re.split(" (Cut|Say|In your own loop) ", str(error))[0]  # nothing is cut here
    return LossError(
        f"batch_size= counts samples, and how many this micro-batch has could only be guessed: {why} Pass "
        "samples=lambda micro_batch: ..., which returns their number, or micro_batches= in place of batch_size= and "
        "return ga.Loss.mean(value, over=n)."
    )
