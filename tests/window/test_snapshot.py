"""Random state and buffers, taken and put back."""

import pytest
import torch
from torch import nn

import gradaccum as ga
from gradaccum.window.snapshot import ALWAYS_COPIED, Buffers, ChangingBuffers, RandomSeed, RandomState


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
    assert len({id(place.copied) for place in before.places}) == 3  # kept, and hidden of each
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


class Writing(nn.Module):
    """A large buffer that a forward writes to, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(ALWAYS_COPIED + 1))
        self.register_buffer("weights", torch.zeros(ALWAYS_COPIED + 1))
        self.register_buffer("calls", torch.tensor(0))
        self.writes = True

    def forward(self) -> None:
        self.calls += 1
        if self.writes:
            self.queue[:3] += 1


def copied(buffers: Buffers) -> set[str]:
    return {place.name for place in buffers.places if place.copied is not None}


def test_large_buffers_are_copied_once_they_were_seen_to_change() -> None:
    model, changing = Writing(), ChangingBuffers()
    before = changing.copied([model])
    assert copied(before) == {"queue", "weights", "calls"}, "the first time nothing is known"
    model()
    changing.seen(before)
    before.restore()
    assert (model.queue.sum(), model.calls) == (0, 0)
    assert copied(changing.copied([model])) == {"queue", "calls"}


def test_a_large_buffer_that_changes_later_is_an_error_and_is_copied_from_then_on() -> None:
    model, changing = Writing(), ChangingBuffers()
    model.writes = False
    changing.seen(changing.copied([model]))
    model.writes = True
    before = changing.copied([model])
    assert copied(before) == {"calls"}
    model()
    changing.seen(before)
    with pytest.raises(ga.ReplayError, match=r"'queue' of Writing, of shape .65537,., .*cannot be put back"):
        before.restore()
    assert model.calls == 0, "the others are put back"
    assert copied(changing.copied([model])) == {"queue", "calls"}


def test_a_large_buffer_that_is_replaced_needs_no_copy() -> None:
    model, changing = Writing(), ChangingBuffers()
    changing.seen(changing.copied([model]))
    old, before = model.weights, changing.copied([model])
    model.weights = model.weights + 1
    changing.seen(before)
    before.restore()
    assert model.weights is old
    assert copied(changing.copied([model])) == {"calls"}


def test_expanded_buffers_are_put_back_through_what_they_are_made_of() -> None:
    model, base = nn.Module(), torch.ones(2, 1)
    model.register_buffer("scale", base.expand(2, 4))
    before = Buffers.of([model])
    assert before.places[0].copied.numel() == 2
    base.mul_(3)
    before.restore()
    assert model.scale.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("is_written", [False, True])
def test_buffers_made_in_inference_mode_are_put_back(is_written: bool) -> None:
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("table", torch.arange(3.0))
    before = Buffers.of([model])
    if is_written:
        with torch.inference_mode():
            model.table.mul_(2)
    before.restore()
    assert model.table.tolist() == [0.0, 1.0, 2.0]


def test_a_buffer_that_was_registered_since_is_gone() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    before = Buffers.of([model])
    model[0].register_buffer("seen", torch.tensor(4), persistent=False)
    before.restore()
    assert not hasattr(model[0], "seen")
    assert list(model[1]._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
