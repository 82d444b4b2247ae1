"""DistributedDataParallel, with its reducer left out: see `engine` for why.

DDP reads whether to reduce in its *forward*, so ``no_sync()`` around a backward does nothing; and even under
``no_sync()`` a forward with ``static_graph=True`` arms the reducer (torch/nn/parallel/distributed.py, `_post_forward`),
and the first one broadcasts buffers, for which a process without data would be waited for. So while DDP is taken over,
calling the wrapper calls the module in it, after the one thing of DDP's forward that users rely on: moving inputs to
``device_ids``. Rank 0's buffers are broadcast each time DDP is taken over: once an update for `TrainStep` and once a
pass for `Accumulator`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        self._wrapper = wrapper

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Context manager in which forwards go straight to the module, and no backward reduces."""
        wrapper = self._wrapper
        if "forward" in wrapper.__dict__:  # taken over by another accumulator of the same model, which restores it
            yield
            return
        if wrapper.broadcast_buffers and wrapper.modules_buffers:
            wrapper._sync_buffers()

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            if wrapper.device_ids:
                moved, moved_kwargs = wrapper.to_kwargs(inputs, kwargs, wrapper.device_ids[0])
                inputs, kwargs = moved[0], moved_kwargs[0]
            return wrapper._run_ddp_forward(*inputs, **kwargs)

        wrapper.forward = forward
        try:
            yield
        finally:
            del wrapper.forward
