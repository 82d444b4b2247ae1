"""`advise`: what a larger batch would buy, in words, from the noise scale that was measured.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), equations 2.11 and 5.1: to
reach a loss with batches of B samples takes

    (1 + N / B)  times as many updates  as with batches without end,
    (1 + B / N)  times as many samples  as with batches of one,

where N is the critical batch size, of which the noise scale is an estimate. So two sizes compare by their quotients.
"""

from __future__ import annotations

import math

from gradaccum.errors import MisuseError, WindowError
from gradaccum.types import Update

_FACTORS = (0.5, 2, 4, 8)
_NEAR = 2  # up to which factor from the noise scale a batch counts as near it: the estimate is no better
_SOURCES = (
    "Indicative only. By the model of McCandlish et al. 2018 (arXiv:1812.06162), which they find right within a small "
    "factor, for a learning rate that is tuned at each size; the noise scale grows while the loss falls, and Adam's "
    "may be another. For language models see Zhang et al. 2024 (arXiv:2410.21676)."
)


def advise(measured: Update | float, batch_size: int | None = None) -> str:
    """Says in words what a larger batch would buy.

    Args:
        measured: an update of ``Accumulator(..., noise_scale=True)`` or ``TrainStep(..., noise_scale=True)``, best a
            few hundred updates after the start; or the noise scale in samples.
        batch_size: samples of an update, over all processes; None for those of ``measured``.

    Returns:
        Text, marked as indicative, with its sources. Nothing of it was tried on your model.

    Raises:
        MisuseError: nothing has measured a noise scale.
        WindowError: no batch size, or one below 1.

    Example:
        >>> print(ga.advise(1_000, batch_size=250).splitlines()[0])
        The noise scale is about 1,000 samples, 4 times the batch of 250: the batch is well below it.
    """
    scale = measured.noise_scale if isinstance(measured, Update) else measured
    size = measured.samples if isinstance(measured, Update) and batch_size is None else batch_size
    if scale is None:
        raise MisuseError(
            "The update has no noise scale, so nothing can be said of larger batches. Pass noise_scale=True to "
            "ga.Accumulator or ga.TrainStep, with at least two micro-batches an update."
        )
    if type(size) is not int or size < 1:
        raise WindowError(
            f"batch_size={size!r}: it is how many samples make an update, an int of at least 1, to which others are "
            "compared. Pass ga.advise(update, batch_size=40)."
        )
    if not scale >= 0:
        raise WindowError(f"A noise scale of {scale!r} samples: it is a number of samples, at least 0.")
    if math.isinf(scale):
        first = (
            f"The averages show noise alone, no gradient: the noise scale is far above the batch of {size:,}, or too "
            "few updates were averaged. Ask again later."
        )
        return f"{first}\n{_SOURCES}"
    others = [max(round(size * factor), 1) for factor in _FACTORS]
    lines = [_compared(size, other, scale) for other in dict.fromkeys(others) if other != size]
    return "\n".join([_verdict(size, scale), *lines, _time(size, 2 * size, scale), _SOURCES])


def _verdict(size: int, scale: float) -> str:
    if scale > _NEAR * size:
        return (
            f"The noise scale is about {scale:,.0f} samples, {scale / size:.3g} times the batch of {size:,}: the batch "
            "is well below it."
        )
    if scale * _NEAR < size:
        return (
            f"The noise scale is about {scale:,.0f} samples, {scale / size:.2g} of the batch of {size:,}: the batch "
            "is beyond it, and a smaller one would learn as much from fewer samples."
        )
    return f"The noise scale is about {scale:,.0f} samples, and the batch of {size:,} is near it: about the right size."


def _compared(size: int, other: int, scale: float) -> str:
    samples = _samples(size, other, scale)
    return (
        f"  a batch of {other:,}: {samples * size / other:.2f} times as many updates, {samples:.2f} times as many "
        "samples, for the same loss"
    )


def _time(size: int, other: int, scale: float) -> str:
    return (
        "Accumulation makes no sample faster: on the same devices time goes with the samples, so a batch of "
        f"{other:,} would take about {_samples(size, other, scale) - 1:.0%} more time. More devices could use it."
    )


def _samples(size: int, other: int, scale: float) -> float:
    """How many times as many samples batches of ``other`` take as those of ``size``."""
    return (other + scale) / (size + scale)
