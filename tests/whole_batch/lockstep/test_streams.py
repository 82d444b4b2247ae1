"""Random numbers in lockstep: a stream for each micro-batch, the same whoever runs in between."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.whole_batch.lockstep.streams import Streams
from normed import NORMED, Batch, ResNet, classes_loss, make_batches, sgd, trained
from oracle import assert_same


def test_each_stream_goes_on_where_it_stopped() -> None:
    torch.manual_seed(0)
    streams = Streams(2)
    drawn: dict[int, list[Tensor]] = {0: [], 1: []}
    for index in (0, 1, 1, 0):
        streams.enter(index)
        drawn[index].append(torch.rand(3))
        streams.leave(index)
    torch.manual_seed(0)
    again = Streams(2)
    for index in (0, 1):
        again.enter(index)
        assert torch.equal(torch.rand(6), torch.cat(drawn[index]))
        again.leave(index)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_stream_does_not_depend_on_how_many_there_are() -> None:
    torch.manual_seed(0)
    seeds = [Streams(count)._seeds for count in (2, 5, 13)]
    assert seeds[0] == seeds[2][:2]
    assert seeds[1] == seeds[2][:5]


def test_afterwards_the_generator_is_one_number_further() -> None:
    def after(draws: int) -> Tensor:
        torch.manual_seed(0)
        streams = Streams(2)
        streams.enter(0)
        torch.rand(draws)
        streams.leave(0)
        streams.end()
        return torch.get_rng_state()

    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    torch.randint(0, 1 << 62, ())
    assert torch.equal(after(0), untouched)
    assert torch.equal(after(3), torch.get_rng_state())
    assert torch.equal(after(300), torch.get_rng_state())


def test_dropout_is_that_of_the_micro_batchs_own_stream() -> None:
    """Each micro-batch draws what it would draw alone, from its stream: the same masks in a loop without lockstep."""
    torch.manual_seed(0)
    model = ResNet(blocks=1, dropout=0.5).double().eval()  # so that lockstep is all there is between them
    model.dropout.train()
    whole = copy.deepcopy(model)
    batch = make_batches(1)[0]
    torch.manual_seed(5)
    made, _ = trained(model, [batch], _gathering, micro_batch_size=4, batch_norm="micro", lockstep=True)
    torch.manual_seed(5)
    streams = Streams(4)
    loss = torch.zeros(())
    for index, rows in enumerate(ga.split_by_samples().plan(batch, 4)):
        streams.enter(index)
        loss = loss + F.cross_entropy(whole(batch[0][rows]), batch[1][rows], reduction="sum") / len(batch[1])
        streams.leave(index)
    optimizer = sgd(whole)
    loss.backward()
    optimizer.step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(made[0].parameters[name], parameter.detach(), rtol=NORMED, atol=NORMED)


def _gathering(model: nn.Module, batch: Batch) -> Tensor:
    ga.gather(batch[1])  # one more meeting, between which streams are switched
    return classes_loss(model, batch)


def test_a_seed_repeats_an_update() -> None:
    torch.manual_seed(0)
    model = ResNet(blocks=1, dropout=0.5).double()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(trained(copy.deepcopy(model), make_batches(3), micro_batch_size=4)[0])
        runs[-1].append(torch.get_rng_state())  # type: ignore[arg-type]
    assert torch.equal(runs[0].pop(), runs[1].pop())  # type: ignore[arg-type]
    assert_same(runs[0], runs[1], tolerance=0)


def test_masks_of_micro_batches_differ() -> None:
    masks: list[Tensor] = []
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 4)).double()
    model[1].register_forward_hook(lambda _m, _i, output: masks.append(output == 0))
    trained(model, make_batches(1, rows=12), micro_batch_size=4)
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
