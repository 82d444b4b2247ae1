"""A backward that somebody else runs: ``backward=accelerator.backward``, ``fabric.backward``, a function of the user's.

It is called ``function(root, gradient=seed)``, with a 0-d root, and is expected to end in ``root.backward(seed)``. Much
of what it may do on the way would change the sum: Accelerate divides by its number of accumulation steps, Accelerate
and Fabric multiply by a loss scale of their own. So the root has a hook that puts the seed in the place of whatever
arrives: a factor of the function's is undone, and nobody has to know of it. The hook counts as well, since a function
that runs no backward, or two, would change the gradient in silence.

One backward must start from all roots at once: two would have to keep the graph that they share. Several roots, and
roots that are no scalars, become the inputs of one node, whose gradients are their seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from gradaccum.errors import MisuseError


class BackwardFunction(Protocol):
    """Runs the backward of a 0-d tensor that starts with a 0-d gradient."""

    def __call__(self, root: Tensor, /, *, gradient: Tensor) -> Any:
        """Runs it, once."""
        ...


class _Joined(Function):
    """One 0-d root for several: the gradient of each is its seed, times the gradient of the one."""

    @staticmethod
    def forward(ctx: Any, seeds: Sequence[Tensor], *roots: Tensor) -> Tensor:
        ctx.seeds = seeds
        return torch.zeros((), dtype=roots[0].dtype, device=roots[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = zip(ctx.seeds, ctx.needs_input_grad[1:], strict=True)
        return None, *(seed if is_wanted else None for seed, is_wanted in wanted)


def run_given_backward(function: BackwardFunction, roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> None:
    """Has a function run one backward from some roots, each of which starts with its seed whatever the function does.

    Raises:
        MisuseError: it ran no backward of the root that it was given, or more than one.
    """
    if len(roots) == 1 and roots[0].dim() == 0:
        root, seed = roots[0], seeds[0]
    else:
        root = _Joined.apply(tuple(seeds), *roots)
        assert isinstance(root, Tensor)
        seed = torch.ones_like(root)
    times = 0

    def start(_: Tensor) -> Tensor:
        nonlocal times
        times += 1
        return seed

    handle = root.register_hook(start)
    try:
        function(root, gradient=seed)
    finally:
        handle.remove()
    if times != 1:
        effect = "adds nothing to the gradient" if not times else f"counts {times} times in it"
        raise MisuseError(
            f"backward= was called for one micro-batch and ran {times} backwards of the loss that it was given, so the "
            f"micro-batch {effect}. It is called function(root, gradient=seed) and must end in one "
            "root.backward(gradient=seed)."
        )


@contextmanager
def gradients_kept(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Context manager after which these leaves have the gradient they had before; what they get inside is dropped.

    A function of somebody else's cannot be told to leave some leaves out, so their gradients are made for nothing.
    """
    before = [(leaf, leaf.grad) for leaf in leaves]
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient
