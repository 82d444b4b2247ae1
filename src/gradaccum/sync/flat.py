"""Adds gradients up over processes, once a window, in flat buckets.

Each process has summed its own micro-batches. Their sums are copied into a bucket, the factor by which processes differ
is multiplied in, and the bucket is reduced while the next one is filled. Afterwards the gradients are views of the
buckets: nothing is copied back. Bytes on the wire for an update: ``2 (W - 1) / W`` times those of the gradients,
however many micro-batches there were.

A parameter that only some processes used is reduced by all of them, zeros where it was not; one that nobody used keeps
no gradient. Which those are is known from `uses`, which the processes exchange before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.sync.ranks import Ranks

BUCKET_BYTES = 32 * 2**20
"""How much is copied at a time, beside the gradients: DDP's 25 MiB, rounded up to a power of two."""


class Use(IntEnum):
    """How a parameter was used: the layout of its gradient, if it has one. Of several processes the largest counts."""

    NONE = 0
    SPARSE = 1
    DENSE = 2


def uses(parameters: Sequence[nn.Parameter]) -> list[Use]:
    """How each parameter was used here."""
    return [Use.NONE if p.grad is None else Use.SPARSE if p.grad.is_sparse else Use.DENSE for p in parameters]


def merged_uses(by_rank: Sequence[Sequence[int]], count: int) -> list[int]:
    """How each of ``count`` parameters was used by anybody."""
    return [max(uses) for uses in zip(*by_rank, strict=True)][:count]


def reduce_gradients(
    ranks: Ranks, parameters: Sequence[nn.Parameter], used: Sequence[int], *, factor: float | Tensor | None = None
) -> None:
    """Replaces each ``.grad``, times this process's factor, by its sum over all processes.

    ``parameters`` have the same order on all of them, and ``used`` is how any process used each.
    """
    reducing: deque[Callable[[], None]] = deque()
    for bucket in _buckets([p for p, use in zip(parameters, used, strict=True) if use == Use.DENSE]):
        reducing.append(_start_reducing(ranks, bucket, factor))
        if len(reducing) > 1:  # no more than two: until one is done, it and its gradients both take memory
            reducing.popleft()()
    for finish in reducing:
        finish()
    for parameter, use in zip(parameters, used, strict=True):
        if use == Use.SPARSE:
            _add_up_sparse(ranks, parameter, factor)


def multiply(parameters: Sequence[nn.Parameter], factor: float | Tensor | None) -> None:
    """Multiplies gradients that are not reduced; None for by nothing."""
    for gradient in (parameter.grad for parameter in parameters if factor is not None):
        if gradient is not None and factor is not None:
            gradient.mul_(_on(factor, gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one device and dtype together, at most `BUCKET_BYTES` of them or a single one."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[list[nn.Parameter]]] = {}
    room: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in parameters:
        kind = (parameter.device, _dtype_of_gradient(parameter))
        num_bytes = local_part(parameter).numel() * kind[1].itemsize
        if kind not in by_kind or room[kind] < num_bytes:
            by_kind.setdefault(kind, []).append([])
            room[kind] = BUCKET_BYTES
        by_kind[kind][-1].append(parameter)
        room[kind] -= num_bytes
    return [bucket for buckets in by_kind.values() for bucket in buckets]


def _dtype_of_gradient(parameter: nn.Parameter) -> torch.dtype:
    # `grad_dtype` is what a process without a gradient knows of those of the others.
    wanted = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if wanted is None else wanted


def _start_reducing(ranks: Ranks, bucket: Sequence[nn.Parameter], factor: float | Tensor | None) -> Callable[[], None]:
    """Fills a bucket and starts its reduction; returns what waits for it and puts its parts in the gradients' place."""
    parts = [local_part(parameter) for parameter in bucket]
    flat = torch.zeros(sum(p.numel() for p in parts), dtype=_dtype_of_gradient(bucket[0]), device=bucket[0].device)
    views: list[Tensor] = []
    for own, part in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        # Autograd's layout, the parameter's own (channels last, say), without gaps or elements that share memory.
        strides = torch.empty_like(own, device="meta").stride()
        views.append(part.as_strided(own.shape, strides))
    present = [(view, _local_gradient(p)) for view, p in zip(views, bucket, strict=True) if p.grad is not None]
    if present:  # sparse gradients are here where another process has them dense
        gradients = [gradient.to_dense() if gradient.is_sparse else gradient for _, gradient in present]
        torch._foreach_copy_([view for view, _ in present], gradients)
    if factor is not None:
        flat.mul_(_on(factor, flat))
    wait = ranks.start_adding_up(flat)

    def finish() -> None:
        wait()
        for parameter, view in zip(bucket, views, strict=True):
            parameter.grad = _like(parameter, view)

    return finish


def local_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: with tensor parallelism a part of it."""
    whole: Any = parameter
    return whole.detach().to_local() if hasattr(whole, "to_local") else parameter


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """What this process has of a gradient, cut as the parameter is; tensor parallelism may leave sums to be made."""
    gradient: Any = parameter.grad
    if not hasattr(gradient, "to_local"):
        return gradient
    placements: Any = getattr(parameter, "placements")  # noqa: B009 - of DTensors alone
    return gradient.redistribute(placements=placements).to_local()


def _like(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The local part of a gradient as the parameter's kind of tensor."""
    if not hasattr(parameter, "to_local"):
        return values
    from torch.distributed.tensor import DTensor  # takes 0.3 s to import, and is there where there is one

    whole: Any = parameter
    return DTensor.from_local(
        values, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _on(factor: float | Tensor, tensor: Tensor) -> float | Tensor:
    return factor.to(tensor.device, tensor.dtype) if isinstance(factor, Tensor) else factor


def _add_up_sparse(ranks: Ranks, parameter: nn.Parameter, factor: float | Tensor | None) -> None:
    """Adds up the rows of an embedding that were touched, by concatenation, which is how sparse tensors add up."""
    gradient = None if parameter.grad is None else parameter.grad.coalesce()
    rows = 0 if gradient is None else gradient._nnz()
    counts = [numbers[0] for numbers in ranks.exchange([rows])]
    # Every process writes its own rows of one table, whose other rows are zero. That moves twice the bytes of an
    # all-gather, which takes equal counts only.
    places = torch.zeros(sum(counts), dtype=torch.int64, device=parameter.device)
    values = torch.zeros(
        sum(counts), *parameter.shape[1:], dtype=_dtype_of_gradient(parameter), device=parameter.device
    )
    if gradient is not None:
        own = slice(sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1]))
        places[own] = gradient.indices()[0]
        values[own] = gradient.values() if factor is None else gradient.values() * _on(factor, values)
    ranks.add_up(places)
    ranks.add_up(values)
    parameter.grad = torch.sparse_coo_tensor(places[None], values, parameter.shape, check_invariants=False).coalesce()
