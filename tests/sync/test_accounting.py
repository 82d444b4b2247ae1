"""What a thousand ranks send, counted with torch's fake process group, in which all do as this one."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradaccum as ga
from gradaccum.sync import flat
from gradaccum.sync.messages import PREFIX, Kind, Message, Outcome
from tasks import LOSSES, make_batch, make_model

RANKS = 1000


@pytest.fixture
def collectives() -> Iterator[tuple[mock.Mock, mock.Mock]]:
    """`all_gather` and `all_reduce`, which note their calls."""
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=RANKS)
    with (
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as all_gather,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
    ):
        yield all_gather, all_reduce
    dist.destroy_process_group()


def test_a_thousand_ranks(collectives: tuple[mock.Mock, mock.Mock]) -> None:
    model = make_model("mlp")
    elements = sum(parameter.numel() for parameter in model.parameters())
    loss_fn = LOSSES["mean over tokens"].for_library
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, micro_batch_size=4)
    batch = make_batch(13)
    for _ in range(3):
        for collective in collectives:
            collective.reset_mock()
        update = step(batch)
        assert (update.samples, update.micro_batches) == (13 * RANKS, 4 * RANKS)
        assert update.weight == RANKS * int(batch["mask"].sum())
    # Two messages, at the window's end and after the step: what both begin with holds all there is to say.
    messages, (reduction,) = (collective.call_args_list for collective in collectives)
    assert [message.args[1].nbytes for message in messages] == [8 * PREFIX] * 2
    assert reduction.args[0].nbytes == 8 * elements


def test_one_process_sends_nothing() -> None:
    model = make_model("mlp")
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), LOSSES["plain mean"].for_library)
    assert step._accumulation.ranks is None


def test_uses_are_sent_in_bytes_and_merged() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(70)]
    parameters[0].grad = parameters[33].grad = parameters[69].grad = torch.ones(2)
    message = Message(Outcome.FINE, Kind.CLOSING_A_WINDOW, 1, 1, uses=flat.uses(parameters))
    numbers = message.to_numbers(num_terms=0, num_uses=70)
    assert len(numbers) == PREFIX
    sent = Message.from_numbers(numbers, num_terms=0, num_uses=70).uses
    parameters[33].grad, parameters[34].grad = None, torch.ones(2)
    merged = flat.merged_uses([sent, flat.uses(parameters)], 70)
    assert [i for i, use in enumerate(merged) if use == flat.Use.DENSE] == [0, 33, 34, 69]
