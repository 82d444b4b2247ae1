"""What a checkpoint is given it can load again, or refuses when it is saved."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradaccum as ga


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Record:
    value: int = 1


Pair = collections.namedtuple("Pair", "one other")


class Holder:
    """An object of the user's own with a state of any kind."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"at": {"value": self.value}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["at"]["value"]


SAVED: dict[str, Any] = {
    "number": 0.1,
    "large number": 1 << 200,
    "complex": 1j,
    "bytes": b"\0a",
    "tuple": (1, "a", None),
    "nested": {"a": [{"b": (1, 2)}], 3: "c"},
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "ordered": collections.OrderedDict(b=1, a=2),
    "counter": collections.Counter("aab"),
    "tensor": torch.arange(3),
    "sizes": torch.Size([1, 2]),
    "dtype": torch.bfloat16,
    "range": range(2, 9, 3),
    "slice": slice(1, None),
    "numpy number": np.float64(0.1),
    "numpy integer": np.int64(3),
    "numpy array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "numpy strings": np.array(["a", "bc"]),
    "numpy random state": np.random.RandomState(3).get_state(),
    "numpy generator": np.random.default_rng(0).bit_generator.state,
    "path": pathlib.Path("/a/b"),
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "timedelta": datetime.timedelta(1, 2, 3),
    "deque": collections.deque([1, (2, 3)], maxlen=4),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "namespace": types.SimpleNamespace(a=1, b=[2]),
    "fraction": fractions.Fraction(1, 3),
    "decimal": decimal.Decimal("1.50"),
    "uuid": uuid.UUID(int=7),
}
REFUSED: dict[str, Any] = {
    "enum": Color.RED,
    "dataclass": Record(),
    "named tuple": Pair(1, 2),
    "function": len,
    "partial": functools.partial(len, []),
    "defaultdict of a function": collections.defaultdict(lambda: 3),
    "objects in an array": np.array([{}]),
    "ellipsis": ...,
    "generator": torch.Generator(),
}


@pytest.mark.parametrize("kind", SAVED)
def test_comes_back(tmp_path: Path, kind: str) -> None:
    value = SAVED[kind]
    holder = Holder(value)
    ga.Checkpoint(tmp_path, holder=holder, model=nn.Linear(1, 1)).save()
    holder.value = None
    assert ga.Checkpoint(tmp_path, holder=holder, model=nn.Linear(1, 1)).load() is not None
    assert is_same(holder.value, value), holder.value


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and all(map(is_same, one, other))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(is_same(one[k], other[k]) for k in one)
    is_number = isinstance(other, np.generic)
    return bool(one == other) and (is_number or type(one) is type(other))


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_when_it_is_saved(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ga.StateError, match=r"holder\['at'\]\['value'\] is a .*never be loaded"):
        ga.Checkpoint(tmp_path, holder=Holder(REFUSED[kind])).save()
    assert not list(tmp_path.iterdir())


def test_what_the_message_says_to_type(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([Record])
    try:
        ga.Checkpoint(tmp_path, holder=Holder(Record(5))).save()
        holder = Holder()
        ga.Checkpoint(tmp_path, holder=holder).load()
        assert holder.value == Record(5)
    finally:
        torch.serialization.clear_safe_globals()


def test_learning_rates_of_numpy(tmp_path: Path) -> None:
    """A sweep over ``np.logspace`` is all it takes."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.logspace(-3, -1, 3)[1])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, np.float64(0.5))
    checkpoint = ga.Checkpoint(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    checkpoint.save()
    optimizer.param_groups[0]["lr"] = 7.0
    checkpoint.load()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
