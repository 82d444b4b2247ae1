"""Adds gradients up over processes, once a window, in flat buckets.

Each process has summed its own micro-batches. Their sums are copied into a bucket, where the factor by which processes
differ is multiplied in, and the bucket is reduced while the next one is filled. Afterwards the gradients are views of
the buckets: nothing is copied back. Bytes on the wire for an update: ``2 (W - 1) / W`` times those of the gradients,
however many micro-batches there were.

A parameter that only some processes used is reduced by all of them, zeros where it was not; one that nobody used keeps
no gradient. Which those are is known from `uses`, exchanged before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.sync.ranks import Ranks

BUCKET_BYTES = 32 * 2**20
"""How much is copied at a time, beside the gradients: DDP's 25 MiB, rounded up to a power of two."""

NONE, DENSE, SPARSE = 0, 1, 2
"""How a parameter was used: it has no gradient, or one of this layout. Where processes differ, dense wins."""

_PER_NUMBER = 31  # parameters, of two bits each, in a non-negative 64-bit integer


def uses(parameters: Sequence[nn.Parameter]) -> list[int]:
    """How each parameter was used here, packed into few integers."""
    packed: list[int] = []
    for start in range(0, len(parameters), _PER_NUMBER):
        number = 0
        for i, parameter in enumerate(parameters[start : start + _PER_NUMBER]):
            gradient = parameter.grad
            number |= (NONE if gradient is None else SPARSE if gradient.is_sparse else DENSE) << 2 * i
        packed.append(number)
    return packed


def merged_uses(packed_by_rank: Sequence[Sequence[int]], count: int) -> list[int]:
    """How each of ``count`` parameters was used by anybody."""
    found: list[int] = []
    for i in range(count):
        where, shift = i // _PER_NUMBER, 2 * (i % _PER_NUMBER)
        kinds = {packed[where] >> shift & 3 for packed in packed_by_rank}
        found.append(DENSE if DENSE in kinds else SPARSE if SPARSE in kinds else NONE)
    return found


def num_numbers(count: int) -> int:
    """How many integers `uses` packs ``count`` parameters into."""
    return -(-count // _PER_NUMBER)


def reduce_gradients(
    ranks: Ranks,
    parameters: Sequence[nn.Parameter],
    used: Sequence[int],
    *,
    factor: float | Tensor | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> int:
    """Replaces each ``.grad`` by its sum over all processes.

    Args:
        ranks: the processes.
        parameters: in the same order on all of them.
        used: see `merged_uses`.
        factor: what this process's gradients are multiplied by before.
        bucket_bytes: the most that is reduced at a time.

    Returns:
        How many reductions there were.
    """
    waiting: tuple[list[Any], list[tuple[nn.Parameter, Tensor]]] | None = None
    buckets = _buckets([p for p, kind in zip(parameters, used, strict=True) if kind == DENSE], bucket_bytes)
    for bucket in buckets:
        views = _filled(bucket, factor)
        works = ranks.start_adding_up(views[0][2])
        _finish(waiting, ranks)
        waiting = works, [(parameter, view) for parameter, view, _ in views]
    _finish(waiting, ranks)
    sparse = [p for p, kind in zip(parameters, used, strict=True) if kind == SPARSE]
    for parameter in sparse:
        _add_up_sparse(ranks, parameter, factor)
    return len(buckets) + len(sparse)


def _finish(waiting: tuple[list[Any], list[tuple[nn.Parameter, Tensor]]] | None, ranks: Ranks) -> None:
    if waiting is None:
        return
    works, views = waiting
    for work in works:
        with ranks.watched():
            work.wait()
    for parameter, view in views:
        parameter.grad = view


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters of one device and dtype together, at most ``bucket_bytes`` of them or a single one."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[list[nn.Parameter]]] = {}
    room: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in parameters:
        kind = (parameter.device, _dtype_of_gradient(parameter))
        num_bytes = parameter.numel() * kind[1].itemsize
        if kind not in by_kind or room[kind] < num_bytes:
            by_kind.setdefault(kind, []).append([])
            room[kind] = bucket_bytes
        by_kind[kind][-1].append(parameter)
        room[kind] -= num_bytes
    return [bucket for buckets in by_kind.values() for bucket in buckets]


def _dtype_of_gradient(parameter: nn.Parameter) -> torch.dtype:
    # `grad_dtype` is what a process without a gradient knows of those of the others.
    wanted = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if wanted is None else wanted


def _filled(bucket: Sequence[nn.Parameter], factor: float | Tensor | None) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """Each parameter, its part of the bucket with this process's gradient in it, and the bucket."""
    first = bucket[0]
    flat = torch.zeros(sum(p.numel() for p in bucket), dtype=_dtype_of_gradient(first), device=first.device)
    views: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    offset = 0
    for parameter in bucket:
        part = flat[offset : offset + parameter.numel()]
        view = part.as_strided(parameter.shape, parameter.stride(), offset) if _is_channels_last(parameter) else None
        views.append((parameter, part.view(parameter.shape) if view is None else view, flat))
        offset += parameter.numel()
    present = [(view, p.grad) for p, view, _ in views if p.grad is not None]
    dense = [(view, gradient) for view, gradient in present if not gradient.is_sparse]
    if dense:
        torch._foreach_copy_([view for view, _ in dense], [gradient for _, gradient in dense])
    for view, gradient in present:
        if gradient.is_sparse:  # another process has it dense
            view.copy_(gradient.to_dense())
    if factor is not None:
        flat.mul_(factor.to(flat.device, flat.dtype) if isinstance(factor, Tensor) else factor)
    return views


def _is_channels_last(parameter: Tensor) -> bool:
    """Whether its channels stand last in memory, as its gradient's then should."""
    if parameter.is_contiguous():
        return False
    return any(
        parameter.dim() == dims and parameter.is_contiguous(memory_format=memory_format)
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d))
    )


def _add_up_sparse(ranks: Ranks, parameter: nn.Parameter, factor: float | Tensor | None) -> None:
    """Rows of an embedding that were touched: concatenated, which is how sparse tensors add up."""
    gradient = parameter.grad
    rows = 0 if gradient is None else gradient.coalesce()._nnz()
    counts = [said[0] for said in ranks.exchange([rows])]
    dtype = _dtype_of_gradient(parameter)
    # Every process writes its own rows of one table, and the others' stay zero in it.
    places = torch.zeros(sum(counts), dtype=torch.int64, device=parameter.device)
    values = torch.zeros(sum(counts), *parameter.shape[1:], dtype=dtype, device=parameter.device)
    if gradient is not None and rows:
        start = sum(counts[: ranks.rank])
        gradient = gradient.coalesce()
        places[start : start + rows] = gradient.indices()[0]
        own = gradient.values()
        if factor is not None:
            own = own * (factor.to(own.device, own.dtype) if isinstance(factor, Tensor) else factor)
        values[start : start + rows] = own
    ranks.add_up(places)
    ranks.add_up(values)
    parameter.grad = torch.sparse_coo_tensor(places[None], values, parameter.shape, check_invariants=False).coalesce()
