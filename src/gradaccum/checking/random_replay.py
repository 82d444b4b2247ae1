"""Random numbers that do not depend on how a batch is cut: each sample draws what it draws in the whole batch.

Dropout of a micro-batch is another sample of the same noise, no mistake; but it would hide every mistake. So every
operation that draws is answered by `random_ops`, and draws are told apart by their number within a forward.

Which piece runs, and the number of its next draw, are the *seed* of the CPU's generator: code that puts the random
state back to run something again (activation checkpointing, two passes) so gets the same numbers again.

Not replayed: draws whose samples cannot be told from their shape, and Python's and NumPy's generators, which no tensor
operation shows. They are reported where they are used.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.checking.pieces import Piece, whole
from gradaccum.checking.random_ops import ONCE, RANDOM_OPS, Draws, RandomCall

# Seeds that are ours: a mark in the bits from 44 on, the index of a piece in those from 20 on, the number of the draw.
_MARK = 0x6ACC << 44
_PIECE, _NUMBER = 20, (1 << 20) - 1
_OF_THE_LOSS = 1 << 19
_THE_LOSS = "the loss"


class RandomReplay(TorchDispatchMode):
    """Dispatch mode that answers every operation that draws.

    A run of the whole batch fills ``draws``, and runs of its pieces read them. With ``is_alike``, what is drawn once
    for each forward is the same in all of them, to see what difference it makes.
    """

    supports_higher_order_operators = True

    def __init__(self, draws: Draws, modules: Mapping[str, nn.Module], *, is_alike: bool = False) -> None:
        super().__init__()
        self._draws = draws
        self._is_alike = is_alike
        self._names = {id(module): name for name, module in modules.items()}
        self._piece = whole(draws.rows)
        self._pieces: dict[int, Piece] = {}
        self._open = 0  # forwards that have begun and not ended: several in lockstep

    @contextmanager
    def forward(self, piece: Piece, *, rewind: Callable[[], None] | None = None) -> Iterator[None]:
        """Context manager around the forward of a piece, or of the whole batch.

        ``rewind`` puts Python's and NumPy's generators where they are to be; without it they are seeded by the piece.
        """
        self._begin(piece, 0)
        self._open += 1
        if rewind is None:
            self._seed_outside(0 if self._is_alike else piece.index)
        else:
            rewind()
        before = _outside_state()
        try:
            yield
        finally:
            self._open -= 1
        if before != _outside_state():
            self._draws.not_replayed[_THE_LOSS, "Python's random or NumPy"] = ONCE

    @staticmethod
    def _seed_outside(seed: int) -> None:
        random.seed(seed)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed)

    def begin_loss(self, batch: Piece) -> None:
        """Numbers the draws of the loss over the whole batch apart from those of the forwards."""
        self._begin(batch, _OF_THE_LOSS)

    def _begin(self, piece: Piece, number: int) -> None:
        self._piece = self._pieces[piece.index] = piece
        torch.default_generator.manual_seed(_MARK | piece.index << _PIECE | number)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation; one that draws gets its numbers from `random_ops`."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        if not self._open and torch.default_generator.initial_seed() >> 44 != _MARK >> 44:
            return func(*args, **kwargs)  # the library draws seeds for micro-batches in lockstep
        schema = func._schema
        given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given.update(zip((argument.name for argument in schema.arguments), args, strict=False))
        given.update(kwargs)
        if given.get("train") is False or given.get("training") is False:
            return func(*args, **kwargs)
        name = schema.name.removeprefix("aten::")
        number, piece = self._next()
        call = RandomCall(
            name=name,
            func=func,
            args=args,
            kwargs=kwargs,
            given=given,
            number=number,
            piece=piece,
            is_alike=self._is_alike,
            draws=self._draws,
            find_module=self._running_module,
        )
        return RANDOM_OPS.get(name, RandomCall.run_unknown)(call)

    def _next(self) -> tuple[int, Piece]:
        """The number of this draw, and the piece it is for; moves on to the next one."""
        seed = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(seed + 1)
        if seed >> 44 != _MARK >> 44:  # seeded by the user's own code, in every forward alike
            return -1 - seed % _NUMBER, self._piece
        return seed & _NUMBER, self._pieces.get((seed ^ _MARK) >> _PIECE, self._piece)

    def _running_module(self) -> str:
        """The innermost of the models' modules that is running, found on the stack."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                return self._names[id(owner)]
            frame = frame.f_back
        return _THE_LOSS


def _outside_state() -> Any:
    numpy: Any = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return random.getstate(), state and (state[1].tobytes(), state[2:])
