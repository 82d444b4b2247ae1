"""Frameworks set variables of the environment and keep states of the whole process: both are put back."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when it is imported; else a thread waits


@pytest.fixture(autouse=True)
def _frameworks_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    state = sys.modules.get("accelerate.state")
    if state is not None:
        for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
            kind._reset_state()
