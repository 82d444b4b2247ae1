"""BatchNorm of the whole batch, for micro-batches that run in lockstep.

Each micro-batch brings its mean and variance to a meeting, gets those of the whole batch, and goes on with them. These
are the same two tensors for all, made once, and they carry the graph: what makes the gradient that of the whole batch
is nothing but torch's own backward through them.

Running statistics advance once, from the whole batch and with its unbiased variance, after the backward; an update that
fails leaves them where they were. ``num_batches_tracked`` advances by one for each call of the layer in one forward.

A checkpoint runs layers again in the backward, where nobody meets: a call then takes the statistics that its forward
had. Which call of a layer that is used several times it repeats is told by its own mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradaccum.errors import BatchError, UnsupportedError
from gradaccum.whole_batch.batch_norm.find import Layers
from gradaccum.whole_batch.batch_norm.intercept import Call, in_backward, in_forward, replaced, torch_batch_norm
from gradaccum.whole_batch.batch_norm.moments import Moments, Normalize, merge


class Meet(Protocol):
    """Brings a micro-batch together with all others of its batch."""

    def __call__(self, key: Any, where: str, mine: Any, combine: Callable[[Sequence[Any]], Any]) -> Any:
        """Waits for the others; ``combine`` makes from what each brought, in the batch's order, what all get.

        Args:
            key: what has to be the same for all.
            where: the place in words.
            mine: what this micro-batch brings.
            combine: is called once.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a micro-batch brings to a layer: how many values each channel has, and their mean and biased variance."""

    count: int
    mean: Tensor
    var: Tensor


AcrossRanks = Callable[[Share], Sequence[Share]]
"""From this process's merged share to those of all processes, with gradient: a differentiable all-gather."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of the whole batch, in one call of one layer."""

    mean: Tensor
    var: Tensor
    count: int
    each_mean: Tensor  # [micro-batches, C], detached, by which a repeated call is recognised
    each_var: Tensor
    has_graph: bool


