"""State that forwards change: buffers and frozen parameters of the models, and BatchNorms whoever owns them.

What one forward leaves behind for the next (codebooks, queues, centres, power iterations) advances once for each
micro-batch instead of once for the batch. Torch counts the changes of each tensor (``_version``), so the first window
tells for nothing which of them a forward moves. A BatchNorm in training mode is a node of the first loss's graph,
whether its module belongs to the models or to another one that the loss reaches.

Not seen: state that is neither a buffer nor a parameter of the models, and layers whose statistics are hand-made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.gradients.graph import read_graph

_BATCH_NORMS = frozenset(
    {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0", "BatchNormBackward0"}
)
_MAX_SHOWN = 3


class ForwardState:
    """Notes what forwards change until one window of several micro-batches has been seen."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self._before: dict[str, tuple[Tensor, int]] = {}
        self._changed: set[str] = set()
        self._foreign: list[str] = []
        self._has_read = False
        self.is_looking = True

    def window_begins(self) -> None:
        """Notes the state before the window's first forward."""
        self._before = {name: (tensor, tensor._version) for name, tensor in _state_of(self._models)}
        self._changed, self._foreign, self._has_read = set(), [], False

    def has_run(self, roots: Sequence[Tensor]) -> None:
        """Compares after a forward, and before its backward; reads the graph of the window's first."""
        for name, tensor in _state_of(self._models):
            before, version = self._before.get(name, (tensor, tensor._version))
            # A buffer that was replaced by one of another shape, or by an equal one, is a cache.
            if before is tensor:
                if tensor._version != version:
                    self._changed.add(name)
            elif before.shape == tensor.shape and not torch.equal(before, tensor):
                self._changed.add(name)
        if not self._has_read:
            self._has_read = True
            self._foreign = list(_foreign_batch_norms(self._models, roots))

    def window_complete(self, micro_batches: int) -> str:
        """What to warn of before the window's update; empty where nothing is."""
        if micro_batches < 2:
            return ""
        self.is_looking = False
        self._before = {}
        several = f"{micro_batches} times an update instead of once"
        texts = []
        if self._changed:
            texts.append(
                f"{_shown(sorted(self._changed))} changed in a forward, so that each micro-batch meets another state "
                f"and it advances {several}: the gradient is not the whole batch's. Let it advance once an update, "
                "after the update is made; or freeze it."
            )
        if self._foreign:
            texts.append(
                f"{_shown(self._foreign)} ran in training mode inside of the loss, and normalises each micro-batch "
                "with its own statistics, not the batch's, so the gradient is not the whole batch's. Put it into eval "
                "mode for this loss, or use GroupNorm or LayerNorm."
            )
        return " ".join(texts)


def _state_of(models: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Buffers and frozen parameters by name; not BatchNorm's, which are told by name already, nor mere counters."""
    for model in models:
        for prefix, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                continue
            kept = [*module._buffers.items(), *((n, p) for n, p in module._parameters.items() if _is_frozen(p))]
            for name, tensor in kept:
                if tensor is not None and not tensor.is_inference() and (tensor.dim() or tensor.is_floating_point()):
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def _is_frozen(parameter: Tensor | None) -> bool:
    return parameter is not None and not parameter.requires_grad


def _foreign_batch_norms(models: Sequence[nn.Module], roots: Sequence[Tensor]) -> Iterator[str]:
    """BatchNorms in training mode that a graph has and that are no BatchNorm modules of the models."""
    own = [module for model in models for module in model.modules() if isinstance(module, _BatchNorm)]
    known = {id(module.weight) for module in own} | {id(module.running_mean) for module in own} - {id(None)}
    # Without a weight that trains, nothing in the graph leads to the module.
    has_bare = any(module.weight is None or not module.weight.requires_grad for module in own)
    names = {id(parameter): name for model in models for name, parameter in model.named_parameters()}
    graph = read_graph(roots)
    for node in graph.readers:
        node: Any
        if node.name() not in _BATCH_NORMS or not getattr(node, "_saved_training", True):
            continue
        # Of its output, which is its input's. What is saved may not be there: a checkpoint would run for it.
        shape = node._input_metadata[0].shape
        if shape[0] == 1:  # what instance normalisation is computed as
            continue
        leaf = graph.leaves.get(node.next_functions[1][0]) if len(node.next_functions) > 1 else None
        if (leaf is None and has_bare) or id(leaf) in known:
            continue
        features = f"a BatchNorm of {shape[1]} features"
        yield f"{features} ({names[id(leaf)]})" if id(leaf) in names else f"{features} that is not among the models"


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
