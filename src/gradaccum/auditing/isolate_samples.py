"""Layers that see one sample at a time, so that they cannot couple what they cannot see together.

    BatchNorm      its running statistics, or where it keeps none, mean 0 and variance 1
    others         row by row, the outputs put together again

It is not the user's network any more. It is the same on both sides, and shows what is left when a layer is not to
blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.checking.isolate_state import put_state


def isolate_samples(modules: Iterable[nn.Module]) -> None:
    """Replaces the forward of these modules by one that sees one sample at a time.

    To be called inside of `isolated_state`, which puts back every attribute of a module.
    """
    for module in modules:
        is_norm = is_batch_norm(module)
        alone = partial(_batch_norm, module) if is_norm else partial(_row_by_row, module, module.forward)
        vars(module)["forward"] = alone


def is_batch_norm(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's BatchNorm layers, or is named like one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        "batchnorm" in type(module).__name__.lower() and hasattr(module, "eps")
    )


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or variance is None:
        mean, variance = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return F.batch_norm(x, mean.detach(), variance.detach(), weight, bias, training=False, eps=module.eps)


def _row_by_row(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs each row alone; where that is nothing (the deviation of one number), with multiples of itself.

    Every row meets the state that the first one met: through it, too, one could see the others.
    """
    modules = dict(module.named_modules())
    before = {(where, name): buffer.detach().clone() for where, one in modules.items()
              for name, buffer in one.named_buffers(recurse=False)}  # fmt: skip
    rows = next((tensor.shape[0] for tensor in tree.tensors((args, kwargs)) if tensor.dim()), 1)

    def run(row: int, prepare: Callable[[Tensor], Tensor]) -> Any:
        def take(leaf: Any) -> Any:
            has_rows = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows
            return prepare(leaf[row : row + 1]) if has_rows else leaf

        row_args, row_kwargs = tree.map_leaves((args, kwargs), take)
        put_state(modules, before)
        return forward(*row_args, **row_kwargs)

    for prepare in (lambda row: row, _with_multiples):
        try:
            outputs = _joined([run(row, prepare) for row in range(rows)])
        except (RuntimeError, ValueError, IndexError):  # a layer that asks for more than one row
            continue
        if all(bool(one.isfinite().all()) for one in tree.tensors(outputs) if one.is_floating_point()):
            return outputs
    return forward(*args, **kwargs)


def _with_multiples(row: Tensor) -> Tensor:
    # Two others, not one: of two numbers a normalisation makes -1 and 1 whatever they are, and no gradient is left.
    same = row.detach()
    return torch.cat([row, *([2 * same, -same] if row.is_floating_point() else [same, same])])


def _joined(parts: list[Any]) -> Any:
    """The first row of each output, put together; numbers for the whole are averaged."""

    def join(same: Sequence[Tensor]) -> Tensor:
        return torch.cat([one[:1] for one in same]) if same[0].dim() else torch.stack(list(same)).mean()

    joined = map(join, zip(*map(tree.tensors, parts), strict=True))
    return tree.map_leaves(parts[0], lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf)
