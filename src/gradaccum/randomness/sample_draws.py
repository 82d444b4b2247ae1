"""``TrainStep(randomness="sample")``: what an update draws does not depend on how its batch is cut.

Every draw in a forward is a function of the seed, the update, the number of the draw in its forward, the sample's
position in the global batch, and the element. A piece draws the numbers of its own rows alone, with a counter-based
generator (`philox`). So micro-batch sizes, out-of-memory, splits that reorder, checkpointing, numbers of processes and
resuming make no difference. No generator of torch's moves.

While a batch runs, `SampleDraws` knows its pieces in the order in which they are cut, which is the order in which they
run forward.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum import tree
from gradaccum.errors import GradAccumWarning
from gradaccum.randomness.draw_layouts import Layouts, find_layouts
from gradaccum.randomness.keyed_mode import KeyedMode, MathAttention, Piece, Window
from gradaccum.randomness.philox import key_of
from gradaccum.split.asked import rows_in, samples_in
from gradaccum.types import Rows, Split, num_rows
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.guards import user_stack_level
from gradaccum.window.run_counts import check_state
from gradaccum.window.runner import Ran, Runner
from gradaccum.window.snapshot import RandomState

_OUTSIDE = "Python's random or NumPy"
_COMPILED = "compiled code, which runs uncompiled here"


class SampleDraws:
    """The draws of a run."""

    def __init__(
        self,
        model: Any,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        split: Split,
        is_lockstep: bool,
        is_compiled: bool,
    ) -> None:
        self._is_for_user = False  # the last batch's gradient was left to the user, who steps by hand
        self._model, self._models, self._optimizers = model, models, optimizers
        self._split, self._is_lockstep, self._is_compiled = split, is_lockstep, is_compiled
        self._seed: int | None = None
        self._steps_by_hand = 0
        self._layouts: Layouts | None = None
        self._run_one: Callable[[Any], Any] | None = None
        self._warned: set[str] = {_COMPILED} if not is_compiled else set()
        self._has_looked_outside = False
        self._window: Window | None = None
        self._thread = threading.get_ident()
        self._cut: deque[Tensor] = deque()
        self._start = self._count = 0
        self._device = torch.device("cpu")
        self._after_forward = ExitStack()
        this = weakref.ref(self)  # the optimizer may outlive the step

        def has_stepped(*_: Any) -> None:
            draws = this()
            if draws is not None and draws._is_for_user:
                draws._steps_by_hand += 1

        optimizers[0].register_step_post_hook(has_stepped)

    def begin(self, *, is_for_user: bool) -> None:
        """Called before a batch is cut, which is for an update, or for the user's own step."""
        self._is_for_user = is_for_user
        self.fix_seed()

    def fix_seed(self) -> int:
        """The seed of the run: the first time the one of torch's CPU generator, and what is trained."""
        if self._seed is None:
            shapes = [tuple(p.shape) for one in self._optimizers for group in one.param_groups for p in group["params"]]
            # With the shapes: a discriminator's noise is not the generator's, though both have the same seed.
            high, low = key_of(torch.initial_seed(), zlib.crc32(repr(shapes).encode()))
            self._seed = high << 31 ^ low
        return self._seed

    def state_dict(self) -> dict[str, int]:
        """The seed, and the steps that the user has made by hand."""
        return {"seed": self.fix_seed(), "steps_by_hand": self._steps_by_hand}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on with the draws of the run that ``state_dict()`` is of.

        Raises:
            StateError: it is no such state.
        """
        check_state(state, "seed", "steps_by_hand", of="the draws by sample")
        self._seed, self._steps_by_hand = int(state["seed"]), int(state["steps_by_hand"])

    # --------------------------------------------------------------------------------------- what the runner is made of

    def cut(self, batch: Any, rows: Rows) -> Any:
        """The micro-batch of these rows, whose forward is due after those of what was cut before."""
        position = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.to("cpu", torch.int64)
        self._cut.append(position + self._start)
        return self._split.cut(batch, rows)

    def rows(self, batch: Any) -> int:
        """See `Split`."""
        return rows_in(self._split, batch)

    def samples(self, batch: Any, piece: Rows) -> int | None:
        """See `split.asked.samples_in`."""
        return samples_in(self._split, batch, piece)

    def largest(self, batch: Any) -> int:
        """See `Split`."""
        return self._split.largest(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """See `Split`."""
        return self._split.plan(batch, size, max_rows=max_rows)

    def forward(self, function: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any] | None:
        """A function of a model and a micro-batch, whose draws are the samples'; None where there is none."""
        if function is None:
            return None
        self._run_one = functools.partial(function, self._model)

        @functools.wraps(function)
        def keyed(model: Any, micro_batch: Any) -> Any:
            # Nothing was cut for a batch in one piece, nor for what only keeps other processes company.
            own = self._cut.popleft() if self._cut else torch.arange(tree.rows(micro_batch)) + self._start
            self._count += 1
            with self._running(Piece(self._count, own.to(self._device))):
                return function(model, micro_batch)

        return keyed

    def once(self, batch_loss: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any] | None:
        """``batch_loss``, whose draws are the whole batch's; None where there is none."""
        if batch_loss is None:
            return None

        def keyed(outputs: Any, batch: Any) -> Any:
            with self._running(Piece(0, torch.zeros(0, dtype=torch.int64, device=self._device))):
                return batch_loss(outputs, batch)

        return keyed

    def around(self, runner: Runner) -> Runner:
        """A runner that is made of these parts, in a window for each batch."""
        return _KeyedRunner(runner=runner, draws=self)

    @contextmanager
    def window(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows]) -> Iterator[None]:
        """Context manager in which one batch is run, in these pieces; torch's generators are afterwards as before."""
        before = RandomState.now()
        try:
            with ExitStack() as held:
                if self._is_compiled:
                    held.enter_context(torch.compiler.set_stance("force_eager"))
                self._device, self._thread = accumulation.device(), threading.get_ident()
                self._find_places(accumulation, batch, sum(map(num_rows, pieces)))
                update = accumulation.counts.updates + self._steps_by_hand + 1
                window = Window(name=(self.fix_seed(), update), layouts=self._layouts or {}, notes=set())
                self._window, self._count = window, 0
                self._cut.clear()
                self._after_forward = held.enter_context(ExitStack())
                if self._is_lockstep:  # forwards have threads of their own, and one backward is run in this one
                    self._enter_modes(held, window)
                yield
                self._has_looked_outside = True
                self._warn(window.notes | ({_COMPILED} if self._is_compiled else set()))
        finally:
            self._window = None
            before.restore()

    @contextmanager
    def _running(self, piece: Piece) -> Iterator[None]:
        """Context manager for a piece's forward; leaves a mode for its backward where draws may run again in it."""
        window = self._window
        assert window is not None, "micro-batches run inside of a window"
        is_here = threading.get_ident() == self._thread and not self._is_lockstep
        if is_here:
            self._after_forward.close()
        outside = None if self._has_looked_outside else _outside_state()
        window.begin(piece)
        with ExitStack() as held:
            self._enter_modes(held, window, piece)
            yield
        window.end(piece)
        if outside is not None and outside != _outside_state():
            window.notes.add(_OUTSIDE)
        if is_here and window.backward_draws:
            self._enter_modes(self._after_forward, window)

    def _enter_modes(self, held: ExitStack, window: Window, piece: Piece | None = None) -> None:
        held.enter_context(KeyedMode(window, piece))
        if self._device.type != "cpu":  # whose attention has no kernel with dropout of its own
            held.enter_context(MathAttention())

    def _find_places(self, accumulation: Accumulation, batch: Any, rows: int) -> None:
        """Where this process's rows are in the global batch; the first time also the seed and the layouts."""
        ranks = accumulation.ranks
        self._start = 0 if ranks is None else ranks.rows_before(rows)[0]
        if self._layouts is not None:
            return
        found = None
        if rows and self._run_one is not None and (ranks is None or not ranks.runs_collectives):
            before = RandomState.now()
            found = find_layouts(self._run_one, self._split, batch, models=self._models, device=self._device)
            before.restore()
        seed = self.fix_seed()
        if ranks is not None:  # all take the first process's seed, and what the first one that has rows has found
            everybody = ranks.ranks.exchange_objects((seed, found))
            self._seed = everybody[0][0]
            found = next((theirs for _, theirs in everybody if theirs is not None), None)
        self._layouts, notes = ({}, set()) if found is None else found
        self._warn(notes)

    def _warn(self, notes: set[str]) -> None:
        """Says once what is not keyed."""
        new = sorted(notes - self._warned)
        if not new:
            return
        self._warned |= notes
        warnings.warn(
            f'randomness="sample" does not make these draws a function of the sample: {"; ".join(new)}. They are other '
            "numbers when the batch is cut otherwise, so the run is not the same for every micro-batch size. Draw with "
            "torch's default generator, in shapes with one entry or more for each sample, or leave these as they are: "
            "the gradient is that of a loss with other noise from the same distribution.",
            GradAccumWarning,
            stacklevel=user_stack_level(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyedRunner:
    """A runner whose batches draw by sample."""

    runner: Runner
    draws: SampleDraws

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """See `Runner`."""
        with self.draws.window(accumulation, batch, pieces):
            self.runner.run(accumulation, batch, pieces, ran=ran)


def _outside_state() -> Any:
    numpy: Any = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return random.getstate(), state and (state[1].tobytes(), state[2:])
