"""The dispatch mode that answers operations that draw, each from numbers that belong to samples.

It sits below autograd, so it sees what dropout, noise and masks of any kind come down to, also inside of torch's own
layers, and their gradients are torch's. Operations that draw by rejection (gamma, poisson, binomial), and the slopes of
RReLU, are run row by row, each row from a seed of its sample's. What cannot be told to belong to samples is noted in
`Notes`, which become one warning.

Which piece runs, and the number of its next draw, are the *seed* of the CPU's generator while a batch runs: code that
puts the random state back to run something again (activation checkpointing) so gets the same numbers again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.randomness.keyed_numbers import Draw, bernoulli, exponential, integers, normal, uniform
from gradaccum.randomness.philox import key_of

# Seeds that are ours: a mark in the bits from 44 on, the index of a piece in those from 20 on, the number of the draw.
_MARK = 0x5A3D << 44
_PIECE, _NUMBER = 20, (1 << 20) - 1
_OF_THE_LOSS = 1 << 19
_OWN_STREAM = 1 << 62  # in the name of draws after a user's own torch.manual_seed

Signature = tuple[int, str, int]
"""The number of a draw within its forward, its operation, and how many dimensions it has."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What runs forward: a micro-batch from 1 on, or at 0 the loss over the whole batch, whose draws have no samples.

    ``samples`` are the positions of its rows in the global batch.
    """

    index: int
    samples: Tensor


@dataclass(slots=True)
class Window:
    """What the draws of one update share.

    Attributes:
        name: the seed and the update.
        layouts: the dimension of the samples by draw; None for a draw that belongs to none. Filled by `find_layouts`.
        notes: what was not keyed by sample, in words.
        seen: where it is given, each draw's signature with its shape and its range is added to it.
        backward_draws: whether something drew in a forward that may run again in the backward.
    """

    name: tuple[int, int]
    layouts: Mapping[Signature, int | None]
    notes: set[str]
    seen: list[tuple[Signature, tuple[int, ...], Any]] | None = None
    pieces: dict[int, Piece] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    backward_draws: bool = False

    def begin(self, piece: Piece) -> None:
        """Makes the piece the one whose draws are next."""
        self.pieces[piece.index] = piece
        torch.default_generator.manual_seed(_MARK | piece.index << _PIECE | (0 if piece.index else _OF_THE_LOSS))

    def end(self, piece: Piece) -> None:
        """Notes how many draws the piece's forward had."""
        seed = torch.default_generator.initial_seed()
        if seed >> 44 == _MARK >> 44:
            self.ends[piece.index] = seed & _NUMBER


