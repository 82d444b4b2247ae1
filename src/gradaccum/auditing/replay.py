"""Random numbers that do not depend on how a batch is cut: each sample draws what it draws in the whole batch.

Dropout of a micro-batch is another sample of the same noise, no mistake; but it would hide every mistake. So whatever
is drawn is drawn for the whole batch, and a micro-batch gets its own rows of it. Draws are told apart by their number
within a forward, and which dimension holds the samples is seen by comparing shapes: the one that differs between the
whole batch and a micro-batch. A draw whose shape does not depend on the rows at all (one mixup lambda, one permutation,
one depth for all) is one for each forward: micro-batches draw their own, which is what happens in training.

Which piece runs, and the number of its next draw, are the *seed* of the CPU's generator: code that puts the random
state back to run something again (activation checkpointing, two passes) so gets the same numbers again.

Distributions that are sampled by rejection (gamma, beta, poisson) are drawn row by row, where rows come first. Not
replayed: what fits none of this, and Python's and NumPy's generators, which no tensor operation shows. They are
reported where they are used.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.auditing.answers import ANSWERS, seeded
from gradaccum.auditing.pieces import Piece

_MARK = 0x6ACC << 44  # of seeds that are ours
_PIECE, _NUMBER = 20, (1 << 20) - 1
_OF_THE_LOSS = 1 << 19
_SPREAD = 2654435761  # Knuth's multiplicative hash: neighbouring numbers, unlike seeds
_THE_LOSS = "the loss"


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of the whole batch: what drew, its shape, and its other numbers."""

    name: str
    shape: tuple[int, ...]
    numbers: tuple[Any, ...]


@dataclass(slots=True)
class Draws:
    """What the whole batch drew, and what in it belongs to no sample.

    Attributes:
        of_batch: by number within a forward.
        once: where something was drawn once for each forward, with what drew it.
        unmatched: draws whose samples could not be told from the shape.
    """

    of_batch: dict[int, Draw] = field(default_factory=dict)
    once: dict[tuple[str, str], None] = field(default_factory=dict)
    unmatched: dict[tuple[str, str], None] = field(default_factory=dict)


