"""Ctrl-C at each line of an update: all is as before the update or after it, the counters say which, and it goes on.

The interrupt is raised by a trace function, at the first and at the last time that the update runs a line of the
library. Inside of torch's own code, an optimizer's step above all, it is not.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

PACKAGE = os.path.dirname(ga.__file__) + os.sep
X, Y = (torch.randn(10, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for width in (3, 1))


class Line(NamedTuple):
    file: str
    number: int
    time: int  # how often it has run before

    def __str__(self) -> str:
        return f"{self.file}:{self.number}, time {self.time}"


class Training:
    """A model in training, one update after another from the same batch."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1).double()
        self.optimizers = [
            torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
            for parameter in (self.model.parameters() if "two optimizers" in way else ())
        ] or [torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)]
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizers[0], 100)
        options: dict[str, Any] = {"clip_norm": 1.0, "scheduler": scheduler}
        if way.startswith("own loop"):
            self.steps: Any = ga.Accumulator(self.model, self.optimizers, micro_batches=3, **options)
            self.update: Callable[[], Any] = self._loop
        else:
            size = "auto" if "auto" in way else 4
            loss_fn = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
            options["check"] = "off"  # it runs before the first update, and leaves no trace: see tests/checking
            self.steps = ga.TrainStep(self.model, self.optimizers, loss_fn, micro_batch_size=size, **options)
            self.update = lambda: self.steps((X, Y))
        self.update()

    def _loop(self) -> None:
        for rows in self.steps.over([slice(0, 4), slice(4, 8), slice(8, 10)]):
            self.steps.backward(ga.criterion(nn.MSELoss())(self.model(X[rows]), Y[rows]))

    def state(self) -> Tensor:
        momenta = [state["momentum_buffer"] for optimizer in self.optimizers for state in optimizer.state.values()]
        return torch.cat([tensor.detach().flatten() for tensor in (*self.model.parameters(), *momenta)])


def in_a_destructor(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # whose errors Python prints and forgets
            return True
        frame = frame.f_back
    return False


@contextmanager
def traced(at_line: Callable[[Line], None]) -> Iterator[None]:
    """Calls a function before each line of the library that is run."""
    times: dict[tuple[str, int], int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            place = frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_lineno
            times[place] = times.get(place, 0) + 1
            at_line(Line(*place, times[place] - 1))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(training: Training, at: Line) -> bool:
    """One update in which Ctrl-C is pressed at a line; whether it came there."""

    def interrupt(line: Line) -> None:
        if line == at and not in_a_destructor(sys._getframe()):
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        with traced(interrupt):
            training.update()
    except KeyboardInterrupt:
        return True
    return False


def _same(state: Tensor, other: Tensor, way: str) -> bool:
    """Bit by bit; where the size is searched for, up to the rounding of sums in another order."""
    return torch.allclose(state, other, rtol=1e-12, atol=1e-13) if "auto" in way else torch.equal(state, other)


WAYS = ["own loop", "whole batch, two optimizers", "whole batch, auto"]


@pytest.mark.filterwarnings("ignore::gradaccum.DiscardedWindowWarning")
@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_at_any_line_leaves_no_half_state(way: str) -> None:
    undisturbed = Training(way)
    states = [torch.empty(0), undisturbed.state()]
    for _ in range(3):
        undisturbed.update()
        states.append(undisturbed.state())
    lines: list[Line] = []
    with traced(lines.append):
        Training(way).update()
    last = {(line.file, line.number): line for line in lines}
    wrong: list[str] = []
    came = set()
    each = [line for line in lines if line.time == 0 or last[line.file, line.number] == line]
    for at in each[:: 5 if "auto" in way else 1]:  # the search for a size has many, and takes long
        training = Training(way)
        if not interrupted(training, at):
            continue  # a line of what is done once in a run
        updates = training.steps.updates
        came.add(updates)
        if updates not in (1, 2) or not _same(training.state(), states[updates], way):
            wrong.append(f"{at}: the counter says {updates}, the parameters do not")
        if any(parameter.grad is not None for parameter in training.model.parameters()):
            wrong.append(f"{at}: a gradient is left")
        training.update()
        if not _same(training.state(), states[training.steps.updates], way):
            wrong.append(f"{at}: the update after it is another one")
    assert not wrong, "\n".join(wrong)
    assert came == {1, 2}, "it came before and after the step"
