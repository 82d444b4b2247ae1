"""Layers made harmless: one sample at a time, so that they cannot couple what they cannot see together.

    BatchNorm      its running statistics, or where it keeps none, mean 0 and variance 1
    others         run row by row, the outputs put together again

It is not the user's network any more. It is the same on both sides, and tells what is left when a layer is not to
blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.auditing.task import Task


@contextmanager
def neutralised(task: Task, names: frozenset[str]) -> Iterator[None]:
    """Replaces the forward of the named modules; to be held inside of `on_copies`, which puts back what is there."""
    modules = task.modules()
    for name in names:
        module = modules[name]
        vars(module)["forward"] = _batch_norm(module) if is_batch_norm(module) else _row_by_row(module.forward)
    try:
        yield
    finally:
        for name in names:
            vars(modules[name]).pop("forward", None)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is one of torch's BatchNorm layers, or calls itself one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        "batchnorm" in type(module).__name__.lower() and hasattr(module, "eps")
    )


def _batch_norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if mean is None or variance is None:
            mean, variance = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return F.batch_norm(
            x, mean.detach(), variance.detach(), getattr(module, "weight", None), getattr(module, "bias", None),
            training=False, eps=module.eps,
        )  # fmt: skip

    return forward


def _row_by_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Each row by itself; where that is nothing (the deviation of one number), with multiples of itself."""

    def by_row(*args: Any, **kwargs: Any) -> Any:
        sizes = [tensor.shape[0] for tensor in tree.tensors((args, kwargs)) if tensor.dim()]
        rows = sizes[0] if sizes else 1

        def made(row: Callable[[Tensor], Tensor]) -> Any:
            def run(i: int) -> Any:
                def take(leaf: Any) -> Any:
                    has_rows = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows
                    return row(leaf[i : i + 1]) if has_rows else leaf

                some, more = tree.map_leaves((args, kwargs), take)
                return forward(*some, **more)

            return _joined([run(i) for i in range(rows)])

        for row in (_alone, _in_company):
            try:
                outputs = made(row)
            except (RuntimeError, ValueError, IndexError):  # a layer that asks for more than one row
                continue
            if all(bool(one.isfinite().all()) for one in tree.tensors(outputs) if one.is_floating_point()):
                return outputs
        return forward(*args, **kwargs)

    return by_row


def _alone(row: Tensor) -> Tensor:
    return row


def _in_company(row: Tensor) -> Tensor:
    # Two others, not one: of two numbers a normalisation makes -1 and 1 whatever they are, and no gradient is left.
    company = row.detach()
    others = [2 * company, -company] if row.is_floating_point() else [company, company]
    return torch.cat([row, *others])


def _joined(parts: list[Any]) -> Any:
    """The first row of each output, put together; numbers for the whole are averaged."""
    flat = [list(tree.tensors(part)) for part in parts]
    joined = iter(
        [
            torch.cat([one[:1] for one in same]) if same[0].dim() else torch.stack(same).mean()
            for same in zip(*flat, strict=True)
        ]
    )
    return tree.map_leaves(parts[0], lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf)
