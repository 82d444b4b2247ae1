"""BatchNorm of the whole batch, for micro-batches that run in lockstep.

Each micro-batch brings its mean and variance to a meeting, gets those of the whole batch, and goes on with them: the
same two tensors for all, with a graph, so torch's own backward through them makes the gradient that of the whole batch.

Running statistics advance once, from the whole batch and with its unbiased variance, after the backward; an update that
fails leaves them where they were. ``num_batches_tracked`` advances by one for each call of the layer in one forward.

A checkpoint runs layers again in the backward, where nobody meets: a call then takes the statistics that its forward
had. Which call of a layer that is used several times it repeats is told by its own mean and variance.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.errors import BatchError, UnsupportedError
from gradaccum.whole_batch.batch_norm.layers import Call, Layers, all_seen, answered, batch_norms, calls
from gradaccum.whole_batch.batch_norm.moments import Moments, Normalize, Share, advance, merge

_WANTED = 'batch_norm="exact"'

Meet = Callable[[Any, str, Any, Callable[[Sequence[Any]], Any]], Any]
"""``(key, where, mine, combine)``: waits until all micro-batches are at the key, and returns what ``combine``, called
once, makes of what each brought in the batch's order; ``where`` is the place in words."""

AcrossRanks = Callable[[Share], Sequence[Share]]
"""From this process's merged share to those of all processes, with gradient: a differentiable all-gather."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one call of one layer takes in all micro-batches."""

    call: Call  # the first micro-batch's, without its input
    whole: Share
    each_mean: Tensor  # [micro-batches, C], detached, by which a repeated call is recognised, with `each_var`
    each_var: Tensor
    has_graph: bool


class Exact:
    """The statistics of one batch, which is spread over processes where there is ``across_ranks``.

    ``others`` are networks that the loss runs and does not train.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        others: Sequence[nn.Module] = (),
        across_ranks: AcrossRanks | None = None,
    ) -> None:
        self._layers = Layers(models, others=others)
        self._across_ranks = across_ranks
        self._statistics: dict[Any, list[Statistics]] = {}
        self._is_backward = False
        self._seen = threading.local()  # calls of one micro-batch, which has a thread of its own

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which the batch runs; on success the running statistics advance."""
        try:
            seen = all_seen(
                batch_norms(self._layers.models), num_calls=lambda: getattr(self._seen, "calls", 0), wanted=_WANTED
            )
            with answered(self._layers, wanted=_WANTED), seen:
                yield
            for of_layer in self._statistics.values():
                for statistics in of_layer:
                    advance(statistics.call, statistics.whole)
        finally:  # the graph refers to these by `_check`, and they to the graph: a cycle that keeps the memory
            self._statistics.clear()

    def forward(self, meet: Meet) -> AbstractContextManager[None]:
        """Context manager in which this thread runs the forward of one micro-batch."""
        return calls.in_forward(functools.partial(self._first, meet))

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Context manager in which the backward runs, and no forward but those of checkpoints."""
        self._is_backward = True
        with calls.in_backward(self._again):
            yield

    def _first(self, meet: Meet, call: Call) -> Tensor:
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                'batch_norm="exact" has to see every BatchNorm call, and this one is being compiled. Leave '
                "torch.compile out, also around the loss function."
            )
        self._seen.calls = getattr(self._seen, "calls", 0) + 1
        mean, var = Moments.apply(call.input, self._check)
        mine = Share(count=call.num_values, mean=mean, var=var), call, torch.is_grad_enabled()
        statistics = meet(("batch norm", *self._layers.key(call)), self._layers.name(call), mine, self._merged)
        return self._normalized(call, statistics)

    def _merged(self, brought: Sequence[tuple[Share, Call, bool]]) -> Statistics:
        shares, has_graph = [share for share, _, _ in brought], any(with_graph for _, _, with_graph in brought)
        call = brought[0][1]
        with torch.set_grad_enabled(has_graph), torch.autocast(call.input.device.type, enabled=False):
            whole = merge(shares)
            if self._across_ranks is not None:
                whole = merge(self._across_ranks(whole))
        if whole.count < 2:
            raise BatchError(
                f"{self._layers.name(call)} has {whole.count} values per channel in the whole batch, and a variance "
                "needs two. Pass more samples, or leave out batches as small as this."
            )
        statistics = Statistics(
            call=call.without_input(),
            whole=whole,
            each_mean=torch.stack([share.mean.detach() for share in shares]),
            each_var=torch.stack([share.var.detach() for share in shares]),
            has_graph=has_graph,
        )
        self._statistics.setdefault(self._layers.key(call), []).append(statistics)
        self._layers.count(call, is_new=True)
        return statistics

    def _again(self, call: Call) -> Tensor | None:
        """Normalises a micro-batch in a checkpoint as its forward did; None for another's layer."""
        candidates = self._statistics.get(self._layers.key(call))
        if not candidates:
            return None
        self._layers.count(call, is_new=False)
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
        whole = statistics.whole
        return Normalize.apply(call.input, whole.mean, whole.var, call.weight, call.bias, call.eps, self._check)

    def _check(self) -> None:
        """Refuses a backward through a batch norm that cannot be right."""
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


def _closest(candidates: Sequence[Statistics], mean: Tensor, var: Tensor) -> Statistics:
    """Those of the call in which a micro-batch had this mean and variance, or nearly; waits for the device."""
    with torch.no_grad():
        apart = [
            ((one.each_mean - mean).abs() + (one.each_var - var).abs()).sum(1).min() if one.each_mean.numel() else mean
            for one in candidates
        ]
    return candidates[int(torch.stack(apart).argmin())]


class Whole:
    """A batch in one piece: torch's own kernels, and running statistics that a checkpoint does not advance again."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self._layers = Layers(())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which the batch runs."""
        self._layers = Layers(self._models)
        with answered(self._layers, wanted=_WANTED), calls.in_backward(self._again):
            yield

    def forward(self, run_one: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``run_one``, so that calls outside of it are known to be a checkpoint's."""

        def forward(micro_batch: Any) -> Any:
            with calls.in_forward(self._first):
                return run_one(micro_batch)

        return forward

    def _first(self, call: Call) -> Tensor:
        self._layers.count(call, is_new=True)
        return call.by_torch()

    def _again(self, call: Call) -> Tensor | None:
        if not self._layers.may_have(call):
            return None
        self._layers.count(call, is_new=False)
        mean, var = call.running_mean, call.running_var
        return dataclasses.replace(
            call,
            running_mean=None if mean is None else mean.clone(),
            running_var=None if var is None else var.clone(),
        ).by_torch()
