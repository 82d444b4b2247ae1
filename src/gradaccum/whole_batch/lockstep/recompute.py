"""Repeated blocks of a model, found by themselves, and run again in the backward instead of kept.

In lockstep the graphs of all micro-batches are alive, as the whole batch's would be. With each block behind a
checkpoint (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174) what waits for the
backward is the blocks' inputs, and what one block makes while it is run again.

A block is a child of a ``Sequential`` or a ``ModuleList`` that has children itself: a residual block, a transformer
layer. Where blocks nest there is a choice: few large ones keep little and make much again at once, many small ones the
other way round. Counted in layers, as if each made a tensor of one size, the level is taken with the least

    blocks + layers outside of blocks + layers of the largest block

Layers over the batch meet nobody while they are run again: they take what their forward had got (`batch_norm.exact`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from gradaccum.errors import UnsupportedError


def find_blocks(models: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks to be run again; none is part of another.

    Raises:
        UnsupportedError: there are none.

    Example:
        >>> from gradaccum.whole_batch.lockstep.recompute import find_blocks
        >>> def layer():
        ...     return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
        >>> model = nn.Sequential(layer(), layer(), layer(), nn.Linear(2, 1))
        >>> find_blocks([model]) == list(model[:3])
        True
    """
    many = list(models)
    num_layers = sum(_num_layers(model) for model in many)
    level = [block for model in many for block in _outermost(model)]
    levels: list[list[nn.Module]] = []
    while level:
        levels.append(level)
        inner = [_outermost(block) for block in level]
        if not any(inner):
            break
        level = [found for block, within in zip(level, inner, strict=True) for found in (within or [block])]
    if not levels:
        raise UnsupportedError(
            'activations="recompute" runs the repeated blocks of the model again in the backward, and found none: no '
            "nn.Sequential or nn.ModuleList has children that are made of layers themselves. Nothing would be saved. "
            'Use activations="host", or torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in the model.'
        )
    return min(levels, key=lambda blocks: _layers_alive(blocks, num_layers))


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While held, these modules keep their inputs alone, and run again in the backward."""
    from torch.utils.checkpoint import checkpoint  # only here: training without it does not wait for the import

    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        # On the instance, past hooks, which stay outside. Not noted as the micro-batch's: set before any runs.
        block.__dict__["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _outermost(module: nn.Module) -> list[nn.Module]:
    """The composite children of containers within, none part of another."""
    found: list[nn.Module] = []
    for child in module.children():
        is_composite = next(child.children(), None) is not None
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and is_composite:
            found.append(child)
        else:
            found.extend(_outermost(child))
    return list(dict.fromkeys(found))


def _num_layers(module: nn.Module) -> int:
    return sum(next(part.children(), None) is None for part in module.modules())


def _layers_alive(blocks: Sequence[nn.Module], num_layers: int) -> int:
    sizes = [_num_layers(block) for block in blocks]
    return len(blocks) + num_layers - sum(sizes) + max(sizes)