class Exact:
    """The statistics of one batch.

    Args:
        models: whose layers are named in errors, and whose counts of batches are kept.
        across_ranks: where a batch is spread over processes.
    """

    def __init__(self, models: Iterable[nn.Module], *, across_ranks: AcrossRanks | None = None) -> None:
        self._layers = Layers(models)
        self._across_ranks = across_ranks
        self._statistics: dict[Any, list[Statistics]] = {}
        self._shares: dict[tuple[int, ...], Tensor] = {}
        self._updates: list[tuple[Tensor, Tensor, float, Statistics]] = []
        self._counted: dict[
            int, list[Any]
        ] = {}  # by id of a tensor `num_batches_tracked`: itself, and what is too much
        self._is_backward = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """While held, batch norms are taken over; on success the running statistics advance."""
        with replaced():
            try:
                yield
            except BaseException:
                for tracked, too_much in self._counted.values():
                    _count(tracked, -too_much)
                raise
            finally:
                self._statistics.clear()
        self._advance()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """While held, the backward may run; no forward does."""
        self._is_backward = True
        with in_backward(self):
            yield

    @contextmanager
    def forward(self, meet: Meet) -> Iterator[None]:
        """While held, this thread runs the forward of one micro-batch, which ``meet`` brings together with others."""
        with in_forward(_Met(self, meet)):
            yield

    def first(self, call: Call, meet: Meet) -> Tensor:
        """Normalises a micro-batch in its forward."""
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                'batch_norm="exact" has to see every BatchNorm call, and this one is being compiled. Leave '
                "torch.compile out, also around the loss function."
            )
        self._count(call, 1)
        x = call.input
        mean, var = Moments.apply(x, self._check)
        share = Share(count=x.numel() // max(x.shape[1], 1), mean=mean, var=var)
        key = ("batch norm", *self._layers.key(call))
        mine = share, call, torch.is_grad_enabled()
        statistics: Statistics = meet(key, self._layers.name(call), mine, self._merged)
        return self._normalized(call, statistics)

    def again(self, call: Call) -> Tensor | None:
        """See `InBackward`."""
        candidates = self._statistics.get(self._layers.key(call))
        if not candidates:
            return None
        self._count(call, 1)
        self._uncount(call, 1)
        mean, var = Moments.apply(call.input, self._check)  # a checkpoint wants as many saved tensors as before
        statistics = candidates[0] if len(candidates) == 1 else _closest(candidates, mean, var)
        if torch.is_grad_enabled() and not statistics.has_graph:
            raise UnsupportedError(
                f"{self._layers.name(call)} ran without a graph and is run again in the backward: by a reentrant "
                "checkpoint. Its backward would see one micro-batch, and the gradient through the batch's statistics "
                "would be missing. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        return self._normalized(call, statistics)

    def _normalized(self, call: Call, statistics: Statistics) -> Tensor:
        return Normalize.apply(
            call.input, statistics.mean, statistics.var, call.weight, call.bias, call.eps, self._check
        )

    def _merged(self, brought: Sequence[tuple[Share, Call, bool]]) -> Statistics:
        """The statistics of the whole batch from what each micro-batch brought."""
        call, has_graph = brought[0][1], any(one[2] for one in brought)
        with torch.set_grad_enabled(has_graph), torch.autocast(call.input.device.type, enabled=False):
            whole = self._merge([share for share, _, _ in brought])
            if self._across_ranks is not None:
                whole = self._merge(self._across_ranks(whole))
        if whole.count < 2:
            raise BatchError(
                f"{self._layers.name(call)} has {whole.count} values per channel in the whole batch, and a variance "
                "needs two. Pass more samples, or leave out batches as small as this."
            )
        statistics = Statistics(
            mean=whole.mean,
            var=whole.var,
            count=whole.count,
            each_mean=torch.stack([share.mean.detach() for share, _, _ in brought]),
            each_var=torch.stack([share.var.detach() for share, _, _ in brought]),
            has_graph=has_graph,
        )
        self._statistics.setdefault(self._layers.key(call), []).append(statistics)
        if call.running_mean is not None and call.running_var is not None:
            self._updates.append((call.running_mean, call.running_var, call.momentum, statistics))
        self._uncount(call, len(brought) - 1)
        return statistics

    def _merge(self, shares: Sequence[Share]) -> Share:
        counts = tuple(share.count for share in shares)
        total = sum(counts)
        mean = shares[0].mean
        parts = self._shares.get(counts)
        if parts is None or parts.dtype != mean.dtype or parts.device != mean.device:
            # Made once for all layers of one resolution: a tensor from the host waits for the device.
            parts = torch.tensor([[count / max(total, 1)] for count in counts], dtype=torch.float64, device="cpu")
            parts = self._shares[counts] = parts.to(dtype=mean.dtype, device=mean.device)
        merged_mean, var = merge([share.mean for share in shares], [share.var for share in shares], parts)
        return Share(count=total, mean=merged_mean, var=var)

    def _advance(self) -> None:
        """Running statistics, once; in the order of the calls, for layers that are used several times."""
        with torch.no_grad():
            for running_mean, running_var, momentum, statistics in self._updates:
                unbiased = statistics.var * (statistics.count / (statistics.count - 1))
                running_mean.lerp_(statistics.mean.to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        self._updates.clear()

    def _count(self, call: Call, by: int) -> None:
        """The layer has counted a batch by itself, in each micro-batch."""
        layer = self._layers.of(call)
        tracked = None if layer is None or call.running_mean is None else layer.module.num_batches_tracked
        if isinstance(tracked, Tensor):
            self._counted.setdefault(id(tracked), [tracked, 0])[1] += by

    def _uncount(self, call: Call, by: int) -> None:
        layer = self._layers.of(call)
        tracked = None if layer is None or call.running_mean is None else layer.module.num_batches_tracked
        if isinstance(tracked, Tensor):
            _count(tracked, -by)
            self._counted[id(tracked)][1] -= by

    def _check(self) -> None:
        """For every backward through a batch norm, that it is one that can be right."""
        if not self._is_backward:
            raise UnsupportedError(
                "A backward ran through BatchNorm inside of the loss function, before the other micro-batches were at "
                "its end: it would see the loss of one micro-batch, and the batch's statistics have those of all. "
                'With batch_norm="exact" gradients of gradients are refused; batch_norm="frozen" allows them.'
            )
        if torch.is_grad_enabled():
            raise UnsupportedError(
                'batch_norm="exact" has no second derivative: backward ran with create_graph=True. '
                'batch_norm="frozen" or normalisation within samples (GroupNorm) have one.'
            )


class _Met:
    """Takes the batch norms of one micro-batch over; see `InForward`."""

    def __init__(self, exact: Exact, meet: Meet) -> None:
        self._exact, self._meet = exact, meet

    def first(self, call: Call) -> Tensor:
        return self._exact.first(call, self._meet)


class Whole:
    """A batch in one piece: torch's own kernels, and running statistics that a checkpoint does not advance again."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._layers = Layers(models)

    @contextmanager
    def held(self, run_one: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
        """While held, batch norms outside of the forward that it gives, which is ``run_one``, are a checkpoint's."""

        def forward(micro_batch: Any) -> Any:
            with in_forward(self):
                return run_one(micro_batch)

        with replaced(), in_backward(self):
            yield forward

    def first(self, call: Call) -> Tensor:
        """See `InForward`."""
        return torch_batch_norm(
            call, call.input, running_mean=call.running_mean, running_var=call.running_var, training=True
        )

    def again(self, call: Call) -> Tensor | None:
        """See `InBackward`."""
        layer = self._layers.of(call)
        if layer is None:
            return None
        mean, var = call.running_mean, call.running_var
        tracked = layer.module.num_batches_tracked
        if mean is not None and isinstance(tracked, Tensor):
            _count(tracked, -1)
        return torch_batch_norm(
            call,
            call.input,
            running_mean=None if mean is None else mean.clone(),
            running_var=None if var is None else var.clone(),
            training=True,
        )


def _count(tracked: Tensor, by: int) -> None:
    if by:
        with torch.no_grad():
            tracked.add_(by)


def _closest(candidates: Sequence[Statistics], mean: Tensor, var: Tensor) -> Statistics:
    """Those of the call in which a micro-batch had this mean and variance: equal, if the kernels are deterministic.

    Waits for the device.
    """
    with torch.no_grad():
        apart = [
            ((one.each_mean - mean).abs() + (one.each_var - var).abs()).sum(1).min() if one.each_mean.numel() else mean
            for one in candidates
        ]
    return candidates[int(torch.stack(apart).argmin())]
