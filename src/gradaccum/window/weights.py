"""What the user has said that means are taken over, by the name of the term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradaccum.losses.loss import Weight, checked_weight
from gradaccum.losses.normaliser import SINGLE, host_number
from gradaccum.window.looking_ahead import END, FAILED

WeightsFunction = Callable[[Any], Mapping[str, Weight] | Weight]
"""From a batch, or a micro-batch, to what the means of its loss are taken over."""


def weights_by_name(weights: Mapping[str, Weight] | Weight) -> dict[str, Weight]:
    """What a `WeightsFunction` returned, a single loss's count under `SINGLE`."""
    named = weights if isinstance(weights, Mapping) else {SINGLE: weights}
    return {name: checked_weight(weight, name="weights=") for name, weight in named.items()}


def add_weights(so_far: Mapping[str, Weight], more: Mapping[str, Weight]) -> dict[str, Weight]:
    """Counts by name, added up."""
    names = list(so_far) + [name for name in more if name not in so_far]
    return {name: host_number(so_far.get(name, 0)) + host_number(more.get(name, 0)) for name in names}


def totals_of_window(
    weights: WeightsFunction,
    first: Any,
    peek: Callable[[int], Any],
    *,
    size: int,
    count: Callable[[Any], int | None] | None,
) -> dict[str, Weight]:
    """The weights of a window's micro-batches, added up before its first backward.

    ``first`` is its first micro-batch, ``peek`` shows those after it (`LookingAhead.peek`); ``count`` counts their
    samples where ``size`` does, and is None where it counts micro-batches.
    """

    def size_of(micro_batch: Any) -> int:
        return 1 if count is None else count(micro_batch) or 0

    totals = add_weights(weights_by_name(weights(first)), {})
    done = size_of(first)
    offset = 0
    while done < size and (upcoming := peek(offset)) is not END and upcoming is not FAILED:
        totals = add_weights(totals, weights_by_name(weights(upcoming)))
        done += size_of(upcoming)
        offset += 1
    return totals
