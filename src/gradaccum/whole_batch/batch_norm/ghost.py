"""Statistics of fixed groups of samples, whatever micro-batches they are run in.

"Ghost batch normalisation" (Hoffer et al. 2017, arXiv 1705.08741) is what accumulation does by accident, with groups
that change with the micro-batch size. With groups of n consecutive samples of the batch, and micro-batches that hold
whole groups, the gradient is the same however they are cut, and costs no more than the plain loop.

A last group of a single sample joins the one before it, for it has no variance of its own. Running statistics advance
once an update, by the mean and the unbiased variance of the whole batch, merged from what its micro-batches had.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.errors import UnsupportedError
from gradaccum.split.asked import rows_in
from gradaccum.types import GhostBatch, Split
from gradaccum.whole_batch.batch_norm.layers import Call, Layers, answered, calls
from gradaccum.whole_batch.batch_norm.moments import Share, advance, merge, moments


class Ghosts:
    """Normalises group by group.

    Where ``is_replayed``, a micro-batch may run forward several times in an update; it is told by its place in memory.
    """

    def __init__(self, models: Sequence[nn.Module], groups: GhostBatch, *, is_replayed: bool = False) -> None:
        self._models = models
        self._groups = groups
        self._is_replayed = is_replayed
        self._layers = Layers(())
        # By layer and number of its call in a forward, then by micro-batch, whose second run takes the first's place.
        self._seen: dict[Any, dict[Any, tuple[Call, Share]]] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which one update's micro-batches run; on success the running statistics advance."""
        self._layers, self._seen = Layers(self._models), {}
        with answered(self._layers, wanted="ga.GhostBatch"):
            with calls.in_backward(self._again):
                yield
            for shares in self._seen.values():
                call = next(iter(shares.values()))[0]  # the first micro-batch's, with the momentum of the first count
                advance(call, merge([share for _, share in shares.values()]))
                self._layers.count(call, is_new=True)
        self._seen.clear()

    def forward(self, run_one: Callable[[Any], Any], *, split: Split) -> Callable[[Any], Any]:
        """``run_one`` of a micro-batch, normalised group by group; ``split`` counts its samples."""

        def grouped(micro_batch: Any) -> Any:
            name: Any = object()
            if self._is_replayed:
                name = tuple((tensor.data_ptr(), tensor.shape) for tensor in tree.tensors(micro_batch))
            with calls.in_forward(functools.partial(self._first, name, rows_in(split, micro_batch), Counter[Any]())):
                return run_one(micro_batch)

        return grouped

    def _first(self, name: Any, rows: int, num_calls: Counter[Any], call: Call) -> Tensor:
        x = call.input
        if len(x) != rows:
            raise UnsupportedError(
                f"{self._layers.name(call)} got {len(x)} rows in a micro-batch of {rows} samples. ga.GhostBatch takes "
                "statistics over groups of samples, and which row belongs to which sample cannot be seen. Keep one "
                "row for each sample up to BatchNorm ([n, C, length] instead of [n * length, C]), or use "
                'batch_norm="exact".'
            )
        normalized = self._normalized(call)
        if call.running_mean is not None:
            key = self._layers.key(call)
            num_calls[key] += 1
            mean, var = moments(x)
            share = Share(count=call.num_values, mean=mean, var=var)
            self._seen.setdefault((*key, num_calls[key]), {})[name] = call.without_input(), share
        return normalized

    def _again(self, call: Call) -> Tensor | None:
        return self._normalized(call) if self._layers.may_have(call) else None

    def _normalized(self, call: Call) -> Tensor:
        each = [
            dataclasses.replace(call, input=group, running_mean=None, running_var=None).by_torch()
            for group in call.input.split(self._groups.group_sizes(len(call.input)))
        ]
        return each[0] if len(each) == 1 else torch.cat(each)
