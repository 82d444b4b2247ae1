"""Philox-4x32-10, a counter-based generator, in plain torch operations on any device.

A counter of four 32-bit words and a key of two give four random words; nothing is stored between calls, so any number
of a stream is had by itself (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Random123's
`philox.h`). Words are held in int64 tensors, because torch has no multiplication of unsigned 32-bit ones.

Words of the counter may have any shapes that broadcast. The first two rounds then run on what broadcasts, not on the
whole: a grid of counters costs eight rounds instead of ten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = tuple[int, int]

ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Key, *, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of words in 0 .. 2^32-1, of shapes that broadcast.
        key: two words.
        rounds: 10 is the published default, 7 the fewest that pass BigCrush.

    Returns:
        Four int64 tensors of words in 0 .. 2^32-1.

    Example:
        >>> from gradaccum.randomness.philox import philox
        >>> [f"{word.item():08x}" for word in philox([torch.tensor(0)] * 4, (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # c0 and c2 are words; c1 and c3 may have anything in their upper halves, which is cut off when they are used.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _mixed(p1, c1, k0), p1, _mixed(p0, c3, k1), p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _mixed(product: Tensor, word: Tensor, key: int) -> Tensor:
    """``(upper half of the product) ^ word ^ key``, in as few passes over memory as can be."""
    mixed = product >> 32
    mixed = mixed.bitwise_xor_(word) if mixed.shape == torch.broadcast_shapes(mixed.shape, word.shape) else mixed ^ word
    return mixed.bitwise_xor_(key).bitwise_and_(_MASK)


def key_of(*numbers: int) -> Key:
    """The key of the stream that these numbers name, each of up to 64 bits; streams of unlike names are unrelated.

    Hashed, since two keys that are sums of seed and draw would be those of other seeds and draws as well.
    """
    text = b"".join((number & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") for number in numbers)
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
