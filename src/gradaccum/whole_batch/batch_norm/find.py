"""The models' BatchNorm layers by name, and those that cannot be taken over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.errors import UnsupportedError
from gradaccum.whole_batch.batch_norm.intercept import Call


@dataclass(frozen=True, slots=True)
class Layer:
    """A BatchNorm layer and its qualified name."""

    name: str
    module: nn.Module


class Layers:
    """Finds the layer that a call came from, by the tensors that it passed."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._by_tensor: dict[int, Layer] = {}
        many = list(models)
        for i, model in enumerate(many):
            for name, module in model.named_modules():
                if not isinstance(module, _BatchNorm):
                    continue
                layer = Layer((f"{i}." if len(many) > 1 else "") + (name or type(module).__name__), module)
                for tensor in (module.running_mean, module.weight, module.bias):
                    if tensor is not None:
                        self._by_tensor.setdefault(id(tensor), layer)

    def of(self, call: Call) -> Layer | None:
        """The layer; None where it has no tensor by which it could be known, or is none of the models'."""
        for tensor in (call.running_mean, call.weight, call.bias):
            if tensor is not None:
                return self._by_tensor.get(id(tensor))
        return None

    def may_have(self, call: Call) -> bool:
        """Whether the call came from one of the layers; True where it has no tensor by which that could be told."""
        return self.of(call) is not None or (call.running_mean is None and call.weight is None and call.bias is None)

    def name(self, call: Call) -> str:
        """The layer's name, or what is known of it."""
        layer = self.of(call)
        return f"a batch norm of {call.input.shape[1]} channels" if layer is None else layer.name

    def key(self, call: Call) -> tuple[str, int]:
        """The same for every call of one layer."""
        known: Tensor | None = call.running_mean if call.running_mean is not None else call.weight
        return self.name(call), call.input.shape[1] if known is None else id(known)


def batch_norms(models: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Every BatchNorm layer of the models."""
    return [module for model in models for module in model.modules() if isinstance(module, _BatchNorm)]


def refuse_compiled(models: Iterable[nn.Module], *, wanted: str) -> None:
    """Refuses models with parts that torch.compile or torch.jit run, past what Python sees.

    Raises:
        UnsupportedError: there are such parts.
    """
    for model in models:
        for name, module in model.named_modules():
            is_compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
            if not (is_compiled or isinstance(module, torch.jit.ScriptModule)) or not _holds_batch_norm(module):
                continue
            by = "torch.compile" if is_compiled else "torch.jit"
            raise UnsupportedError(
                f"{wanted} has to see every BatchNorm call, and {name or type(module).__name__!r} is run by {by}, "
                "which calls its kernels past it: the statistics would be those of each micro-batch, and the gradient "
                "not the whole batch's. Pass the model that has not been compiled; compile parts of it that hold no "
                "BatchNorm, if at all."
            )


def refuse_synchronised(models: Iterable[nn.Module]) -> None:
    """Refuses SyncBatchNorm that exchanges statistics between processes by itself.

    Raises:
        UnsupportedError: there is such a layer, and there are several processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ranks = torch.distributed.get_world_size()
    if ranks > 1 and any(isinstance(layer, nn.SyncBatchNorm) and layer.training for layer in batch_norms(models)):
        raise UnsupportedError(
            f"SyncBatchNorm exchanges the statistics of each micro-batch between {ranks} processes by itself, and "
            "those of the batch's other micro-batches would be missing. Leave batch_norm= out, or use BatchNorm."
        )


def _holds_batch_norm(module: nn.Module) -> bool:
    return any(
        isinstance(part, _BatchNorm) or "BatchNorm" in str(getattr(part, "original_name", ""))  # a scripted layer's
        for part in module.modules()
    )
