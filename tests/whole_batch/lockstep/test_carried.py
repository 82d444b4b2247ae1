"""What torch and Python keep for each thread is in another thread as in the caller's."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gradaccum.memory.live_bytes import LiveBytes
from gradaccum.whole_batch.lockstep.carried import ThreadState

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def in_another_thread(function: Callable[[], Any]) -> Any:
    state = ThreadState.here(torch.device("cpu"))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(state.run(function)))
    thread.start()
    thread.join()
    return found[0]


def described() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cached": torch.is_autocast_cache_enabled(),
        "device": torch.empty(0).device.type,
        "variable": VARIABLE.get(),
    }


def test_nothing_set() -> None:
    assert in_another_thread(described) == described()


@pytest.mark.parametrize("is_cached", [True, False])
def test_all_of_it(is_cached: bool) -> None:
    token = VARIABLE.set("set")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.float16, cache_enabled=is_cached),
            torch.device("meta"),
        ):
            here = described()
            assert in_another_thread(described) == here
        assert here == {
            "gradients": False,
            "autocast": (True, torch.float16),
            "cached": is_cached,
            "device": "meta",
            "variable": "set",
        }
    finally:
        VARIABLE.reset(token)


def test_modes_see_the_other_threads_operations() -> None:
    seen: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Names(), LiveBytes() as memory:
        kept = in_another_thread(lambda: torch.zeros(1000).exp())
    assert "exp" in seen
    assert memory.current == kept.nbytes


def test_hooks_on_saved_tensors() -> None:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        in_another_thread(x.exp)
    assert packed == [torch.Size([3])]
