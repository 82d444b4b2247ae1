"""What torch and Python keep for each thread, carried into the threads that run micro-batches.

A new thread starts with gradients on, without autocast, on the first device and its default stream, and with no modes
or hooks. Whoever calls the training step under one of these means it for the forward, too. Carried are gradient mode,
autocast with its dtypes, CUDA device and stream, the default device, torch-function and dispatch modes, hooks on saved
tensors, and context variables. Anomaly mode and deterministic algorithms are the process's, and need no carrying.

Not carried: torch.profiler's recording, and modes of torch.func.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch

Result = TypeVar("Result")

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadState:
    """The state of one thread."""

    is_grad_enabled: bool
    autocast: Sequence[tuple[str, bool, torch.dtype]]
    is_autocast_cached: bool
    cuda: tuple[int, Any] | None
    device_context: Any
    function_modes: Sequence[Any]
    dispatch_modes: Sequence[Any]
    saved_tensor_hooks: tuple[Callable[..., Any], Callable[..., Any]] | None
    variables: contextvars.Context

    @staticmethod
    def here(device: torch.device) -> ThreadState:
        """Of the calling thread.

        Args:
            device: the models'.
        """
        types = {"cpu", device.type}
        uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return ThreadState(
            is_grad_enabled=torch.is_grad_enabled(),
            autocast=[(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types],
            is_autocast_cached=torch.is_autocast_cache_enabled(),
            cuda=(torch.cuda.current_device(), torch.cuda.current_stream()) if uses_cuda else None,
            device_context=getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
            function_modes=overrides._get_current_function_mode_stack(),
            dispatch_modes=dispatch._get_current_dispatch_mode_stack(),
            saved_tensor_hooks=_autograd._top_saved_tensors_default_hooks(True),
            variables=contextvars.copy_context(),
        )

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls the function in this thread, under that state; the thread's own is not put back."""
        return self.variables.copy().run(self._run, function)

    def _run(self, function: Callable[[], Result]) -> Result:
        if self.cuda is not None:
            torch.cuda.set_device(self.cuda[0])
            torch.cuda.set_stream(self.cuda[1])
        torch._GLOBAL_DEVICE_CONTEXT.device_context = self.device_context
        with ExitStack() as held:
            held.enter_context(torch.set_grad_enabled(self.is_grad_enabled))
            for kind, is_enabled, dtype in self.autocast:
                if is_enabled:  # the context that nests: leaving an inner one keeps the outer one's cache
                    cached = self.is_autocast_cached
                    held.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            held.enter_context(_modes(self.function_modes, overrides._push_mode, overrides._pop_mode))
            held.enter_context(_modes(self.dispatch_modes, dispatch._push_mode, dispatch._pop_mode))
            if self.saved_tensor_hooks is not None:
                held.enter_context(torch.autograd.graph.saved_tensors_hooks(*self.saved_tensor_hooks))
            return function()


@contextmanager
def _modes(modes: Sequence[Any], push: Callable[[Any], None], pop: Callable[..., Any]) -> Iterator[None]:
    """Puts modes up that are up already elsewhere: their own ``__enter__`` has been called there."""
    for mode in modes:
        push(mode)
    try:
        yield
    finally:
        for _ in modes:
            pop()