class KeyedMode(TorchDispatchMode):
    """Answers a window's draws: in the forward of ``piece``; without one, of what runs again in the backward."""

    supports_higher_order_operators = True

    def __init__(self, window: Window, piece: Piece | None = None) -> None:
        super().__init__()
        self._window, self._piece = window, piece

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation; one that draws gets its numbers from `keyed_numbers`."""
        kwargs = kwargs or {}
        if not _draws(func):
            return func(*args, **kwargs)
        if func._can_decompose() and func._schema.name.removeprefix("aten::") in _COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        given = _all_arguments(func, args, kwargs)
        if _draws_nothing(given) or not self._window.pieces:  # in lockstep the library draws seeds before it begins
            return func(*args, **kwargs)
        if given.get("generator") is not None:
            self._window.notes.add("draws from a torch.Generator that is passed to them")
            return func(*args, **kwargs)
        number, piece = self._next()
        call = Call(func=func, args=args, kwargs=kwargs, given=given, number=number, piece=piece, window=self._window)
        return _ANSWERS.get(call.name, Call.run_by_rows)(call)

    def _next(self) -> tuple[int, Piece]:
        """The number of this draw, and the piece it is for; moves on to the next one."""
        seed, window = torch.default_generator.initial_seed(), self._window
        torch.default_generator.manual_seed(seed + 1)
        if seed >> 44 != _MARK >> 44:  # seeded by the user's own code, in every forward alike
            return _OWN_STREAM | seed & ~(3 << 62), self._piece or next(reversed(window.pieces.values()))
        number, index = seed & _NUMBER, (seed ^ _MARK) >> _PIECE
        if self._piece is None:
            if number >= window.ends.get(index, _NUMBER):
                window.notes.add(
                    "draws in the backward alone (checkpoint with preserve_rng_state=False runs them anew)"
                )
            return number, window.pieces[index]
        # A checkpoint's hooks, or its forward without a graph, say that this may run again in the backward.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        window.backward_draws = window.backward_draws or hooks is not None or not torch.is_grad_enabled()
        return number, self._piece


class MathAttention(TorchFunctionMode):
    """Has attention with dropout computed by torch's plain operations: fused kernels draw masks of their own."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch's."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if dropout:
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _draws(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::") if hasattr(func, "_schema") else ""
    is_tagged = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    # The backward of attention is tagged, and draws again what its forward drew.
    return name in _UNTAGGED or (is_tagged and not name.endswith("_backward"))


@functools.cache
def _arguments(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return tuple(argument.name for argument in arguments), defaults


def _all_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names, defaults = _arguments(func)
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _draws_nothing(given: dict[str, Any]) -> bool:
    if given.get("train") is False or given.get("training") is False:
        return True
    return any(given.get(name) in (0, 0.0) for name in ("dropout_p", "dropout"))  # attention, recurrent layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of an operation that draws."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]  # all arguments by name, with defaults filled in
    number: int
    piece: Piece
    window: Window

    @property
    def name(self) -> str:
        """The operation's name, such as ``"bernoulli_"``."""
        return self.func._schema.name.removeprefix("aten::")

    @property
    def draw_name(self) -> tuple[int, ...]:
        """What tells the call apart from all others; where the user has seeded it, it is the same in every update."""
        return (self.number,) if self.number & _OWN_STREAM else (*self.window.name, self.number)

    def draw(self, shape: Sequence[int], device: torch.device, limits: Any = None) -> Draw:
        """Where the numbers of this call belong, if it draws this shape, from a range that may depend on the rows."""
        shape = tuple(int(size) for size in shape)
        return Draw(
            shape=shape,
            dim=self._dim(shape, limits),
            samples=self.piece.samples,
            name=self.draw_name,
            device=device,
        )

    def _dim(self, shape: tuple[int, ...], limits: Any) -> int | None:
        window, rows = self.window, len(self.piece.samples)
        if not self.piece.index:
            return None
        signature = self.number, self.name, len(shape)
        if window.seen is not None:
            window.seen.append((signature, shape, limits))
        if signature not in window.layouts:
            return _likely_dim(shape, rows)
        dim = window.layouts[signature]
        if dim is not None and (shape[dim] % rows if rows else shape[dim]):
            window.notes.add(f"torch.{self.name} of shape {shape}, whose number of entries a sample differs")
            return None
        return dim

    def run_by_rows(self) -> Any:
        """Runs the operation itself, from a seed for each sample where samples come first, else from one for all."""
        first: Any = next((arg for arg in self.args if isinstance(arg, Tensor)), None)
        if first is not None and self.name not in _FUSED:
            draw = self.draw(first.shape, first.device)
            samples = draw.samples.tolist()
            if draw.dim == 0 and samples:
                each = len(first) // len(samples)
                parts = [self._run_part(first, row, each, sample) for row, sample in enumerate(samples)]
                return (
                    torch.cat(parts)
                    if isinstance(parts[0], Tensor)
                    else tuple(map(torch.cat, zip(*parts, strict=True)))
                )
            if draw.dim is None and first.dim():
                return self._run(key_of(*draw.name, 1))
        self.window.notes.add(f"torch.{self.name.strip('_')}, which draws its numbers by itself")
        samples = self.piece.samples
        return self._run(key_of(*self.draw_name, int(samples[0]) if len(samples) else 0))

    def _run_part(self, first: Tensor, row: int, each: int, sample: int) -> Any:
        rows = slice(row * each, (row + 1) * each)
        args = [
            arg[rows] if isinstance(arg, Tensor) and arg.dim() and len(arg) == len(first) else arg for arg in self.args
        ]
        return self._run(key_of(*self.draw_name, 0, sample), args)

    def _run(self, key: tuple[int, int], args: Sequence[Any] | None = None) -> Any:
        """Runs the operation from a seed; the CPU's generator counts on where it was."""
        after, seed = torch.default_generator.initial_seed(), key[0] << 31 ^ key[1]
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        try:
            return self.func(*(self.args if args is None else args), **self.kwargs)
        finally:
            torch.default_generator.manual_seed(after)

    def empty(self) -> Tensor:
        """What ``torch.rand(size, ...)`` and its kin return, not filled yet."""
        options = {name: self.kwargs.get(name) for name in ("dtype", "layout", "device", "pin_memory")}
        if "self" in self.given:
            del options["pin_memory"]
            layout = self.kwargs.get("memory_format") or torch.preserve_format
            return torch.empty_like(self.given["self"], memory_format=layout, **options)
        if self.name in ("randint", "randperm"):
            options["dtype"] = options["dtype"] or torch.int64
        size = (self.given["n"],) if self.name == "randperm" else self.given["size"]
        return torch.empty(size, **options)


def _likely_dim(shape: tuple[int, ...], rows: int) -> int | None:
    """The dimension of the samples, where a draw was not seen at two numbers of rows: by its size alone."""
    exact = next((dim for dim, size in enumerate(shape) if size == rows), None)
    if exact is not None or rows < 2:
        return exact if exact is not None or not shape else (None if not rows else 0)
    return next((dim for dim, size in enumerate(shape) if size and size % rows == 0), None)


# ---------------------------------------------------------------------------------------------------------- operations


def _fill(call: Call, made: Tensor, kind: str) -> Tensor:
    """Fills a tensor with numbers of a kind, with the operation's own arguments, names as in torch's schemas."""
    given, draw = call.given, call.draw(made.shape, made.device)
    wide = torch.float64
    match kind:
        case "uniform":
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            numbers = uniform(draw, made.dtype)
            return made.copy_(numbers if (low, high) == (0, 1) else numbers * (high - low) + low)
        case "normal":
            return made.copy_(normal(draw, made.dtype) * given.get("std", 1.0) + given.get("mean", 0.0))
        case "exponential":
            return made.copy_(exponential(draw) / given["lambd"])
        case "geometric":
            return made.copy_((-exponential(draw) / torch.log1p(torch.tensor(-given["p"], dtype=wide))).ceil())
        case "cauchy":
            return made.copy_(given["median"] + given["sigma"] * ((uniform(draw, wide) - 0.5) * torch.pi).tan())
        case _:  # log_normal
            return made.copy_((given["mean"] + given["std"] * normal(draw, wide)).exp())


def _in_place(call: Call, kind: str) -> Tensor:
    return _fill(call, call.given["self"], kind)


def _new(call: Call, kind: str) -> Tensor:
    return _fill(call, call.empty(), kind)


def _integers(call: Call) -> Tensor:
    made = call.empty()
    limits = call.given.get("low") or 0, call.given["high"]
    return made.copy_(integers(call.draw(made.shape, made.device, limits), *limits))


def _random(call: Call) -> Tensor:
    """``x.random_(low, high)``, or whatever integers its dtype holds."""
    made: Tensor = call.given["self"]
    low, high = call.given.get("from") or 0, call.given.get("to")
    if high is None:
        is_float = made.dtype.is_floating_point
        high = (
            2 / torch.finfo(made.dtype).eps + 1
            if is_float
            else torch.iinfo(made.dtype).max + (made.dtype != torch.int64)
        )
    return made.copy_(integers(call.draw(made.shape, made.device, (low, high)), int(low), int(high)))


def _permutation(call: Call) -> Tensor:
    """One permutation for each forward, the same in all that permute as many."""
    made = call.empty()
    draw = call.draw(made.shape, made.device, ("randperm", len(made)))
    once = Draw(shape=draw.shape, dim=None, samples=draw.samples, name=draw.name, device=draw.device)
    return made.copy_(integers(once, 0, 1 << 62).argsort(stable=True))


def _normal_around(call: Call) -> Tensor:
    """``torch.normal(mean, std)``, either of them a tensor or a number."""
    mean, std = call.given["mean"], call.given["std"]
    if "size" in call.given:
        return _new(call, "normal")
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(value.shape for value in tensors))
    return mean + std * normal(call.draw(shape, tensors[0].device), tensors[0].dtype).to(tensors[0].dtype)


def _bernoulli(call: Call) -> Tensor:
    target: Tensor = call.given["self"]
    made = target if call.name.endswith("_") else torch.empty_like(target)
    chance = call.given.get("p", target)
    draw = call.draw(target.shape, target.device)
    if isinstance(chance, Tensor):
        return made.copy_(uniform(draw, torch.float64) < chance)
    return bernoulli(draw, chance, out=made)


def _dropout(call: Call) -> tuple[Tensor, Tensor]:
    x, chance = call.given["input"], 1 - call.given["p"]
    kept = bernoulli(call.draw(x.shape, x.device), chance)
    return x * kept * (1 / chance if chance else 0.0), kept


def _multinomial(call: Call) -> Tensor:
    """The first of exponential clocks with these rates: ``argmin(e / p)``; without replacement the first few."""
    chances, count = call.given["self"], call.given["num_samples"]
    if not call.given["replacement"]:
        return (chances / exponential(call.draw(chances.shape, chances.device))).topk(count, dim=-1).indices
    shape = (*chances.shape[:-1], count, chances.shape[-1])
    return (chances.unsqueeze(-2) / exponential(call.draw(shape, chances.device))).argmax(-1)


# By name too: tagged in torch 2.13, which was looked up; older ones were not.
_UNTAGGED = frozenset({"random", "random_", "binomial", "_sample_dirichlet"})
# Seen in inference mode alone; elsewhere torch has taken them apart before.
_COMPOSITE = frozenset(
    {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "lstm", "gru", "rnn_tanh", "rnn_relu"}
)
_FUSED = frozenset(
    {
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
        *("_scaled_dot_product_cudnn_attention", "_flash_attention_forward", "_efficient_attention_forward"),
        *("_cudnn_rnn", "miopen_rnn", "_cudnn_init_dropout_state"),
    }
)
_KINDS = ("uniform", "normal", "exponential", "geometric", "cauchy", "log_normal")
_ANSWERS: dict[str, Callable[[Call], Any]] = {
    **{f"{kind}_": functools.partial(_in_place, kind=kind) for kind in _KINDS},
    **dict.fromkeys(("rand", "rand_like"), functools.partial(_new, kind="uniform")),
    **dict.fromkeys(("randn", "randn_like"), functools.partial(_new, kind="normal")),
    **dict.fromkeys(("randint", "randint_like"), _integers),
    **dict.fromkeys(("bernoulli", "bernoulli_"), _bernoulli),
    "random_": _random,
    "randperm": _permutation,
    "normal": _normal_around,
    "native_dropout": _dropout,
    "multinomial": _multinomial,
}
