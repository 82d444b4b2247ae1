"""Hygiene for every test: a known start, and nothing left behind.

A test starts from the same seed. What it sets for the whole process (default dtype, number of threads) is put back;
what it may not leave changed at all (running threads, gradient mode, process groups, the environment) fails it.
"""

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

# Before torch is imported: compiling in this process leaves no pool of worker threads behind, and starts faster.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch

SEED = 0
SECONDS_TO_END = 2.0  # that a thread which was told to end may still take

# Lazily made once in a process, and kept by torch and its libraries on purpose.
KEPT_VARIABLES = ("TORCH", "_TORCH", "TRITON", "PYTEST_", "KMP_", "COLUMNS", "LINES")


class _TorchRandom:
    """torch's generator as hypothesis wants it: every example starts from the same seed, so a failing one replays.

    For other numbers in every example draw a seed: ``torch.manual_seed(data.draw(st.integers(0, 999)))``.
    """

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(_TORCH_RANDOM)

# No deadlines: how long an example takes says nothing on a shared machine. In CI the same examples every time, so that
# a change fails for what it changed; elsewhere new ones every time.
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=50, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **_COMMON)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure() -> None:
    # One thread: the tensors are tiny, and the tests themselves run side by side.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _known_start() -> Iterator[None]:
    """The same seeds for every test; default dtype and number of threads are put back after it."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    dtype, num_threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _nothing_left_behind(_known_start: None) -> Iterator[None]:
    """Fail a test that leaves threads, a changed mode, a process group or environment variables."""
    threads, modes, environment = set(threading.enumerate()), _modes(), _environment()
    yield
    left: list[str] = [f"thread {thread.name!r} still runs" for thread in _leaked_threads(threads)]
    left += [f"{name} is {now}, was {modes[name]}" for name, now in _modes().items() if now != modes[name]]
    now = _environment()
    left += [f"environment variable {key} was changed" for key in sorted(now.keys() | environment.keys())
             if now.get(key) != environment.get(key)]  # fmt: skip
    torch.set_grad_enabled(modes["grad mode"])
    if torch.are_deterministic_algorithms_enabled() != modes["deterministic algorithms"]:  # the call loads inductor
        torch.use_deterministic_algorithms(modes["deterministic algorithms"])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        left.append("the process group was not destroyed")
        torch.distributed.destroy_process_group()
    if left:
        pytest.fail("left behind by this test: " + "; ".join(left), pytrace=False)


def _modes() -> dict[str, Any]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast nesting": _autocast_nesting(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "default device": str(torch.get_default_device()),
    }


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(KEPT_VARIABLES)}


def _leaked_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """The threads that were not there before and do not end by themselves within `SECONDS_TO_END`."""
    leaked = _threads_since(before)
    if leaked:
        gc.collect()  # an abandoned iterator of a DataLoader ends its threads when it is collected
        end = time.monotonic() + SECONDS_TO_END
        for thread in leaked:
            thread.join(timeout=max(0.0, end - time.monotonic()))
        leaked = _threads_since(before)
    return leaked


def _threads_since(before: set[threading.Thread]) -> list[threading.Thread]:
    # tqdm keeps one monitor for the whole process; a dummy stands for a thread of autograd's that ran Python once.
    kept = "TMonitor", "_DummyThread"
    return [t for t in threading.enumerate() if t not in before and type(t).__name__ not in kept]
