"""Which layers couple samples: some are replaced, and what the others give is compared.

In a network that treats samples one by one, replacing a sample changes nothing about the others, to the last bit:
kernels add up each row in the same order whatever the other rows hold. Only where a layer gets another number of rows
(an expert that is chosen less often) may the order be another, which is rounding and nobody's fault. A module whose
other rows change by more, while those of its inputs did not change, is to blame. What it made is then mended (other
rows as they were), be it its output or the input of a module inside of it, so that what comes after gets clean inputs,
and the modules around it are asked for themselves alone: all culprits are found in one pass, and the innermost ones.

Which samples are replaced by what matters: a router with a capacity couples only when it overflows. So a few ways are
tried: one sample by its neighbour, one by itself enlarged, either half of the batch by copies of one of the others.

Not seen: outputs without a dimension of the batch (a loss inside of the model), and those of every pair of samples
(logits of a contrastive model), for which there are no "others". The loss is judged elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradaccum import tree
from gradaccum.auditing.audit_run import Run, Runs, Substitutions, floats_in
from gradaccum.checking.pieces import Piece, copied, whole

_ENLARGED = 3.0
# What sums in another order may differ by, of the largest value: 64 roundings. In shorter dtypes one step would hide a
# coupling.
_ROUNDING = {torch.float64: 64 * 2.0**-52, torch.float32: 64 * 2.0**-23}


class _Place(NamedTuple):
    """A place in the forward: what goes into a module, or comes out of it, and in which of its calls."""

    name: str
    call: int
    is_input: bool


# Is shown each place, what is there, and the module whose code made it; may return something to stand there instead.
_Observer = Callable[[_Place, Any, str], Any]


def coupled_modules(runs: Runs, smaller: Piece, substitutions: Substitutions) -> dict[str, bool]:
    """Returns the names of the modules that couple samples, in the order they run; "" for code around all of them.

    A ``smaller`` batch, one that the user's code can run, tells by its shapes where the samples are.

    The values tell whether it is the statistics of a batch normalisation in the module's own code.
    """
    rows, take = runs.task.rows, runs.task.split.cut
    clean: dict[_Place, list[Tensor]] = {}
    fewer_rows: dict[_Place, list[Tensor]] = {}
    found: dict[str, None] = {}
    with runs.running(substitutions) as run, _BatchNorms(_observe(run, partial(_keep, clean))) as norms:
        _forward(run, whole(rows), run.whole_batch)
    with runs.running(substitutions) as run:
        _observe(run, partial(_keep, fewer_rows))
        _forward(run, smaller, run.cut(smaller))
    for replacing, factor in _replacements(rows):
        kept = (replacing == torch.arange(rows)).nonzero().flatten()
        with runs.running(substitutions) as run:
            _observe(run, _Comparison(clean, fewer_rows, kept, rows, found))
            _forward(run, whole(rows), _replaced(take(run.whole_batch, replacing), replacing, factor))
    order = {place.name: i for i, place in enumerate(clean)}
    return {name: name in norms.names for name in sorted(found, key=lambda name: order.get(name, -1))}


def _replacements(rows: int) -> list[tuple[Tensor, float]]:
    """Which row stands in the place of each, and a factor on those that are not themselves."""
    neighbour, enlarged, first_half, last_half = torch.arange(rows).repeat(4, 1)
    neighbour[0] = 1
    enlarged[-1] = 0
    first_half[: rows // 2] = rows - 1
    last_half[(rows + 1) // 2 :] = 0
    return [(neighbour, 1.0), (enlarged, _ENLARGED), (first_half, 1.0), (last_half, 1.0)]


def _replaced(taken: Any, replacing: Tensor, factor: float) -> Any:
    is_replaced = replacing != torch.arange(len(replacing))

    def enlarge(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.shape[:1] == is_replaced.shape and leaf.is_floating_point():
            leaf[is_replaced.to(leaf.device)] *= factor
        return leaf

    return tree.map_leaves(copied(taken), enlarge)


def _forward(run: Run, piece: Piece, batch: Any) -> None:
    with torch.no_grad():  # only values are compared
        run.call(piece, batch)


def _keep(kept: dict[_Place, list[Tensor]], place: _Place, value: Any, _: str) -> None:
    # Copies: an activation may be overwritten in place by what follows.
    kept[place] = [tensor.detach().clone() for tensor in floats_in(value)]


def _observe(run: Run, observer: _Observer) -> list[str]:
    """Shows the observer what goes into every module and what comes out of it, for the rest of a run.

    Returns the modules that are running at any time, the innermost last.
    """
    calls: dict[str, int] = {}
    running: list[str] = []

    def observe(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            calls[name] = calls.get(name, -1) + 1
            around = running[-1] if running else ""
            running.append(name)
            return observer(_Place(name, calls[name], is_input=True), (args, kwargs), around)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            while running and running.pop() != name:  # a module that raised, and was caught
                pass
            return observer(_Place(name, calls[name], is_input=False), output, name)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    for name, module in run.task.modules().items():  # the hooks go with all attributes of the modules
        observe(name, module)
    return running


class _BatchNorms(TorchFunctionMode):
    """Notes in which modules ``F.batch_norm`` takes its statistics from the batch."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._running = running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function, and looks whether it is that one."""
        is_training = args[5] if len(args) > 5 else (kwargs or {}).get("training", False)
        if func in (F.batch_norm, torch.batch_norm) and is_training and self._running:
            self.names.add(self._running[-1])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Observer that holds one forward with replaced samples against the clean one.

    It compares the rows that were not replaced, mends them where they differ, and notes whose code made them.
    """

    clean: dict[_Place, list[Tensor]]
    fewer_rows: dict[_Place, list[Tensor]]  # whose shapes tell the dimension of the samples
    kept: Tensor  # rows that were not replaced
    rows: int
    found: dict[str, None]  # is filled with modules that couple samples

    def __call__(self, place: _Place, value: Any, made_by: str) -> Any:
        made, expected, smaller = floats_in(value), self.clean.get(place, []), self.fewer_rows.get(place, [])
        if [one.shape for one in expected] != [one.shape for one in made]:
            return None
        small = [one.shape for one in smaller] if len(smaller) == len(made) else [None] * len(made)
        mended = [self._mended(*each, made_by) for each in zip(expected, made, small, strict=True)]
        if all(fixed is now for fixed, now in zip(mended, made, strict=True)):
            return None
        remaining = iter(mended)
        return tree.map_leaves(
            value, lambda leaf: next(remaining) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        )

    def _mended(self, before: Tensor, now: Tensor, small: torch.Size | None, made_by: str) -> Tensor:
        """The tensor with its kept rows as they were; notes who made them, if they are off by more than rounding."""
        kept = self.kept.to(now.device)
        views = _views_by_row(before.shape, small, self.rows)
        differences = [_difference(view(before)[kept], view(now)[kept]) for view in views]
        if not views or min(differences) == 0:
            return now
        slack = _ROUNDING.get(before.dtype, 0.0) * before.abs().nan_to_num(0.0, posinf=0.0).max().item()
        is_rounding = [difference <= slack for difference in differences]
        view = views[is_rounding.index(True) if any(is_rounding) else 0]
        mended = now.clone()
        view(mended).index_copy_(0, kept, view(before)[kept])
        if not any(is_rounding):
            self.found[made_by] = None
        return mended


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two entries; those that are equal, or both not a number, have none."""
    is_same = (one == other) | (one.isnan() & other.isnan())
    apart = (one - other).abs().masked_fill(is_same, 0.0).nan_to_num(torch.inf)
    return apart.max().item() if apart.numel() else 0.0


def _views_by_row(shape: torch.Size, small: torch.Size | None, rows: int) -> list[Callable[[Tensor], Tensor]]:
    """Ways to see a tensor with the sample first; none where it has no rows, or a pair of them."""
    if small is not None and len(small) == len(shape):
        dimensions = [i for i, (size, less) in enumerate(zip(shape, small, strict=True)) if size != less]
        is_of_pairs = [shape[i] for i in dimensions].count(rows) > 1
        if dimensions and dimensions[0] == 0 and shape[0] == rows and not is_of_pairs:  # the rest was padding
            dimensions = [0]
    else:
        dimensions = [0] if shape and shape[0] == rows else []
    if len(dimensions) != 1 or shape[dimensions[0]] % rows:
        return []
    dimension, each = dimensions[0], shape[dimensions[0]] // rows
    if each == 1:
        return [lambda tensor: tensor.movedim(dimension, 0)]
    return [  # flattened with something else, which may stand after the sample or before it
        lambda tensor: tensor.unflatten(dimension, (rows, each)).movedim(dimension, 0),
        lambda tensor: tensor.unflatten(dimension, (each, rows)).movedim(dimension + 1, 0),
    ]
