"""DistributedDataParallel, with its reducer left out: see `engine` for why.

DDP reads whether to reduce in its *forward*, so ``no_sync()`` around a backward does nothing; and even under
``no_sync()`` a forward with ``static_graph=True`` arms the reducer (torch/nn/parallel/distributed.py, `_post_forward`),
and the first one broadcasts buffers, for which a process without data would be waited for. So while DDP is taken over,
calling the wrapper calls the module in it, after the one thing of DDP's forward that users rely on: moving inputs to
``device_ids``. Rank 0's buffers are broadcast each time DDP is taken over: once an update for `TrainStep` and once a
pass for `Accumulator`.

What stands in for the wrapper's forward is a method of its instance, which a copy of the wrapper binds to the copy: an
average of the model that is made inside of a pass has its own weights, and is not taken over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradaccum.errors import UnsupportedError
from gradaccum.sync.engine import Engine


class DDP(Engine):
    """The engine of one `DistributedDataParallel`.

    Raises:
        UnsupportedError: a hook or an option of the wrapper changes gradients on their way.
    """

    name = "DDP"
    is_wrapper = True

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = wrapper
        self._refuse_what_changes_sums()

    @property
    def left_alone(self) -> list[nn.Parameter]:
        """The parameters that it has been told not to reduce: experts, sharded embeddings."""
        ignored = self._wrapper.parameters_to_ignore
        return [parameter for name, parameter in self._wrapper.module.named_parameters() if name in ignored]

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Context manager in which forwards go straight to the module, and no backward reduces.

        Raises:
            UnsupportedError: the wrapper has been given a hook, or another forward, since.
        """
        wrapper = self._wrapper
        if wrapper in _TAKEN_OVER:  # by another accumulator of the same model, which gives it back
            yield
            return
        self._refuse_what_changes_sums()
        own = vars(wrapper).get("forward")
        if own is not None and getattr(own, "__func__", None) is not forward:
            raise UnsupportedError(
                "The forward of the model's DistributedDataParallel has been replaced on the instance, by autocast or "
                "a decorator say. It would reduce gradients by itself in each backward, and they would be reduced "
                "again once an update. Wrap the forward of the module before DistributedDataParallel(module) is made."
            )
        if wrapper.broadcast_buffers and wrapper.modules_buffers:
            wrapper._sync_buffers()
        wrapper.forward = MethodType(forward, wrapper)
        _TAKEN_OVER.add(wrapper)
        try:
            yield
        finally:
            _TAKEN_OVER.discard(wrapper)
            del wrapper.forward

    def _refuse_what_changes_sums(self) -> None:
        wrapper = self._wrapper
        options = {
            "a communication hook": wrapper._comm_hooks,
            "mixed_precision=": wrapper.mixed_precision,
            "delay_all_reduce_named_params=": wrapper._delay_all_reduce_params or wrapper._delay_all_reduce_all_params,
        }
        unusual = next((name for name, value in options.items() if value), None)
        if unusual is not None:
            raise UnsupportedError(
                f"The model's DistributedDataParallel has {unusual}, which changes what is added up over processes. "
                "Gradients are reduced here, once an update and weighted by what each process has, and would go past "
                "it. Leave it out; for lower precision on the way, train in bf16 or use FSDP2's MixedPrecisionPolicy."
            )


_TAKEN_OVER: WeakSet[DistributedDataParallel] = WeakSet()


def forward(self: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
    """The wrapper's forward while it is taken over; pickled by its name, so that a copy is as any other wrapper."""
    if self not in _TAKEN_OVER:  # a copy
        return DistributedDataParallel.forward(self, *inputs, **kwargs)
    if self.device_ids:
        moved, moved_kwargs = self.to_kwargs(inputs, kwargs, self.device_ids[0])
        inputs, kwargs = moved[0], moved_kwargs[0]
    return self._run_ddp_forward(*inputs, **kwargs)


class PlainModule(Engine):
    """The engine of a module that nothing wraps; in its first window that is looked at."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model  # until it has been looked at

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Context manager in which a forward from inside of a `DistributedDataParallel` is an error.

        Raises:
            UnsupportedError: in a forward: the module was handed over, and the loop calls what it is wrapped in.
        """
        model, self._model = self._model, None
        if model is None or model._compiled_call_impl is not None:  # whose code would be compiled anew for a hook
            yield
            return
        handle = model.register_forward_pre_hook(_refuse_inside_of_ddp)
        try:
            yield
        finally:
            handle.remove()


def _refuse_inside_of_ddp(*_: Any) -> None:
    if DistributedDataParallel._active_ddp_module is not None:
        raise UnsupportedError(
            "The plain module was handed over, and it is called through DistributedDataParallel. Both would add up its "
            "gradients over processes: with unequal shares they would be wrong, and with unequal numbers of "
            "micro-batches processes would wait for each other. Pass the DistributedDataParallel as the model."
        )
