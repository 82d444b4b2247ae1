"""What the user has said that means are taken over, by the name of the term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradaccum.losses.loss import Weight, checked_weight
from gradaccum.losses.normalise import SINGLE, host_number

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
