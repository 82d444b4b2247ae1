"""A window over processes whose gradients somebody else adds up, or nobody yet.

DDP averages gradients in a window's last backward; a loop that wraps nothing leaves each process with its own. With

    G_r = sum_b (w_b / E) grad l_b

of process r, the gradient wanted is  (E / W) sum_r G_r. Everything is linear, so either can be corrected afterwards if
E is the same on all processes, which they agree on when a window begins: the average of R processes is multiplied by
R E / W, and what nobody has added up is added up and multiplied by E / W.

Which of the two it is can be seen: averaged gradients are equal on all processes, bit by bit. Where they are equal
though nobody averaged them, every process has the same G, and both corrections give the same gradient; so gradients
are compared in every window until they were once found to differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup

from gradaccum.losses.normaliser import Number
from gradaccum.sync import faults, flat
from gradaccum.sync.detect import groups_of
from gradaccum.sync.engine import Engine
from gradaccum.sync.ranks import Ranks
from gradaccum.window.over_ranks import OverRanks

_AVERAGE = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FlatParameter", "DTensor"})


class _OfTheLoop(Engine):
    """Whoever reduces the gradients: windows agree on what their totals are taken for, and correct afterwards."""

    name = "a loop of one's own"
    runs_collectives = True


class LeftToTheLoop(OverRanks):
    """A window's way over processes; ``averaged`` says whether gradients are averaged already, None that it is seen."""

    averaged: bool | None = None

    def correct(self, parameters: Sequence[nn.Parameter], correction: Number | None) -> None:
        """Makes each ``.grad`` the sum over all processes, times the correction E / W; None for 1."""
        if self.averaged or (self.averaged is None and _are_equal(self.ranks, parameters)):
            multiply_gradients(parameters, self.ranks.size if correction is None else correction * self.ranks.size)
            return
        self.averaged = False
        used = flat.merged_uses(self.ranks.exchange(flat.uses(parameters)), len(parameters))
        flat.reduce_gradients(self.ranks, parameters, used, factor=correction)

    def report(self, error: BaseException) -> None:
        """Has the other processes hear of an error here, when they find that this one does not answer."""
        faults.report(self.ranks.rank, faults.description(error))


def left_to_the_loop(
    modules: Sequence[nn.Module],
    named: Sequence[tuple[str, nn.Parameter]],
    *,
    averaged: bool | None,
    group: ProcessGroup | DeviceMesh | None,
) -> LeftToTheLoop | None:
    """The processes that train together; None where there is one.

    Args:
        modules: in which wrappers that average are looked for.
        named: the parameters.
        averaged: see `LeftToTheLoop`.
        group: the processes, or a mesh of them; None for the default group, if there is one.

    Raises:
        UnsupportedError: ``group`` is none of these.
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is None:
        return None
    groups = groups_of(group, world)
    if math.prod(one.size() for one in groups) == 1:
        return None
    found = LeftToTheLoop(Ranks(groups, named[0][1].device), [_OfTheLoop()], named)
    found.averaged = _average(modules, named) if averaged is None else averaged
    return found


def multiply_gradients(parameters: Sequence[nn.Parameter], factor: Number | None) -> None:
    """Multiplies each ``.grad`` that is there; None for 1."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor is None or not gradients:
        return
    if isinstance(factor, Tensor):
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
    else:
        torch._foreach_mul_(gradients, factor)


def _average(modules: Sequence[nn.Module], named: Sequence[tuple[str, nn.Parameter]]) -> bool | None:
    """Whether there is a wrapper that averages gradients over processes; None where none is seen."""
    wrappers = itertools.chain.from_iterable(module.modules() for module in modules)
    kinds = {type(module).__name__ for module in wrappers} | {type(parameter).__name__ for _, parameter in named}
    return True if kinds & _AVERAGE or any(hasattr(parameter, "device_mesh") for _, parameter in named) else None


def _are_equal(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all processes have the same gradients, by their sums and norms."""
    gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    own: list[int] = []
    if gradients:
        sums = torch.stack([part for g in gradients for part in (g.double().sum(), g.double().norm())])
        own = sums.cpu().view(torch.int64).tolist()  # by bits: NaN equals NaN
    return all(theirs == own for theirs in ranks.exchange_objects(own))
