"""Compiled models: one compilation for micro-batches of every size.

``torch.compile`` takes the first sizes it sees for fixed, and compiles again, for any size, when one changes. A batch
of 23 rows in pieces of 4 and 3 costs two compilations, so does a loader's smaller last micro-batch. Where sizes are
known to differ, dynamo is told before the first forward that index 0 may have any size. Where they are not, nothing is
said: code for one size is faster. A CUDA graph (``mode="reduce-overhead"``) is recorded for each size in any case.

A hint, ``maybe_mark_dynamic``, not ``mark_dynamic``, which raises for a model that looks at the number of its rows. One
row is a case of its own to dynamo, which compiles for it once more. Hints are on the micro-batch's tensors: they are
lost where a loop moves or casts these before the model, and torch then finds out in its usual way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from gradaccum import tree
from gradaccum.errors import BatchError


class AnyNumberOfRows:
    """Tells dynamo about micro-batches whose sizes differ; once they did, for good."""

    def __init__(self) -> None:
        self._differ = False
        self._rows: int | None = None

    def expect(self, sizes: Sequence[int | None], *, is_final: bool = True) -> None:
        """Micro-batches of these sizes are next; later ones too, unless the fastest size is being searched."""
        self._differ = self._differ or not is_final or len(set(sizes)) > 1

    def expect_of(self, stream: Iterable[Any]) -> None:
        """The micro-batches of a stream are next; looks only at what can be seen without reading from it."""
        if isinstance(stream, DataLoader):
            self._differ = self._differ or _may_differ(stream)
        elif isinstance(stream, (list, tuple)):
            with suppress(BatchError):  # which is raised in its place
                self.expect([tree.rows_or_none(micro_batch) for micro_batch in stream])

    def marked(self, micro_batch: Any) -> Any:
        """The micro-batch, its tensors marked where sizes differ, from earlier ones too."""
        if not self._differ:
            rows = tree.rows_or_none(micro_batch)
            if self._rows is None:
                self._rows = rows
            self._differ = rows != self._rows
        if self._differ:
            from torch._dynamo import maybe_mark_dynamic  # there already: it has compiled the model

            for tensor in tree.tensors(micro_batch):
                if tensor.dim():
                    maybe_mark_dynamic(tensor, 0)
        return micro_batch

    def marking(self, function: Any) -> Any:
        """A function of a model and a micro-batch, called with marked ones; anything else as it is."""
        if not callable(function):
            return function
        return functools.wraps(function)(lambda model, micro_batch: function(model, self.marked(micro_batch)))


def any_number_of_rows(models: Iterable[nn.Module], *functions: Callable[..., Any] | None) -> AnyNumberOfRows | None:
    """What tells dynamo about sizes; None where neither modules, at any depth, nor functions are compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second; compiling a model has done so
        return None
    modules = (module for model in models for module in model.modules())
    if any(map(_is_compiled, modules)) or any(map(_is_compiled_function, functions)):
        return AnyNumberOfRows()
    return None


def _is_compiled(module: nn.Module) -> bool:
    from torch._dynamo import OptimizedModule

    if isinstance(module, OptimizedModule):
        return module.dynamo_ctx._dynamic is not False  # dynamic=False: the user wants code for each size
    return module._compiled_call_impl is not None or _is_compiled_function(module.__dict__.get("forward"))


def _is_compiled_function(function: Any) -> bool:
    has_been_wrapped = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return has_been_wrapped and not getattr(function, "_torchdynamo_disable", False)


def _may_differ(loader: DataLoader[Any]) -> bool:
    """Whether micro-batches of a loader have different sizes, as far as can be seen."""
    if loader.batch_size is None:  # a batch sampler of the user's, which has its reasons; or none at all
        return loader.batch_sampler is not None
    if loader.drop_last or not isinstance(loader.sampler, Sized):
        return False
    try:
        return len(loader.sampler) % loader.batch_size != 0
    except TypeError:  # a stream's, which has no length
        return False
