"""Statistics of fixed groups of samples, whatever micro-batches they are run in.

Normalising with the statistics of small groups is a method of its own ("ghost batch normalisation", Hoffer et al. 2017,
arXiv 1705.08741), and what accumulation does by accident, with groups that change with the micro-batch size. With
groups of n consecutive samples of the batch, and micro-batches that hold whole groups, the loss is a sum over groups:
its gradient is the same however they are cut, and costs no more than the plain loop.

A last group of a single sample joins the one before it, for it has no variance of its own. Running statistics advance
once an update, by the mean and the unbiased variance of the whole batch, merged from what its micro-batches had.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.errors import UnsupportedError
from gradaccum.types import GhostBatch
from gradaccum.whole_batch.batch_norm.exact import Share
from gradaccum.whole_batch.batch_norm.find import Layers, batch_norms
from gradaccum.whole_batch.batch_norm.intercept import Call, in_backward, in_forward, replaced, torch_batch_norm
from gradaccum.whole_batch.batch_norm.moments import merge, moments


class Ghosts:
    """Normalises group by group.

    Args:
        models: whose layers' counts of batches are kept.
        groups: how large they are.
        is_replayed: whether a micro-batch may run forward several times in one update, at one place in memory.
    """

    def __init__(self, models: Iterable[nn.Module], groups: GhostBatch, *, is_replayed: bool = False) -> None:
        self._models = list(models)
        self._groups = groups
        self._is_replayed = is_replayed
        self._layers = Layers(())
        self._seen: dict[Any, dict[Any, tuple[Call, Share]]] = {}  # by layer and how often called, by micro-batch

    @contextmanager
    def held(self) -> Iterator[None]:
        """While held, one update's micro-batches may run; on success the running statistics advance."""
        self._layers = Layers(self._models)
        before = [
            (layer.num_batches_tracked, layer.num_batches_tracked.clone(), id(layer.running_mean))
            for layer in batch_norms(self._models)
            if layer.num_batches_tracked is not None
        ]
        try:
            with replaced(), in_backward(self):
                yield
            self._advance(before)
        except BaseException:
            with torch.no_grad():
                for tracked, start, _ in before:
                    tracked.copy_(start)
            raise
        finally:
            self._seen.clear()

    def forward(self, run_one: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``run_one`` of a micro-batch, normalised group by group."""

        def grouped(micro_batch: Any) -> Any:
            name: Any = object()
            if self._is_replayed:
                name = tuple((tensor.data_ptr(), tensor.shape) for tensor in tree.tensors(micro_batch))
            with in_forward(_OfMicroBatch(self, name, tree.rows(micro_batch))):
                return run_one(micro_batch)

        return grouped

    def first(self, call: Call, name: Any, index: int, rows: int) -> Tensor:
        """Normalises a micro-batch in its forward, for the ``index``-th time by this layer."""
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
            mean, var = moments(x)
            share = Share(count=x.numel() // max(x.shape[1], 1), mean=mean, var=var)
            # Without the input, which would be kept until the update.
            kept = dataclasses.replace(call, input=x.new_empty(0))
            self._seen.setdefault((*self._layers.key(call), index), {})[name] = kept, share
        return normalized

    def again(self, call: Call) -> Tensor | None:
        """See `InBackward`."""
        return self._normalized(call) if self._layers.may_have(call) else None

    def layer_key(self, call: Call) -> Any:
        """The same for every call of one layer."""
        return self._layers.key(call)

    def _normalized(self, call: Call) -> Tensor:
        sizes = self._groups.group_sizes(len(call.input))
        each = [
            torch_batch_norm(call, group, running_mean=None, running_var=None, training=True)
            for group in call.input.split(sizes)
        ]
        return each[0] if len(each) == 1 else torch.cat(each)

    def _advance(self, before: list[tuple[Tensor, Tensor, int]]) -> None:
        calls: Counter[int] = Counter()
        with torch.no_grad():
            for shares in self._seen.values():
                call = next(iter(shares.values()))[0]
                counts = [share.count for _, share in shares.values()]
                total = sum(counts)
                assert call.running_mean is not None, "only those were taken note of"
                parts = torch.tensor([[count / total] for count in counts], dtype=torch.float64, device="cpu")
                mean, var = merge(
                    [share.mean for _, share in shares.values()],
                    [share.var for _, share in shares.values()],
                    parts.to(dtype=call.running_mean.dtype, device=call.running_mean.device),
                )
                for running, now in ((call.running_mean, mean), (call.running_var, var * (total / max(total - 1, 1)))):
                    if running is not None:
                        running.lerp_(now.to(running.dtype), call.momentum)
                calls[id(call.running_mean)] += 1
            for tracked, start, layer in before:
                tracked.copy_(start + calls[layer])


class _OfMicroBatch:
    """Takes the batch norms of one micro-batch over; see `InForward`."""

    def __init__(self, ghosts: Ghosts, name: Any, rows: int) -> None:
        self._ghosts, self._name, self._rows = ghosts, name, rows
        self._calls: Counter[Any] = Counter()

    def first(self, call: Call) -> Tensor:
        key = self._ghosts.layer_key(call)
        self._calls[key] += 1
        return self._ghosts.first(call, self._name, self._calls[key], self._rows)
