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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradaccum import tree
from gradaccum.auditing.bench import Bench
from gradaccum.auditing.gradients import Runs
from gradaccum.auditing.pieces import copied, whole
from gradaccum.auditing.task import Without

_ENLARGED = 3.0
_ROUNDING = {torch.float64: 64 * 2.0**-52, torch.float32: 64 * 2.0**-23}  # in others one step would hide a coupling
"""What sums in another order may differ by, of the largest value: 64 roundings."""


@dataclass(frozen=True, slots=True)
class _Key:
    """A place in the forward: what goes into a module, or comes out of it, and in which of its calls."""

    name: str
    call: int
    is_input: bool


@dataclass(frozen=True, slots=True)
class _Replacement:
    """Which rows become which: row ``of[i]`` stands in the place of row i, times a factor where it is not itself."""

    of: Tensor
    factor: float = 1.0

    @property
    def kept(self) -> Tensor:
        """Rows that stay what they are."""
        is_own = self.of == torch.arange(len(self.of))
        return is_own.nonzero().flatten()


def coupled_modules(runs: Runs, without: Without) -> dict[str, bool]:
    """Names of the modules that couple samples, in the order they run; "" for code around all of them.

    The values tell whether it is the statistics of a batch normalisation in the module's own code.
    """
    rows = runs.task.rows
    clean: dict[_Key, list[Tensor]] = {}
    shapes: dict[_Key, list[tuple[int, ...]]] = {}

    def keep(key: _Key, value: Any, _: str) -> None:
        # Copies: an activation may be overwritten in place by what follows.
        clean[key] = [tensor.detach().clone() for tensor in _floats(value)]

    def keep_shapes(key: _Key, value: Any, _: str) -> None:
        shapes[key] = [tuple(tensor.shape) for tensor in _floats(value)]

    with runs.running(without) as bench, _watched(runs, keep) as running, _BatchNorms(running) as norms:
        _forward(runs, bench, bench.batch())
    with runs.running(without) as bench, _watched(runs, keep_shapes):
        _forward(runs, bench, tree.take(bench.batch(), slice(0, max(rows // 2, 1))), is_whole=False)
    found: dict[str, None] = {}
    for replacement in _replacements(rows):
        with runs.running(without) as bench:
            comparison = _Comparison(clean, shapes, replacement.kept, rows)
            with _watched(runs, comparison):
                _forward(runs, bench, _replaced(bench.batch(), replacement, rows))
            found.update(comparison.found)
    order = {key.name: i for i, key in enumerate(clean)}
    return {name: name in norms.names for name in sorted(found, key=lambda name: order.get(name, -1))}


def _replacements(rows: int) -> list[_Replacement]:
    own = torch.arange(rows)
    neighbour, first_half, last_half = own.clone(), own.clone(), own.clone()
    neighbour[0] = 1
    first_half[: rows // 2] = rows - 1
    last_half[(rows + 1) // 2 :] = 0
    enlarged = own.clone()
    enlarged[-1] = 0
    return [
        _Replacement(neighbour), _Replacement(enlarged, _ENLARGED), _Replacement(first_half), _Replacement(last_half)
    ]  # fmt: skip


def _replaced(batch: Any, replacement: _Replacement, rows: int) -> Any:
    changed = replacement.of != torch.arange(rows)

    def enlarge(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.is_floating_point() and replacement.factor != 1:
            leaf = leaf.clone()
            leaf[changed.to(leaf.device)] *= replacement.factor
        return leaf

    return tree.map_leaves(copied(tree.take(batch, replacement.of)), enlarge)


def _forward(runs: Runs, bench: Bench, batch: Any, *, is_whole: bool = True) -> None:
    """The forward and the loss; without a graph, since only values are compared."""
    task = runs.task
    if is_whole:
        bench.begin(whole(task.rows))
    with torch.no_grad():
        if task.loss_fn is not None:
            task.loss_fn(task.model, batch)
        elif task.forward is not None:
            task.forward(task.model, batch)


@contextmanager
def _watched(runs: Runs, see: Callable[[_Key, Any, str], Any]) -> Iterator[list[str]]:
    """Shows ``see`` what goes into every module and what comes out of it; it may return others in their place.

    Yields:
        The modules that are running, the innermost last.
    """
    calls: dict[str, int] = {}
    running: list[str] = []
    handles: list[Any] = []

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            calls[name] = calls.get(name, -1) + 1
            around = running[-1] if running else ""
            running.append(name)
            return see(_Key(name, calls[name], is_input=True), (args, kwargs), around)

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            while running and running.pop() != name:  # a module that raised, and was caught
                pass
            return see(_Key(name, calls[name], is_input=False), output, name)

        return hook

    for name, module in runs.task.modules().items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


class _BatchNorms(TorchFunctionMode):
    """Notes in which modules ``F.batch_norm`` takes its statistics from the batch."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._running = running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at a function, and runs it."""
        is_training = args[5] if len(args) > 5 else (kwargs or {}).get("training", False)
        if func in (F.batch_norm, torch.batch_norm) and is_training and self._running:
            self.names.add(self._running[-1])
        return func(*args, **(kwargs or {}))


def _floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tree.tensors(value) if tensor.is_floating_point()]


class _Comparison:
    """One forward with replaced samples, held against the clean one.

    Args:
        clean: what the clean one had, by place.
        shapes: the same for fewer rows, which tells the dimension of the samples.
        kept: rows that were not replaced.
        rows: of the batch.
    """

    def __init__(
        self, clean: dict[_Key, list[Tensor]], shapes: dict[_Key, list[tuple[int, ...]]], kept: Tensor, rows: int
    ) -> None:
        self.found: dict[str, None] = {}
        self._clean = clean
        self._shapes = shapes
        self._kept = kept
        self._rows = rows

    def __call__(self, key: _Key, value: Any, blamed: str) -> Any:
        """Compares the rows that were not replaced, and mends them where they differ.

        Args:
            key: where this is.
            value: what goes into a module, or comes out of it.
            blamed: the module whose code made it.
        """
        made, expected, shapes = _floats(value), self._clean.get(key, []), self._shapes.get(key, [])
        if [one.shape for one in expected] != [one.shape for one in made]:
            return None
        mended: list[Tensor] = []
        for i, (before, now) in enumerate(zip(expected, made, strict=True)):
            fixed, is_coupled = self._mended(before, now, shapes[i] if len(shapes) == len(made) else None)
            mended.append(fixed)
            if is_coupled:
                self.found[blamed] = None
        if all(fixed is now for fixed, now in zip(mended, made, strict=True)):
            return None
        remaining = iter(mended)
        return tree.map_leaves(
            value,
            lambda leaf: next(remaining) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        )

    def _mended(self, before: Tensor, now: Tensor, small: tuple[int, ...] | None) -> tuple[Tensor, bool]:
        """The output with its kept rows as they were, and whether they were anything else, but for rounding."""
        views = _views_by_row(before.shape, small, self._rows)
        kept = self._kept.to(now.device)
        both = [(view(before)[kept], view(now)[kept]) for view in views]
        if not views or any(_is_same(theirs, ours) for theirs, ours in both):
            return now, False
        rounded = [_is_same(theirs, ours, slack=_slack(before)) for theirs, ours in both]
        view = views[rounded.index(True) if any(rounded) else 0]
        mended = now.clone()
        view(mended).index_copy_(0, kept, view(before)[kept])
        return mended, not any(rounded)


def _is_same(theirs: Tensor, ours: Tensor, *, slack: float = 0.0) -> bool:
    is_same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    if slack:
        is_same = is_same | ((theirs - ours).abs() <= slack)
    return bool(is_same.all())


def _slack(tensor: Tensor) -> float:
    """What the sums in a tensor may differ by for their rounding."""
    largest = tensor.abs().nan_to_num(0.0, posinf=0.0).max().item() if tensor.numel() else 0.0
    return _ROUNDING.get(tensor.dtype, 0.0) * largest


def _views_by_row(shape: tuple[int, ...], small: tuple[int, ...] | None, rows: int) -> list[Callable[[Tensor], Tensor]]:
    """Ways to see a tensor with the sample first; none where it has no rows, or a pair of them."""
    if small is not None and len(small) == len(shape):
        dimensions = [i for i, (size, less) in enumerate(zip(shape, small, strict=True)) if size != less]
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