class Replay(TorchDispatchMode):
    """Answers every operation that draws.

    Args:
        draws: filled by a run of the whole batch, and read by those of its pieces.
        modules: by name, to tell which one draws.
        rows: of the whole batch.
        shares: whether what is drawn once for each forward is the same in all of them, to see what difference it makes.
    """

    supports_higher_order_operators = True

    def __init__(self, draws: Draws, modules: Mapping[str, nn.Module], *, rows: int, shares: bool = False) -> None:
        super().__init__()
        self._draws = draws
        self._shares = shares
        self._names = {id(module): name for name, module in modules.items()}
        self._piece = Piece(0, 0, 0)
        self._pieces: dict[int, Piece] = {}
        self._rows = rows
        self._sizes: dict[tuple[int, int], int] = {}
        self._outside: Any = None

    def begin(self, piece: Piece) -> None:
        """A forward of a piece is about to run."""
        self._piece = self._pieces[piece.index] = piece
        torch.default_generator.manual_seed(_MARK | piece.index << _PIECE)
        seed = 0 if self._shares else piece.index
        random.seed(seed)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed)
        self._outside = _outside_state()

    def begin_loss(self, batch: Piece) -> None:
        """The loss over the whole batch is about to be computed: its draws are numbered apart from the forwards'."""
        self._piece = self._pieces[0] = batch
        torch.default_generator.manual_seed(_MARK | _OF_THE_LOSS)

    def end(self) -> None:
        """The forward is done."""
        if self._outside != _outside_state():
            self._draws.once[_THE_LOSS, "Python's random or NumPy"] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation; one that draws gets its numbers from here."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        schema = func._schema
        given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given.update(zip((argument.name for argument in schema.arguments), args, strict=False))
        given.update(kwargs)
        if given.get("train") is False or given.get("training") is False:
            return func(*args, **kwargs)
        name = schema.name.removeprefix("aten::")
        answer = ANSWERS.get(name)
        number, piece = self._next()
        draw = Asked(self, name, number, piece)
        if answer is not None:
            return answer(draw, func, args, kwargs, given)
        return self.as_it_is(draw, func, args, kwargs)

    def _next(self) -> tuple[int, Piece]:
        """The number of the draw that is asked for, and the piece it is for; moves on to the next one."""
        seed = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(seed + 1)
        if seed >> 44 != _MARK >> 44:  # seeded by the user's own code, in every forward alike
            return -1 - seed % _NUMBER, self._piece
        index = (seed ^ _MARK) >> _PIECE
        return seed & _NUMBER, self._pieces.get(index, self._piece)

    def rows_of(self, draw: Asked, shape: tuple[int, ...], numbers: tuple[Any, ...]) -> tuple[int, slice] | None:
        """Which rows of the whole batch's draw these are, and along which dimension; None where it has no rows."""
        if draw.piece.index == 0:
            self._draws.of_batch[draw.number] = Draw(draw.name, shape, numbers)
            return 0, slice(0, shape[0] if shape else 0)
        before = self._draws.of_batch.get(draw.number)
        if before is None or before.name != draw.name or len(before.shape) != len(shape):
            self._note(self._draws.unmatched, draw.name)
            return None
        differ = [i for i, (one, other) in enumerate(zip(before.shape, shape, strict=True)) if one != other]
        if not differ or before.numbers != numbers:
            if draw.piece.rows != self._rows:
                self._note(self._draws.once, draw.name)
            return None
        start = self._start(draw, before.shape[differ[0]], shape[differ[0]])
        if len(differ) > 1 or start is None:
            self._note(self._draws.unmatched, draw.name)
            return None
        return differ[0], slice(start, start + shape[differ[0]])

    def shape_of_batch(self, number: int) -> tuple[int, ...]:
        """The shape the whole batch drew."""
        return self._draws.of_batch[number].shape

    def seed(self, draw: Asked, *, is_shared: bool) -> int:
        """What a draw's generator starts with."""
        own = 0 if is_shared or self._shares else draw.piece.index
        return (draw.number * _SPREAD + own * 7919 + 1) & 0xFFFFFFFF

    @property
    def shares(self) -> bool:
        """Whether all forwards draw alike what they draw once."""
        return self._shares

    def _start(self, draw: Asked, of_batch: int, of_piece: int) -> int | None:
        """Where a piece's rows begin: each sample has as many, or pieces follow one another."""
        self._sizes[draw.number, draw.piece.index] = of_piece
        if of_piece % draw.piece.rows == 0 and of_batch == of_piece // draw.piece.rows * self._rows:
            return of_piece // draw.piece.rows * draw.piece.start
        start = sum(self._sizes.get((draw.number, i), 0) for i in range(1, draw.piece.index))
        return start if start + of_piece <= of_batch else None

    def as_it_is(self, draw: Asked, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of an operation that is not known here, from a seed of its own."""
        shapes = tuple(tuple(value.shape) for value in args if isinstance(value, Tensor))
        sizes: tuple[int, ...] = tuple(args[0]) if args and isinstance(args[0], (list, tuple)) else ()
        first = shapes[0] if shapes else sizes
        rows = self.rows_of(draw, first, ())
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        leading = shapes[0][0] if shapes and shapes[0] else 0
        samples = self._rows if draw.piece.index == 0 else draw.piece.rows
        if leading and leading % samples == 0 and rows is not None and rows[0] == 0:
            return self._row_by_row(draw, func, args, kwargs, leading, draw.piece.start * (leading // samples))
        if rows is not None and draw.piece.index:
            self._note(self._draws.unmatched, draw.name)
        with seeded(self.seed(draw, is_shared=False)):
            return func(*args, **kwargs)

    def _row_by_row(
        self, draw: Asked, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, start: int
    ) -> Any:
        """An operation on rows that are drawn one by one, each from a seed that belongs to it in the whole batch."""
        base = (draw.number * _SPREAD + 1) & 0xFFFFFFFF
        made: list[Any] = []
        for i in range(rows):
            row = [
                value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
                for value in args
            ]
            with seeded(base ^ ((start + i) * 40503 + 1)):
                made.append(func(*row, **kwargs))
        return torch.cat(made)

    def _note(self, where: dict[tuple[str, str], None], name: str) -> None:
        where[self._module(), _what(name)] = None

    def _module(self) -> str:
        """The innermost of the models' modules that is running, found on the stack."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                return self._names[id(owner)]
            frame = frame.f_back
        return _THE_LOSS


@dataclass(frozen=True, slots=True)
class Asked:
    """One draw that is asked for."""

    replay: Replay
    name: str
    number: int
    piece: Piece

    def numbers(
        self, shape: Sequence[int], device: torch.device, fill: Callable[[Tensor, torch.Generator], Any],
        *, other: tuple[Any, ...] = (),
    ) -> Tensor:  # fmt: skip
        """Numbers of this shape, in float64: rows of what the whole batch drew, or its own where there are no rows."""
        shape = tuple(int(size) for size in shape)
        rows = self.replay.rows_of(self, shape, other)
        drawn = shape if rows is None else self.replay.shape_of_batch(self.number)
        made = torch.empty(drawn, dtype=torch.float64, device=device)
        generator = torch.Generator(device)
        generator.manual_seed(self.replay.seed(self, is_shared=rows is not None))
        fill(made, generator)
        return made if rows is None or not shape else made[(slice(None),) * rows[0] + (rows[1],)]


def _what(name: str) -> str:
    plain = name.rstrip("_").removeprefix("_")
    return {"bernoulli": "dropout or torch.bernoulli", "sample_dirichlet": "a Beta or Dirichlet"}.get(
        plain, f"torch.{plain}"
    )


def _outside_state() -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate()
    state = numpy.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2:]
