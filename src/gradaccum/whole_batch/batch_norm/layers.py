"""The models' BatchNorm layers: their calls while a batch runs, their names and counts, and which cannot be seen.

Calls are seen at ``torch.nn.functional.batch_norm``: every BatchNorm layer ends there, SyncBatchNorm in one process
too, and so do layers of other libraries that derive from them and go on to an activation (timm's ``BatchNormAct2d``).
Replacing ``forward`` of the layers would lose what such a layer does besides.

Not seen are ``torch.batch_norm`` called directly, a function that was imported by name
(``from torch.nn.functional import batch_norm``), and compiled or scripted layers (`refuse_unseen`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.errors import UnsupportedError
from gradaccum.whole_batch.interception import Handlers, Replacement
from gradaccum.window.closures import is_torchs


@dataclass(frozen=True, slots=True)
class Call:
    """One training-mode call of ``torch.nn.functional.batch_norm``, with its arguments in torch's order."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float

    @property
    def num_values(self) -> int:
        """How many values each channel has."""
        return self.input.numel() // max(self.input.shape[1], 1)

    def without_input(self) -> Call:
        """The same call for keeping until the update, when the input's memory should be free."""
        return dataclasses.replace(self, input=self.input.new_empty(0))

    def by_torch(self) -> Tensor:
        """What torch's own function returns for the call."""
        return _replacement.original(
            self.input, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        found = calls.answer(Call(input, running_mean, running_var, weight, bias, momentum, eps))
        if found is not None:
            return found
    return _replacement.original(input, running_mean, running_var, weight, bias, training, momentum, eps)


# Of the process, as the function that is replaced is.
calls = Handlers()
_replacement = Replacement(F, "batch_norm", _batch_norm)
replaced = _replacement.held


@contextmanager
def answered(layers: Layers, *, wanted: str) -> Iterator[None]:
    """Context manager in which a batch runs whose BatchNorm calls go to `calls`; an error puts the counts back.

    Raises:
        UnsupportedError: calls of the models cannot be seen.
    """
    refuse_unseen(layers.models, wanted=wanted)
    try:
        with replaced():
            yield
    except BaseException:
        layers.undo_counts()
        raise


class Layers:
    """The models' layers during one batch: which of them a call came from, and how often each was called.

    A layer adds one to its ``num_batches_tracked`` in every micro-batch and in every run of a checkpoint. It should be
    one for each call in the forward of the batch, so the counts are set from where they were before; also those of
    ``others``, networks that are run and not trained here.
    """

    def __init__(self, models: Iterable[nn.Module], *, others: Iterable[nn.Module] = ()) -> None:
        self._by_tensor: dict[int, tuple[str, _BatchNorm]] = {}
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a layer: its count, and what it was before
        self._num_calls: Counter[int] = Counter()
        self.models = list(models)
        for i, model in enumerate([*self.models, *others]):
            for name, module in model.named_modules():
                if not isinstance(module, _BatchNorm):
                    continue
                layer = (f"{i}." if len(self.models) > 1 else "") + (name or type(module).__name__), module
                for tensor in (module.running_mean, module.weight, module.bias):
                    if tensor is not None:
                        self._by_tensor.setdefault(id(tensor), layer)
                if module.num_batches_tracked is not None:
                    self._counts[id(module)] = module.num_batches_tracked, module.num_batches_tracked.clone()

    def name(self, call: Call) -> str:
        """The layer's qualified name, or what is known of it."""
        layer = self._of(call)
        return f"a batch norm of {call.input.shape[1]} channels" if layer is None else layer[0]

    def key(self, call: Call) -> tuple[str, int]:
        """What is equal for all calls of one layer."""
        known: Tensor | None = call.running_mean if call.running_mean is not None else call.weight
        return self.name(call), call.input.shape[1] if known is None else id(known)

    def may_have(self, call: Call) -> bool:
        """Whether the call came from one of the layers; True where it has no tensor by which that could be told."""
        return self._of(call) is not None or (call.running_mean is None and call.weight is None and call.bias is None)

    def count(self, call: Call, *, is_new: bool) -> None:
        """Sets the layer's count to that of its calls so far, of which this is one more if it is new."""
        layer = self._of(call)
        if layer is None or call.running_mean is None or id(layer[1]) not in self._counts:
            return
        tracked, before = self._counts[id(layer[1])]
        self._num_calls[id(layer[1])] += is_new
        with torch.no_grad():
            tracked.copy_(before + self._num_calls[id(layer[1])])

    def undo_counts(self) -> None:
        """Puts the counts back to where they were before the batch."""
        with torch.no_grad():
            for tracked, before in self._counts.values():
                tracked.copy_(before)

    def _of(self, call: Call) -> tuple[str, _BatchNorm] | None:
        for tensor in (call.running_mean, call.weight, call.bias):
            if tensor is not None:
                return self._by_tensor.get(id(tensor))
        return None


def batch_norms(models: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Every BatchNorm layer of the models."""
    return [module for model in models for module in model.modules() if isinstance(module, _BatchNorm)]


def refuse_unseen(models: Iterable[nn.Module], *, wanted: str) -> None:
    """Refuses layers whose calls or statistics do not pass through here.

    Raises:
        UnsupportedError: torch.compile or torch.jit runs a part with BatchNorm, past what Python sees; or a
            SyncBatchNorm exchanges statistics between processes itself.
    """
    for model in models:
        for name, module in model.named_modules():
            is_compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
            if not is_compiled and not isinstance(module, torch.jit.ScriptModule):
                continue
            names = (str(getattr(part, "original_name", type(part).__name__)) for part in module.modules())
            if not batch_norms([module]) and not any("BatchNorm" in one for one in names):  # a scripted layer's
                continue
            by = "torch.compile" if is_compiled else "torch.jit"
            raise UnsupportedError(
                f"{wanted} has to see every BatchNorm call, and {name or type(module).__name__!r} is run by {by}, "
                "which calls its kernels past it: the statistics would be those of each micro-batch, and the gradient "
                "not the whole batch's. Pass the model that has not been compiled; compile parts of it that hold no "
                "BatchNorm, if at all."
            )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ranks = torch.distributed.get_world_size()
    if ranks > 1 and any(isinstance(layer, nn.SyncBatchNorm) and layer.training for layer in batch_norms(models)):
        raise UnsupportedError(
            f"SyncBatchNorm exchanges the statistics of each micro-batch between {ranks} processes by itself, and "
            "those of the batch's other micro-batches would be missing. Leave batch_norm= out, or use BatchNorm."
        )


@contextmanager
def all_seen(layers: Iterable[_BatchNorm], *, num_calls: Callable[[], int], wanted: str) -> Iterator[None]:
    """Context manager in which layers with a forward of their own must come to ``torch.nn.functional.batch_norm``.

    Args:
        layers: those of the models.
        num_calls: how many calls this thread has made so far.
        wanted: what needs to see them.

    Raises:
        UnsupportedError: the forward of one, in training mode, has not.
    """
    before = threading.local()

    def begins(layer: nn.Module, args: Any) -> None:
        before.calls = [*getattr(before, "calls", ()), num_calls()]

    def ends(layer: nn.Module, args: Any, output: Any) -> None:
        if before.calls.pop() == num_calls() and layer.training:
            raise UnsupportedError(
                f"{wanted} has to see every BatchNorm call, and {type(layer).__name__}, a BatchNorm with a forward of "
                "its own, normalises without torch.nn.functional.batch_norm: with the statistics of each "
                "micro-batch, and the gradient would not be the whole batch's. Call F.batch_norm in its forward, or "
                "have it see the batch by ga.gather(x), and derive it from nn.Module."
            )

    with ExitStack() as held:
        for layer in layers:
            if not is_torchs(type(layer).forward):
                held.callback(layer.register_forward_pre_hook(begins).remove)
                held.callback(layer.register_forward_hook(ends).remove)
        yield


@contextmanager
def frozen(models: Iterable[nn.Module], *, others: Callable[[], Iterable[nn.Module]] = tuple) -> Iterator[None]:
    """Context manager in which running statistics normalise, and stay; the layers' weights and biases train on.

    The BatchNorm layers are in evaluation mode, and nothing else is: not what a layer holds besides. Those of
    ``others``, networks that are run and not trained here, are too, if they have running statistics.

    Raises:
        UnsupportedError: a layer has no running statistics.
    """
    layers = batch_norms(models)
    without = [layer for layer in layers if layer.running_mean is None]
    if without:
        raise UnsupportedError(
            f'batch_norm="frozen" normalises with running statistics, and {len(without)} of {len(layers)} BatchNorm '
            "layers have none (track_running_stats=False): they would go on with each micro-batch's own. Use "
            'batch_norm="exact".'
        )
    layers.extend(layer for layer in batch_norms(others()) if layer.running_mean is not None)
    training = [layer for layer in layers if layer.training]
    try:
        for layer in training:
            layer.training = False
        yield
    finally:
        for layer in training:
            layer.training = True
