"""What a thousand ranks send, counted with torch's fake process group, in which all do as this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradaccum as ga
from gradaccum.sync import flat
from tasks import LOSSES, make_batch, make_model

RANKS = 1000


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Each collective's name and the bytes that this rank puts in."""
    found: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(("all_reduce", tensor.nbytes))
        return reduce(tensor, *arguments, **options)

    def all_gather(theirs: list[Tensor], mine: Tensor, **options: Any) -> Any:
        found.append(("all_gather", mine.nbytes))
        return gather(theirs, mine, **options)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=RANKS)
    yield found
    dist.destroy_process_group()


def test_a_thousand_ranks(sent: list[tuple[str, int]]) -> None:
    model = make_model("mlp")
    elements = sum(parameter.numel() for parameter in model.parameters())
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), LOSSES["mean over tokens"].for_library,
                        micro_batch_size=4)  # fmt: skip
    batch = make_batch(13)
    for _ in range(3):
        sent.clear()
        update = step(batch)
        assert (update.samples, update.micro_batches) == (13 * RANKS, 4 * RANKS)
        assert update.weight == RANKS * int(batch["mask"].sum())
    # One message, of 7 counts, 3 numbers of the one term, and the uses of at most 31 parameters; one reduction.
    assert sent == [("all_gather", 8 * (7 + 3 + 1)), ("all_reduce", 8 * elements)]


def test_one_process_sends_nothing() -> None:
    model = make_model("mlp")
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), LOSSES["plain mean"].for_library)
    assert step._accumulation.ranks is None


def test_uses_are_packed_and_merged() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(70)]
    parameters[0].grad = parameters[33].grad = parameters[69].grad = torch.ones(2)
    packed = flat.uses(parameters)
    assert len(packed) == flat.num_numbers(70) == 3
    assert all(0 <= number < 2**63 for number in packed)
    parameters[33].grad, parameters[34].grad = None, torch.ones(2)
    merged = flat.merged_uses([packed, flat.uses(parameters)], 70)
    assert [i for i, kind in enumerate(merged) if kind == flat.DENSE] == [0, 33, 34, 69]
