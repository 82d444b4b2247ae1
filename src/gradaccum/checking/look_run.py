"""One side of a look: a few rows, whole or in pieces, through a step's own machinery, from the same state every time.

Before every forward the generators of torch, Python and NumPy are where they were before the look, so that draws made
once a forward are alike. Draws made for each sample are replayed where anything was drawn (`RandomReplay`).
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradaccum import tree
from gradaccum.checking.held_state import CannotLook
from gradaccum.checking.module_outputs import Recording
from gradaccum.checking.no_trace import Watched, no_trace
from gradaccum.checking.pieces import Piece, copied, planned_pieces, whole
from gradaccum.checking.random_ops import Draws
from gradaccum.checking.random_replay import RandomReplay
from gradaccum.checking.step_to_check import StepToCheck
from gradaccum.split.asked import rows_in, samples_in
from gradaccum.types import Rows, Split, num_rows
from gradaccum.whole_batch.batch_norm.layers import batch_norms, frozen
from gradaccum.whole_batch.runners import choose_runner
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.options import Options
from gradaccum.window.parameters import named_parameters
from gradaccum.window.snapshot import RandomState
from gradaccum.window.weights import weights_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How random numbers are drawn on a side."""

    replay: Draws | None = None  # what each sample draws is the same on both sides
    is_alike: bool = False  # and what is drawn once a forward, too
    continues: bool = False  # Python's and NumPy's generators go on from piece to piece

    @property
    def reservation(self) -> str:
        """What the plan line adds."""
        return " with what is drawn once a forward alike" if self.is_alike else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side gave.

    Attributes:
        gradients: of the parameters that require one, by name.
        loss: its value, added up as training adds it up.
        state: buffers, attributes and parameters that its forwards changed, by module and name, as they were left.
    """

    gradients: dict[str, Tensor | None]
    loss: float
    state: dict[tuple[int, str], Tensor]


@dataclass(slots=True)
class Look:
    """The rows at hand, and what their forwards were seen to do.

    Attributes:
        batch: on the device; each side gets a copy.
        atoms: rows that stay together, in the order of the batch.
        names: of the modules that were met, by id.
        modules: the same modules.
        own: ids of those that belong to the step's models.
        draws_tensors: whether torch's generators moved.
        draws_outside: whether Python's or NumPy's did.
    """

    step: StepToCheck
    batch: Any
    atoms: Sequence[Rows]
    names: dict[int, str] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    own: frozenset[int] = frozenset()
    draws_tensors: bool = False
    draws_outside: bool = False
    _start: tuple[RandomState, Any, Any] = field(default_factory=lambda: _generators())

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(map(num_rows, self.atoms))

    def samples(self, sizes: Sequence[int]) -> list[int]:
        """The rows of consecutive pieces of so many atoms."""
        return [num_rows(piece) for piece in self.pieces(sizes)]

    def pieces(self, sizes: Sequence[int]) -> list[Rows]:
        """Consecutive atoms, so many in each piece."""
        found: list[Rows] = []
        for size in sizes:
            before = sum(sizes[: len(found)])
            found.append(_joined(self.atoms[before : before + size]))
        return found

    def run(
        self, sizes: Sequence[int], *, draw: Draw | None = None, recording: Recording | None = None, nudge: float = 0.0
    ) -> Side:
        """One side: pieces of so many atoms.

        Args:
            sizes: of the pieces; one for the rows together.
            draw: how random numbers are drawn.
            recording: records what modules return.
            nudge: by what part of itself each parameter is moved first.
        """
        step, pieces = self.step, self.pieces(sizes)
        with self.running(draw=draw, recording=recording) as (around, split):
            if nudge:
                _nudge(step.models, nudge)
            options = replace(
                step.options,
                loss_fn=around(step.options.loss_fn),
                forward=around(step.options.forward),
                batch_loss=self._around_batch_loss(step.options.batch_loss),
            )
            accumulation = Accumulation(step.models, step.optimizers, Options(), is_look=True)
            runner = choose_runner(options, step.model, step.models, split=split, ranks=None)
            batch = copied(self.batch)
            rows = [num_rows(piece) for piece in pieces]
            totals = None
            if options.weights is not None:
                totals = weights_by_name(options.weights(split.cut(batch, _joined(self.atoms))))
            aside = accumulation.set_aside()
            accumulation.open(totals=totals, first_share=(rows[0], sum(rows)), samples=sum(rows), pieces=len(rows))
            trained = [p for _, p in named_parameters(step.models) if p.requires_grad]
            versions = [p._version for p in trained]
            runner.run(accumulation, batch, pieces, ran=lambda done: None)
            if versions != [p._version for p in trained]:
                raise CannotLook("parameters are changed in a forward or a backward")
            loss = accumulation.close_into_grad(aside)
            gradients = {name: p.grad for name, p in named_parameters(step.models) if p.requires_grad}
            return Side(gradients=gradients, loss=float(loss.value), state=self._watched.changed())

    _watched: Watched = field(init=False)
    _replay: RandomReplay | None = None  # of the run that is going on

    def _around_batch_loss(self, batch_loss: Any) -> Any:
        """Draws of the loss over the whole batch are the same on every side, whatever forwards have drawn before."""
        if batch_loss is None:
            return None

        def call(outputs: Any, batch: Any) -> Any:
            self._rewind(torch_too=self._replay is None, outside=True)
            if self._replay is not None:
                self._replay.begin_loss(whole(self.rows))
            try:
                return batch_loss(outputs, batch)
            finally:
                self._note_draws(watches_torch=self._replay is None)

        return call

    @contextmanager
    def running(
        self, *, draw: Draw | None = None, recording: Recording | None = None
    ) -> Iterator[tuple[Callable[[Any], Any], Split]]:
        """Context manager for one run: what is put round the user's function, and what cuts the batch."""
        step, draw = self.step, draw or Draw()
        noting = _NotingSplit(step.split, self.rows)
        with ExitStack() as held:
            self._watched = watched = held.enter_context(no_trace(step.models, step.functions))
            if step.coupled_batch_norms() and all(one.running_mean is not None for one in batch_norms(step.models)):
                held.enter_context(frozen(step.models))
            replay: RandomReplay | None = None
            self._replay = None
            if draw.replay is not None:
                named = {watched.names[key]: module for key, module in watched.modules.items()}
                replay = self._replay = RandomReplay(draw.replay, named, is_alike=draw.is_alike)
                held.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels draw where nobody sees it
                held.enter_context(replay)
            if recording is not None:
                held.enter_context(recording.held(step.models))
            is_first = True

            def around(function: Any) -> Any:
                if function is None:
                    return None

                @functools.wraps(function)
                def call(model: Any, micro_batch: Any) -> Any:
                    nonlocal is_first
                    if recording is not None:
                        recording.begin()
                    rewind = partial(self._rewind, torch_too=replay is None, outside=is_first or not draw.continues)
                    is_first = False
                    with ExitStack() as forward:
                        if replay is None:
                            rewind()
                        else:
                            forward.enter_context(replay.forward(noting.piece(micro_batch), rewind=rewind))
                        try:
                            return function(model, micro_batch)
                        finally:
                            self._note_draws(watches_torch=replay is None)

                return call

            try:
                yield around, noting
            finally:
                self.names.update(watched.names)
                self.modules.update(watched.modules)
                self.own = watched.own

    def _rewind(self, *, torch_too: bool, outside: bool) -> None:
        of_torch, of_python, of_numpy = self._start
        if torch_too:
            of_torch.restore()
        if outside:
            random.setstate(of_python)
            numpy: Any = sys.modules.get("numpy")
            if numpy is not None and of_numpy is not None:
                numpy.random.set_state(of_numpy)

    def _note_draws(self, *, watches_torch: bool) -> None:
        of_torch, of_python, of_numpy = self._start
        if watches_torch:
            self.draws_tensors |= not of_torch.equals(RandomState.now())
        _, python, numpy = _generators()
        self.draws_outside |= python != of_python or _bytes(numpy) != _bytes(of_numpy)


