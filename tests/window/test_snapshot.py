"""Random state and buffers, taken and put back."""

import pytest
import torch
from torch import nn

from gradaccum.window.snapshot import Buffers, RandomSeed, RandomState


def test_the_random_state_is_put_back_and_what_has_been_drawn_shows() -> None:
    before = RandomState.now()
    kept = before.cpu.clone()
    assert RandomState.now().equals(before)
    drawn = torch.rand(1000)
    assert not RandomState.now().equals(before)
    assert torch.equal(before.cpu, kept), "drawing later does not reach what was taken"
    before.restore()
    assert torch.equal(torch.rand(1000), drawn)


def test_devices_that_were_never_used_are_not_woken_up() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use already")
    assert RandomState.now().cuda == {}
    assert not torch.cuda.is_initialized()


def drawn_with(pieces: int) -> list[float]:
    """An update's pieces, each of which draws once; what is drawn behind it."""
    torch.manual_seed(1)
    seed = RandomSeed()
    seed.begin()
    for _ in range(pieces):
        torch.rand(3)
    seed.end()
    return torch.rand(4).tolist()


def test_what_is_drawn_behind_does_not_depend_on_how_much_was_drawn() -> None:
    torch.manual_seed(1)
    untouched = torch.rand(4).tolist()
    assert drawn_with(0) == untouched
    assert drawn_with(1) == drawn_with(7) != untouched, "where something was drawn, the stream goes on"


def test_every_attempt_draws_alike_and_every_update_anew() -> None:
    seed = RandomSeed()
    attempts = []
    for _ in range(2):
        seed.begin()
        attempts.append(torch.rand(3).tolist())
    seed.end()
    later = RandomSeed()
    later.begin()
    assert attempts[0] == attempts[1] != torch.rand(3).tolist()


def test_an_update_that_came_to_nothing_leaves_the_stream_where_it_was() -> None:
    before = RandomState.now()
    seed = RandomSeed()
    seed.begin()
    torch.rand(3)
    seed.undo()
    assert RandomState.now().equals(before)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("hidden", torch.tensor(5), persistent=False)


def test_values_are_put_back_and_a_buffer_that_was_replaced_is_the_old_tensor_again() -> None:
    model = Holder()
    old, before = model.kept, Buffers.of([model])
    model.kept.mul_(2)
    model.hidden.add_(1)
    model.kept = model.kept * 3
    before.restore()
    assert model.kept is old
    assert old.tolist() == [0.0, 1.0, 2.0]
    assert model.hidden.item() == 5


def test_buffers_inside_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    before = Buffers.of([model])
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 2))
    assert not torch.equal(model[1][0].running_mean, kept["1.0.running_mean"])
    before.restore()
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


def test_a_shared_buffer_is_copied_once_and_stays_shared() -> None:
    one, other = Holder(), Holder()
    other.kept = one.kept
    before = Buffers.of([one, other])
    assert len({id(copied) for *_, copied in before.places}) == 3  # kept, and hidden of each
    one.kept = one.kept + 1
    before.restore()
    assert one.kept is other.kept


def test_a_buffer_that_was_none_is_none_again() -> None:
    model = nn.BatchNorm1d(2, track_running_stats=False)
    model.register_buffer("made_later", None)
    before = Buffers.of([model])
    model.made_later = torch.ones(2)
    before.restore()
    assert model.made_later is None
    assert model.running_mean is None


def test_buffers_that_need_a_gradient_are_copied_without_graph() -> None:
    model = nn.Module()
    model.register_buffer("learned", torch.ones(2, requires_grad=True))
    before = Buffers.of([model])
    with torch.no_grad():
        model.learned.zero_()
    before.restore()
    assert model.learned.tolist() == [1.0, 1.0]
    assert model.learned.is_leaf
