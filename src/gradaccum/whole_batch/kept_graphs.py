"""How many micro-batches' graphs are kept between the two passes of a loss over the batch.

A kept graph needs no second forward: with k of m kept, the extra cost is (m - k) / m forwards. How many fit follows
from what a row's graph holds, counted in the first forward of each length of samples, and from what the device has
left. What the loss itself and temporaries need is a guess, so running out of memory is expected: half of what was
thought usable is tried next, and twice as much again after some time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gradaccum.memory.available import available_bytes

_USABLE = {"cpu": 0.5, "cuda": 0.8}  # a CPU's memory is everybody's, and where it ends nothing is raised
_LEAST_USABLE = 0.01
_PATIENCE = 64  # windows after which twice as much is tried again
_ALIKE = 1.05  # times as many elements a row as were counted with, for the count to be taken as proportional


class KeptGraphs:
    """Decides how many graphs to keep: as many as the user has chosen, or as fit beside the models' gradients."""

    def __init__(self, models: Sequence[nn.Module], *, at_most: int | None = None) -> None:
        self._models = models
        self._at_most = at_most
        self._usable_part: float | None = None
        self._row_bytes = 0.0
        self._row_elements = 0
        self._clean_windows = 0

    def is_known(self, elements: int) -> bool:
        """Whether `number` is known for rows of so many elements: whether their graphs have been counted."""
        return self._at_most is not None or (0 < elements <= _ALIKE * self._row_elements)

    def counted(self, num_bytes: int, *, rows: int, elements: int) -> None:
        """Takes note that a micro-batch's graph holds so many bytes."""
        self._row_bytes, self._row_elements = num_bytes / rows, elements

    def number(self, sizes: Sequence[int], device: torch.device) -> int:
        """How many graphs to keep, those of the last ones, of micro-batches of so many rows each."""
        if self._at_most is not None:
            return min(self._at_most, len(sizes))
        left = available_bytes(device)
        if left is None:
            return len(sizes)
        gradients = sum(
            parameter.numel() * parameter.element_size()
            for model in self._models
            for parameter in model.parameters()
            if parameter.requires_grad and parameter.grad is None
        )
        room = self._part(device) * (left - gradients)
        if sum(sizes) * self._row_bytes <= room:
            return len(sizes)
        room -= max(sizes) * self._row_bytes  # the graph of the one that is run again
        kept = 0
        for size in reversed(sizes):
            room -= size * self._row_bytes
            if room < 0:
                break
            kept += 1
        return min(kept, len(sizes) - 1)

    def succeeded(self) -> None:
        """Takes note that a window ran."""
        self._clean_windows += 1
        if self._usable_part is not None and self._clean_windows >= _PATIENCE:
            self._clean_windows = 0
            self._usable_part = min(2 * self._usable_part, 1.0)

    def failed(self, device: torch.device) -> None:
        """Takes note that a window ran out of memory with what `number` returned."""
        self._clean_windows = 0
        self._usable_part = max(self._part(device) / 2, _LEAST_USABLE)

    def _part(self, device: torch.device) -> float:
        return self._usable_part or _USABLE.get(device.type, min(_USABLE.values()))
