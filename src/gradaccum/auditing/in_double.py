"""Computing in float64 whatever the code asks for, so that what differs is not rounding.

Parameters, buffers and the batch are float64 already. What is left are the tensors that code makes or holds by itself:
class weights in a loss, a constant of a module that is no buffer, `logits.float()`, `softmax(dtype=torch.float32)`. So
every operation gets its shorter floats as float64, and where it is asked for a shorter dtype gives float64.

Not seen: what leaves torch (NumPy), kernels written in Triton or CUDA, bits that are reinterpreted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

SHORTER = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchDispatchMode):
    """Runs operations in float64; operations on integers are left alone."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation with longer floats."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or func is torch.ops.aten.view.dtype:
            return func(*args, **kwargs)
        declared = {argument.name: argument for argument in schema.arguments}
        aliases = {name for name, argument in declared.items() if argument.alias_info is not None}
        writes = {name for name in aliases if declared[name].alias_info.is_write}
        kept = aliases if aliases - writes else writes  # a view of another memory would be none
        args = tuple(_longer(value, keeps_tensors=name in kept) for name, value in zip(declared, args, strict=False))
        kwargs = {name: _longer(value, keeps_tensors=name in kept) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _longer(value: Any, *, keeps_tensors: bool) -> Any:
    def longer(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not keeps_tensors and leaf.layout == torch.strided and leaf.dtype in SHORTER:
            return leaf.to(torch.float64)
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf in SHORTER else leaf

    return tree_map(longer, value)


def no_modes() -> Any:
    """Context manager in which operations run as they are: a number that a graph saved reaches a mode as no tensor."""
    return _disable_current_modes()  # nothing public does it


def in_double(tensor: Any) -> Any:
    """A tensor of floats as float64, complex numbers as complex128; anything else as it is."""
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.dtype in SHORTER:
        return tensor.to(torch.float64)
    return tensor.to(torch.complex128) if tensor.dtype == torch.complex64 else tensor