@dataclass(slots=True)
class _NotingSplit:
    """A split that knows its micro-batches again, by their first tensor."""

    split: Split
    all_rows: int
    _pieces: list[tuple[Tensor, Piece]] = field(default_factory=list)

    def rows(self, batch: Any) -> int:
        return rows_in(self.split, batch)

    def samples(self, batch: Any, piece: Rows) -> int | None:
        return samples_in(self.split, batch, piece)

    def largest(self, batch: Any) -> int:
        return self.split.largest(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        return self.split.plan(batch, size, max_rows=max_rows)

    def cut(self, batch: Any, rows: Rows) -> Any:
        micro_batch = self.split.cut(batch, rows)
        first = next(tree.tensors(micro_batch), None)
        if first is not None and num_rows(rows) < self.all_rows:
            self._pieces.append((first, planned_pieces([rows], first=len(self._pieces) + 1)[0]))
        return micro_batch

    def piece(self, micro_batch: Any) -> Piece:
        """The piece that a micro-batch is."""
        first = next(tree.tensors(micro_batch), None)
        found = next((piece for tensor, piece in reversed(self._pieces) if tensor is first), None)
        if found is None and len(self._pieces) == 1:  # a copy of the only one
            found = self._pieces[0][1]
        return found or whole(self.all_rows)


def _joined(atoms: Sequence[Rows]) -> Rows:
    """Several rows as one piece: a slice where they follow one another."""
    if all(isinstance(one, slice) for one in atoms):
        slices: list[Any] = list(atoms)
        if all(one.stop == other.start for one, other in pairwise(slices)):
            return slice(slices[0].start, slices[-1].stop)
    indices = [torch.arange(one.start, one.stop) if isinstance(one, slice) else one for one in atoms]
    return torch.cat(indices).sort().values


def _generators() -> tuple[RandomState, Any, Any]:
    numpy: Any = sys.modules.get("numpy")
    return RandomState.now(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _bytes(state: Any) -> Any:
    return state and (state[1].tobytes(), state[2:])


def _nudge(models: Sequence[nn.Module], part: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in named_parameters(models):
            if parameter.requires_grad and parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
                parameter.add_(parameter * signs, alpha=part)
