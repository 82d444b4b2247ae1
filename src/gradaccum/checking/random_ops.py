"""How each operation that draws is answered, from numbers of the whole batch.

Whatever is drawn is drawn for the whole batch, and a micro-batch gets its own rows of it. Which dimension holds the
samples is seen by comparing shapes: the one that differs between the whole batch and a micro-batch. A draw whose shape
does not depend on the rows at all (one mixup lambda, one permutation, one depth for all) is one for each forward:
micro-batches draw their own, which is what happens in training.

What depends on an element's own parameters (a probability, a mean) is made from plain uniform, normal or exponential
numbers, so that a sample's draw depends on that sample alone. Operations without an entry (gamma, beta, poisson, the
slopes of RReLU) are run row by row, where rows come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import gt
from typing import Any

import torch
from torch import Tensor

from gradaccum.checking.pieces import Piece
from gradaccum.types import Rows

_SPREAD = 2654435761  # Knuth's multiplicative hash: neighbouring numbers, unlike seeds
ONCE = "Drawn once for each forward, so anew for each micro-batch"
UNMATCHED = "Not replayed, since its samples could not be told from its shape"


@dataclass(slots=True)
class Draws:
    """What a whole batch of so many rows drew, and what in it belongs to no sample."""

    rows: int
    # By the draw's number within a forward: the operation, the shape, and its other arguments.
    of_batch: dict[int, tuple[str, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=dict)
    # By number and index of the piece: how many entries it drew along the dimension of the samples.
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    # The module and the operation of what each micro-batch drew anew, and why: `ONCE` or `UNMATCHED`.
    not_replayed: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomCall:
    """One call of an operation that draws, in the forward of a piece."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]  # all arguments by name, with defaults filled in
    number: int  # of the draw within its forward
    piece: Piece
    is_alike: bool  # whether what is drawn once for each forward is the same in all
    draws: Draws
    find_module: Callable[[], str]

    def numbers(self, shape: Sequence[int], device: torch.device, method: str, *args: Any) -> Tensor:
        """Returns numbers in float64: rows of what the whole batch drew, or the piece's own where there are no rows.

        They are made by a method of tensors, such as "uniform_", with these arguments.
        """
        shape = tuple(int(size) for size in shape)
        rows = self.match_rows(shape, args)
        drawn_shape = shape if rows is None else self.draws.of_batch[self.number][1]
        drawn = torch.empty(drawn_shape, dtype=torch.float64, device=device)
        generator = torch.Generator(device)
        generator.manual_seed(self.seed(is_shared=rows is not None))
        getattr(drawn, method)(*args, generator=generator)
        if rows is None or not shape:
            return drawn
        drawn = drawn[(slice(None),) * rows[0] + (rows[1],)]
        return drawn[tuple(slice(size) for size in shape)]  # a micro-batch whose padding was trimmed

    def match_rows(self, shape: tuple[int, ...], others: tuple[Any, ...]) -> tuple[int, Rows] | None:
        """Returns the dimension of the samples and this piece's rows in the whole batch's draw; None without rows."""
        if self.piece.index == 0:
            self.draws.of_batch[self.number] = self.name, shape, others
            return 0, slice(0, shape[0] if shape else 0)
        name, whole_shape, whole_others = self.draws.of_batch.get(self.number, ("", (), ()))
        if name != self.name or len(whole_shape) != len(shape):
            self._note(UNMATCHED)
            return None
        differ = [i for i, (one, other) in enumerate(zip(whole_shape, shape, strict=True)) if one != other]
        if not differ or whole_others != others:
            if self.piece.rows != self.draws.rows:
                self._note(ONCE)
            return None
        size = shape[differ[0]]
        entries = self._entries(whole_shape[differ[0]], size)
        is_of_pairs = any(whole_shape[i] == self.draws.rows for i in differ[1:])
        is_trimmed = (whole_shape[0], size) == (self.draws.rows, self.piece.rows) and not differ[0] and not is_of_pairs
        if (len(differ) > 1 and not is_trimmed) or entries is None or any(map(gt, shape, whole_shape)):
            self._note(UNMATCHED)
            return None
        return differ[0], entries

    def _entries(self, of_batch: int, of_piece: int) -> Rows | None:
        """A piece's entries along the dimension of the samples."""
        if self.piece.order is None:
            start = self._start(of_batch, of_piece)
            return None if start is None else slice(start, start + of_piece)
        each = of_batch // self.draws.rows
        if of_batch != each * self.draws.rows or of_piece != each * self.piece.rows:
            return None
        return (self.piece.order[:, None] * each + torch.arange(each)).flatten()

    def _start(self, of_batch: int, of_piece: int) -> int | None:
        """Where a piece's entries begin: each sample has as many, or pieces follow one another."""
        self.draws.sizes[self.number, self.piece.index] = of_piece
        each, rest = divmod(of_piece, self.piece.rows)
        if rest == 0 and of_batch == each * self.draws.rows:
            return each * self.piece.start
        start = sum(self.draws.sizes.get((self.number, i), 0) for i in range(1, self.piece.index))
        return start if start + of_piece <= of_batch else None

    def seed(self, *, is_shared: bool) -> int:
        """Returns what the draw's generator starts with: the same for all pieces, or one of the piece's own."""
        own = 0 if is_shared or self.is_alike else self.piece.index
        return (self.number * _SPREAD + own * 7919 + 1) & 0xFFFFFFFF

    def run(self, seed: int, *args: Any) -> Any:
        """Runs the operation itself, from a seed; a generator that was passed is left out."""
        kwargs = {**self.kwargs, "generator": None} if "generator" in self.kwargs else self.kwargs
        after = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        try:
            return self.func(*(args or self.args), **kwargs)
        finally:  # the CPU's generator counts on where it was
            torch.default_generator.manual_seed(after)

    def run_unknown(self) -> Any:
        """Runs an operation that the table does not hold: row by row where rows come first, else from the seed."""
        first: Any = next((arg for arg in self.args if isinstance(arg, Tensor)), None)
        sizes = first.shape if first is not None else next(iter(self.args), ())
        shape = tuple(sizes) if isinstance(sizes, (list, tuple)) else ()
        rows = self.match_rows(shape, ())
        has_rows = first is not None and rows is not None and rows[0] == 0
        if has_rows and shape and shape[0] and shape[0] % self.piece.rows == 0:
            assert rows is not None
            numbers = torch.arange(self.draws.rows * (shape[0] // self.piece.rows))[rows[1]].tolist()
            return torch.cat([self._run_row(i, shape[0], number) for i, number in enumerate(numbers)])
        if rows is not None and self.piece.index:
            self._note(UNMATCHED)
        return self.run(self.seed(is_shared=False))

    def _run_row(self, i: int, rows: int, number: int) -> Any:
        """One row, from a seed that belongs to its number in the whole batch."""
        row = [
            value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
            for value in self.args
        ]
        return self.run(self.seed(is_shared=True) ^ (number * 40503 + 1), *row)

    def _note(self, why: str) -> None:
        plain = self.name.rstrip("_").removeprefix("_")
        known = {"bernoulli": "dropout or torch.bernoulli", "sample_dirichlet": "a Beta or Dirichlet"}
        self.draws.not_replayed[self.find_module(), known.get(plain, f"torch.{plain}")] = why


# ---------------------------------------------------------------------------------------------------------- operations


def _fill(call: RandomCall) -> Tensor:
    """``x.uniform_(a, b)`` and its kin: all elements alike."""
    target: Tensor = call.given["self"]
    if call.name == "random_" and "to" not in call.given:  # any bits: its range depends on the dtype
        return call.run_unknown()
    args = [value for name, value in call.given.items() if name not in ("self", "generator")]
    return target.copy_(call.numbers(target.shape, target.device, call.name, *args))


def _new(call: RandomCall, method: str, *args: Any) -> Tensor:
    """``torch.rand(size)``, ``torch.rand_like(x)`` and their kin."""
    made: Tensor = call.run(0)  # for its dtype, device and strides
    return made.copy_(call.numbers(made.shape, made.device, method, *args))


def _integers(call: RandomCall) -> Tensor:
    limits = call.given.get("low", 0), call.given["high"]
    made = _new(call, "random_", *limits)
    has_rows = call.piece.index == 0 or call.match_rows(tuple(made.shape), limits) is not None
    if call.is_alike and not has_rows and made.dim() == 1:  # partners among the rows: each is its own
        made.copy_(torch.arange(len(made), device=made.device) % limits[1])
    return made


def _permutation(call: RandomCall) -> Tensor:
    """One permutation for each forward. Where all are to be alike it permutes nothing."""
    call.match_rows((), (call.given["n"],))  # of another length: never rows of the whole batch's
    made: Tensor = call.run(call.seed(is_shared=False))
    return made.copy_(torch.arange(len(made), device=made.device)) if call.is_alike else made


def _normal_around(call: RandomCall) -> Tensor:
    """``torch.normal(mean, std)``, either of them a tensor or a number."""
    mean, std = call.given["mean"], call.given["std"]
    if "size" in call.given:
        return _new(call, "normal_", mean, std)
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(value.shape for value in tensors))
    return (mean + std * call.numbers(shape, tensors[0].device, "normal_")).to(tensors[0].dtype)


def _bernoulli(call: RandomCall) -> Tensor:
    target: Tensor = call.given["self"]
    made = call.numbers(target.shape, target.device, "uniform_") < call.given.get("p", target)
    return target.copy_(made) if call.name.endswith("_") else made.to(target.dtype)


def _dropout(call: RandomCall) -> tuple[Tensor, Tensor]:
    x, chance = call.given["input"], 1 - call.given["p"]
    kept = call.numbers(x.shape, x.device, "uniform_") < chance
    return x * kept / chance, kept


def _multinomial(call: RandomCall) -> Tensor:
    """The first of exponential clocks with these rates: ``argmin(e / p)``; without replacement the first few."""
    chances, count = call.given["self"], call.given["num_samples"]
    if not call.given["replacement"]:
        waits = call.numbers(chances.shape, chances.device, "exponential_")
        return (chances / waits).topk(count, dim=-1).indices
    shape = (*chances.shape[:-1], count, chances.shape[-1])
    return (chances.unsqueeze(-2) / call.numbers(shape, chances.device, "exponential_")).argmax(-1)


RANDOM_OPS: dict[str, Callable[[RandomCall], Any]] = {
    **dict.fromkeys(("uniform_", "normal_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_"), _fill),
    **dict.fromkeys(("bernoulli", "bernoulli_"), _bernoulli),
    **dict.fromkeys(("rand", "rand_like"), partial(_new, method="uniform_")),
    **dict.fromkeys(("randn", "randn_like"), partial(_new, method="normal_")),
    **dict.fromkeys(("randint", "randint_like"), _integers),
    "randperm": _permutation,
    "normal": _normal_around,
    "native_dropout": _dropout,
    "multinomial": _multinomial,
}
