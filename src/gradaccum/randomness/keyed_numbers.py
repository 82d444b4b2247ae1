"""Random numbers that are functions of a key, a sample and an element's coordinates, in torch's usual distributions.

The counter of an element is (last coordinate, second-last // 4, the leading ones, sample), and the second-last mod 4
picks one of its four words (for masks, // 8 and mod 8). So a sample's numbers depend neither on which other samples
are drawn with it nor on how far its padding reaches: what trimming leaves of a draw is a corner of the whole one.

Words are made in chunks that fit into a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gradaccum.randomness.philox import key_of, philox

Words: TypeAlias = Sequence[Tensor]
"""Four tensors of one shape."""

_CHUNK = 1 << 14  # counters: six int64 temporaries of them take 768 KiB
_CHUNK_ON_DEVICE = 1 << 24
_PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Where the numbers of one draw belong.

    Attributes:
        shape: of the draw.
        dim: the dimension of the samples; None where the draw belongs to none.
        samples: their positions in the global batch, int64; each has ``shape[dim] // len(samples)`` entries.
        name: what the key is made of: the seed, the update, the number of the draw.
        device: where the numbers are made.
    """

    shape: tuple[int, ...]
    dim: int | None
    samples: Tensor
    name: tuple[int, ...]
    device: torch.device


def bernoulli(draw: Draw, chance: float, *, out: Tensor | None = None) -> Tensor:
    """True with this probability, of which 32 bits count; written to ``out`` in its dtype where it is given.

    A word is used twice, as it is and with its halves exchanged. Its lower half decides only where the upper one ties,
    once in 65,536, so the two are independent but for that.
    """
    below = round(chance * 2.0**32)

    def compared(words: Words, _: Words) -> list[Tensor]:
        return [word < below for word in (*words, *((word << 16 & 0xFFFF0000 | word >> 16) for word in words))]

    return _made(draw, compared, torch.bool, count=8, out=out)


def uniform(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), as many bits of them random as the dtype holds."""
    bits = _PRECISION.get(dtype, 24)
    if bits == 53:
        return _made(draw, _doubles, dtype, is_wide=True)
    return _made(draw, lambda words, _: [(word >> 32 - bits) * 2.0**-bits for word in words], dtype)


def normal(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers (Box and Muller 1958), computed in float64 or float32."""
    if dtype == torch.float64:
        return _made(draw, lambda words, more: _normals(_doubles(words, more), 2.0**-54), dtype, is_wide=True)
    return _made(draw, lambda words, _: _normals([word.float() * 2.0**-32 for word in words], 2.0**-33), dtype)


def exponential(draw: Draw) -> Tensor:
    """Exponential numbers of rate 1, above 0, in float64."""
    return -(uniform(draw, torch.float64) + 2.0**-54).log().clamp_max_(-(2.0**-54))


def integers(draw: Draw, low: int, high: int) -> Tensor:
    """Integers in low .. high-1; no one of them is likelier than another by more than ``(high - low) / 2**62``."""
    count = high - low

    def scaled(words: Words, more: Words) -> list[Tensor]:
        if count > 1 << 31:
            return [((word & 0x7FFFFFFF) << 31 | (extra >> 1)) % count for word, extra in zip(words, more, strict=True)]
        return [word * count + (extra * count >> 32) >> 32 for word, extra in zip(words, more, strict=True)]

    return _made(draw, scaled, torch.int64, is_wide=True) + low


def _doubles(words: Words, more: Words) -> list[Tensor]:
    return [(word << 21 | extra >> 11).double() * 2.0**-53 for word, extra in zip(words, more, strict=True)]


def _normals(u: Sequence[Tensor], half: float) -> list[Tensor]:
    """Two pairs of normal numbers from two pairs of uniform ones, which are moved half a step away from 0."""
    made: list[Tensor] = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (first + half).log().mul(-2).clamp_min(0).sqrt(), second * (2 * math.pi)
        made += [radius * angle.cos(), radius * angle.sin()]
    return made


def _made(
    draw: Draw,
    of_words: Callable[[Words, Words], Sequence[Tensor]],
    dtype: torch.dtype,
    *,
    count: int = 4,
    is_wide: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """What a function makes of words: ``count`` elements of four, or of two times four with ``is_wide``."""
    samples = draw.samples if draw.dim is not None else draw.samples.new_zeros(1)
    dim = draw.dim or 0
    others = draw.shape if draw.dim is None else (*draw.shape[:dim], *draw.shape[dim + 1 :])
    each = 1 if draw.dim is None else draw.shape[dim] // max(len(samples), 1)
    *lead, height, width = (1, *others, 1) if len(others) < 2 else others
    grid = len(samples), each * math.prod(lead), -(-height // count), width
    is_in_place = out is not None and dim == 0 and not height % count and out.is_contiguous()
    made = out if out is not None and is_in_place else torch.empty(
        (*grid[:3], count, width), dtype=dtype if out is None else out.dtype, device=draw.device
    )  # fmt: skip
    table = made.view(*grid[:3], count, width)
    keys = [key_of(*draw.name, int(draw.dim is None), part) for part in range(1 + is_wide)]
    axes = [samples.to(draw.device), *(torch.arange(size, device=draw.device) for size in grid[1:])]
    for where in _chunks(grid, _CHUNK * torch.get_num_threads() if draw.device.type == "cpu" else _CHUNK_ON_DEVICE):
        s, lead_, i, j = (
            axis[part].view([-1 if n == at else 1 for n in range(4)])
            for at, (axis, part) in enumerate(zip(axes, (*where, slice(None)), strict=True))
        )
        words = [philox((j, i, lead_, s), key) for key in keys]
        for number, result in enumerate(of_words(words[0], words[-1])):
            table[(*where, number)] = result
    if is_in_place:
        return made
    whole = made.view(*grid[:2], grid[2] * count, width)[:, :, :height].reshape(grid[0] * each, *others)
    whole = whole.view(draw.shape) if draw.dim is None else whole.movedim(0, dim)
    return whole if out is None else out.copy_(whole)


def _chunks(grid: tuple[int, ...], size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of a grid of counters, of about so many each; the last dimension stays whole."""
    inner = [max(grid[3], 1)]
    for extent in (grid[2], grid[1]):
        inner.append(inner[-1] * max(extent, 1))
    strides = [max(1, size // one) for one in reversed(inner)]
    for s in range(0, grid[0], strides[0]):
        for lead in range(0, grid[1], strides[1]):
            for i in range(0, grid[2], strides[2]):
                yield slice(s, s + strides[0]), slice(lead, lead + strides[1]), slice(i, i + strides[2])
