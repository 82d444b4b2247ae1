"""How each operation that draws is answered, from numbers of the whole batch.

A function of ``ANSWERS`` takes the draw that is asked for, the operation, what it was called with, and the same by name
with defaults filled in. What depends on an element's own parameters (a probability, a mean) is made from plain uniform,
normal or exponential numbers, so that a sample's draw depends on that sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradaccum.auditing.replay import Asked


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Default generators that start with a seed; afterwards the CPU's counts on where it was."""
    after = torch.default_generator.initial_seed()
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.default_generator.manual_seed(after)


def _uniform(made: Tensor, generator: torch.Generator) -> None:
    made.uniform_(generator=generator)


def _normal(made: Tensor, generator: torch.Generator) -> None:
    made.normal_(generator=generator)


def _fill(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    """``x.uniform_(a, b)`` and its kin: all elements alike."""
    target: Tensor = given["self"]
    if draw.name == "random_" and "to" not in given:  # any bits: its range depends on the dtype
        return draw.replay.as_it_is(draw, func, args, kwargs)
    own = {name: value for name, value in given.items() if name not in ("self", "generator")}

    def fill(made: Tensor, generator: torch.Generator) -> None:
        getattr(made, draw.name)(**own, generator=generator)

    return target.copy_(draw.numbers(target.shape, target.device, fill, other=tuple(own.values())))


def _bernoulli_in_place(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    target, chance = given["self"], given["p"]
    return target.copy_(draw.numbers(target.shape, target.device, _uniform) < chance)


def _bernoulli(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    chance = given.get("p", given["self"])
    return (draw.numbers(given["self"].shape, given["self"].device, _uniform) < chance).to(given["self"].dtype)


def _made(fill: Callable[[dict[str, Any]], Callable[[Tensor, torch.Generator], Any]], *others: str) -> Any:
    """``torch.rand(size)``, ``torch.rand_like(x)`` and their kin."""

    def answer(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
        if given.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        with seeded(0):
            made: Tensor = func(*args, **kwargs)  # for its dtype, device and strides
        other = tuple(given.get(name) for name in others)
        drawn = draw.numbers(made.shape, made.device, fill(given), other=other)
        is_rows = draw.piece.index == 0 or draw.replay.rows_of(draw, tuple(made.shape), other) is not None
        if draw.replay.shares and "high" in others and not is_rows and made.dim() == 1:
            drawn = torch.arange(len(made), device=made.device) % given["high"]  # partners among the rows: oneself
        return made.copy_(drawn)

    return answer


def _permutation(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    """One permutation for each forward. Where all are to be alike it permutes nothing."""
    draw.replay.rows_of(draw, (), (given["n"],))  # of another length: never rows of the whole batch's
    with seeded(draw.replay.seed(draw, is_shared=False)):
        made = func(*args, **{**kwargs, **({"generator": None} if "generator" in kwargs else {})})
    return made.copy_(torch.arange(len(made), device=made.device)) if draw.replay.shares else made


def _normal_around(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    """``torch.normal(mean, std)``, either of them a tensor or a number."""
    mean, std = given["mean"], given["std"]
    if "size" in given:
        return _made(lambda given: lambda made, generator: made.normal_(mean, std, generator=generator))(
            draw, func, args, kwargs, given
        )
    like = mean if isinstance(mean, Tensor) else std
    noise = draw.numbers(torch.broadcast_shapes(_shape(mean), _shape(std)), like.device, _normal)
    return (mean + std * noise).to(like.dtype)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _dropout(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    x: Tensor = given["input"]
    kept = draw.numbers(x.shape, x.device, _uniform) < 1 - given["p"]
    return x * kept / (1 - given["p"]), kept


def _rrelu(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    x: Tensor = given["self"]
    slopes = given["lower"] + (given["upper"] - given["lower"]) * draw.numbers(x.shape, x.device, _uniform)
    slopes = torch.where(x <= 0, slopes.to(x.dtype), torch.ones_like(x))
    given["noise"].copy_(slopes)
    return x.mul_(slopes) if draw.name.endswith("_") else x * slopes


def _multinomial(draw: Asked, func: Any, args: Any, kwargs: Any, given: dict[str, Any]) -> Any:
    """The first of exponential clocks with these rates: ``argmin(e / p)``; without replacement the first few."""
    chances, count = given["self"], given["num_samples"]

    def waits(made: Tensor, generator: torch.Generator) -> None:
        made.exponential_(generator=generator)

    if not given["replacement"]:
        return (chances / draw.numbers(chances.shape, chances.device, waits)).topk(count, dim=-1).indices
    shape = (*chances.shape[:-1], count, chances.shape[-1])
    return (chances.unsqueeze(-2) / draw.numbers(shape, chances.device, waits)).argmax(-1)


_RAND = _made(lambda given: _uniform)
_RANDN = _made(lambda given: _normal)
_RANDINT = _made(
    lambda given: lambda made, generator: made.random_(given.get("low", 0), given["high"], generator=generator),
    "low", "high",
)  # fmt: skip
ANSWERS: dict[str, Callable[[Asked, Any, Any, Any, dict[str, Any]], Any]] = {
    **dict.fromkeys(("uniform_", "normal_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_"), _fill),
    "bernoulli_": _bernoulli_in_place,
    "bernoulli": _bernoulli,
    "rand": _RAND,
    "rand_like": _RAND,
    "randn": _RANDN,
    "randn_like": _RANDN,
    "randint": _RANDINT,
    "randint_like": _RANDINT,
    "randperm": _permutation,
    "normal": _normal_around,
    "native_dropout": _dropout,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_": _rrelu,
    "multinomial": _multinomial,
}
