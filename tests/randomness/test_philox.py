"""Philox against the vectors that its authors publish (Random123, `tests/kat_vectors`)."""

import pytest
import torch

from gradaccum.randomness.philox import key_of, philox

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
VECTORS = [
    (7, [0] * 4, (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, [0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, (0xA4093822, 0x299F31D0), "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, [0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, [0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), VECTORS)
def test_published_vectors(rounds: int, counter: list[int], key: tuple[int, int], words: str) -> None:
    found = philox([torch.tensor(word) for word in counter], key, rounds=rounds)
    assert " ".join(f"{word.item():08x}" for word in found) == words


def test_a_grid_is_its_counters_one_by_one() -> None:
    axes = [
        torch.tensor([0, 5, 0xFFFFFFFF]),
        torch.tensor([7, 8]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([9, 1 << 31]),
    ]
    grid = philox([axis.view([-1 if at == n else 1 for n in range(4)]) for at, axis in enumerate(axes)], (1, 2))
    for place in torch.cartesian_prod(*(torch.arange(len(axis)) for axis in axes)).tolist():
        one = philox([axis[at] for axis, at in zip(axes, place, strict=True)], (1, 2))
        assert [int(words[tuple(place)]) for words in grid] == [int(word) for word in one]


def test_keys_of_other_numbers_are_others() -> None:
    names = [(0,), (0, 0), (0, 1), (1, 0), (1 << 63,), (-1,), (3, 4, 5), (5, 4, 3)]
    keys = [key_of(*name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(0 <= word < 1 << 32 for key in keys for word in key)
    assert key_of(3, 4, 5) == key_of(3, 4, 5)
