"""Your own loop, by name: windows, tails, streams that stop, misuse, several models, states."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga
from oracle import assert_same, assert_same_gradients, own_loop, parameters_of, whole_batches
from pairs import ALL_X, ALL_Y, Pair, assert_no_gradients, make_accumulator, pairs, squares


def train(
    accumulator: ga.Accumulator,
    model: nn.Module,
    stream: Iterable[Pair],
    *,
    after: Callable[[int], object] = lambda done: None,
) -> list[ga.Update]:
    """One pass; ``after(n)`` runs in the loop's body when the n-th micro-batch is done."""
    updates = []
    for done, micro_batch in enumerate(accumulator.over(stream), start=1):
        update = accumulator.backward(squares(model, micro_batch))
        if update:
            updates.append(update)
        after(done)
    return updates


# ---------------------------------------------------------------------------------------------------- windows and tails

TAILS: dict[str, tuple[str, list[list[int]], list[slice]]] = {
    # tail, rows of the micro-batches in each pass, and which of all of them make each update
    "step, short last window": ("step", [[5, 5, 5, 5, 3]], [slice(0, 2), slice(2, 4), slice(4, 5)]),
    "step, window longer than the epoch": ("step", [[5], [4]], [slice(0, 1), slice(1, 2)]),
    "step, two epochs": ("step", [[2, 1, 2]] * 2, [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]),
    "drop, short last window": ("drop", [[5, 5, 5, 5, 3]], [slice(0, 2), slice(2, 4)]),
    "drop, full windows only": ("drop", [[5, 5]], [slice(0, 2)]),
    "drop, two epochs": ("drop", [[2, 1, 2]] * 2, [slice(0, 2), slice(3, 5)]),
    "carry, short last window": (
        "carry",
        [[5, 5, 3]],
        [slice(0, 2), slice(2, 3)],
    ),  # what is left at the end is flushed
    "carry, three epochs": ("carry", [[2, 1, 2]] * 3, [slice(2 * i, min(2 * i + 2, 9)) for i in range(5)]),
    "carry, window longer than the epoch": ("carry", [[5], [4], [3]], [slice(0, 2), slice(2, 3)]),
    "one sample": ("step", [[1]], [slice(0, 1)]),
    "nothing at all": ("step", [[]], []),
}


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize("name", TAILS)
def test_each_update_is_of_the_batch_that_its_tail_makes(name: str, has_length: bool) -> None:
    tail, sizes, windows = TAILS[name]
    model, optimizer, accumulator = make_accumulator(micro_batches=2, tail=tail)
    whole = copy.deepcopy(model)
    passes = [pairs(*one_pass) for one_pass in sizes]
    streams = passes if has_length else [iter(one_pass) for one_pass in passes]

    made, updates = own_loop(accumulator, model, optimizer, streams, squares)

    stream = [pair for one_pass in passes for pair in one_pass]
    batches = [tuple(torch.cat(tensors) for tensors in zip(*stream[window], strict=True)) for window in windows]
    assert_same(made, whole_batches(whole, torch.optim.SGD(whole.parameters(), lr=0.1), batches, squares))
    rows = [[len(x) for x, _ in stream[window]] for window in windows]
    assert [update.samples for update in updates] == [sum(window) for window in rows]
    assert [update.weight for update in updates] == [sum(window) for window in rows]
    assert [update.micro_batches for update in updates] == [len(window) for window in rows]
    assert [update.micro_batch_size for update in updates] == [max(window) for window in rows]
    assert all(update.seconds > 0 for update in updates)
    assert accumulator.samples == sum(map(sum, rows))
    assert_no_gradients(model)


def test_a_window_that_is_never_complete_is_refused_where_it_would_be_dropped() -> None:
    model, _, accumulator = make_accumulator(micro_batches=8, tail="drop")
    message = r'The pass has 2 micro-batches.*micro_batches=8 and tail="drop".*no update would be made.*tail="step"'
    with pytest.raises(ga.WindowError, match=message):
        accumulator.over(pairs(5, 5))
    with pytest.raises(ga.WindowError, match=message):
        train(accumulator, model, iter(pairs(5, 5)))
    assert_no_gradients(model)
    model, _, accumulator = make_accumulator(batch_size=11, tail="drop")
    with pytest.raises(ga.WindowError, match=r"The pass has 2 micro-batches \(10 samples\).*batch_size=11"):
        train(accumulator, model, pairs(5, 5))


def test_a_schedule_is_asked_once_for_each_update() -> None:
    asked: list[int] = []

    def micro_batches(update: int) -> int:
        asked.append(update)
        return update

    model, _, accumulator = make_accumulator(micro_batches=micro_batches)
    updates = train(accumulator, model, pairs(*[1] * 10))
    assert [update.micro_batches for update in updates] == [1, 2, 3, 4]
    assert asked == [1, 2, 3, 4]


def test_micro_batches_that_do_not_add_up_to_the_batch_size() -> None:
    model, _, accumulator = make_accumulator(batch_size=8)
    message = r"do not add up to batch_size=8: there were 5 samples, and the next micro-batch has 5\..*of 10 samples"
    with pytest.raises(ga.WindowError, match=message):
        train(accumulator, model, pairs(5, 5))
    assert_no_gradients(model)


def test_the_plan_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, _, accumulator = make_accumulator(micro_batches=3)
    with caplog.at_level(logging.INFO, "gradaccum"):
        for _ in range(2):
            train(accumulator, model, pairs(4, 4, 2, 4, 4, 2, 1))
    assert caplog.messages == ["batch 12 = 3 micro-batches x 4 | read: a mean over samples | 3 updates an epoch"]


def test_samples_that_cannot_be_counted() -> None:
    model, _, accumulator = make_accumulator(batch_size=8)
    with pytest.raises(ga.LossError, match=r"counts samples.*no tensor with a first.*samples=.*micro_batches="):
        next(iter(accumulator.over(["text", "text"])))  # no list of two texts: each item is a micro-batch
    model, _, accumulator = make_accumulator(micro_batches=2)
    for (x, y), _ in zip(pairs(2, 1), accumulator.over(["text", "more"]), strict=True):
        update = accumulator.backward(ga.Loss.mean(squares(model, (x, y)), over=len(x)))
    assert update is not None
    assert (update.samples, update.micro_batch_size, update.weight) == (None, None, 3)


# ------------------------------------------------------------------------------------------------ nothing to learn from
def test_a_micro_batch_that_is_left_out() -> None:
    model, _, accumulator = make_accumulator(micro_batches=3)
    batch = (ALL_X[:4], ALL_Y[:4])
    weight = model[0].weight
    expected = weight.detach() - 0.1 * torch.autograd.grad(squares(model, batch), weight)[0]
    for i, _ in enumerate(accumulator.over(pairs(1, 1, 1))):
        left_out = ga.Loss.sum(torch.zeros(()), over=0)
        update = accumulator.backward(ga.Loss.mean(squares(model, batch), over=4) if i == 1 else left_out)
    assert update is not None
    assert update.weight == 4
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("over", [0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_window_that_weighs_nothing_makes_no_update(over: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2, scheduler=scheduler)
    before = parameters_of(model)
    with caplog.at_level(logging.WARNING, "gradaccum"):
        for x, _ in accumulator.over(pairs(2, 2)):
            update = accumulator.backward(ga.Loss.mean(model(x).sum() * torch.nan, over=over))
    assert update is not None
    assert (update.index, update.skipped, update.weight, update.samples) == (1, True, 0, 4)
    assert update.loss.isnan()
    assert "update 1 was skipped: the weight of its batch is 0" in caplog.text
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert scheduler.last_epoch == 0
    assert not optimizer.state
    assert train(accumulator, model, pairs(2, 2))[0].index == 2


# ------------------------------------------------------------------------------------------------------ loops that stop
def test_break_inside_a_window_says_what_is_lost() -> None:
    model, _, accumulator = make_accumulator(micro_batches=3)

    def stop_early() -> None:
        for done, micro_batch in enumerate(accumulator.over(pairs(2, 2, 2, 2, 1, 2)), start=1):
            accumulator.backward(squares(model, micro_batch))
            if done == 5:
                break

    with pytest.warns(ga.DiscardedWindowWarning, match=r"2 micro-batches \(3 samples\) .*never applied.*discarded"):
        stop_early()
    assert_no_gradients(model)
    assert (accumulator.updates, accumulator.samples) == (1, 6)
    assert [update.index for update in train(accumulator, model, pairs(2, 2, 2))] == [2]


def test_break_between_windows_is_no_loss() -> None:
    model, _, accumulator = make_accumulator(micro_batches=2)
    for micro_batch in accumulator.over(pairs(2, 2, 2, 2)):
        if accumulator.backward(squares(model, micro_batch)):
            break
    assert accumulator.updates == 1


@pytest.mark.parametrize("tail", ["step", "drop", "carry"])
def test_an_error_in_the_loops_body_stays_that_error(tail: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _, accumulator = make_accumulator(micro_batches=2, tail=tail)

    def fail(done: int) -> None:
        if done == 3:
            raise KeyError("mine")

    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING, "gradaccum"):
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="mine"):
            train(accumulator, model, pairs(2, 2, 2, 2), after=fail)
    # A warning, or a line in the log where Python has not let go of the loop before the error is on its way.
    said = caplog.text + "".join(str(warning.message) for warning in warned)
    assert ("1 micro-batches (2 samples)" in said) == (tail != "carry")
    if tail == "carry":
        assert accumulator.flush() is not None
    assert_no_gradients(model)
    assert accumulator.updates == (2 if tail == "carry" else 1)
    assert train(accumulator, model, pairs(2, 2))[0].samples == 4


def failing_after(micro_batches: list[Pair]) -> Iterator[Pair]:
    yield from micro_batches
    raise OSError("disk gone")


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("tail", ["step", "drop"])
def test_a_loader_that_raises(tail: str, is_inside: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, _, accumulator = make_accumulator(micro_batches=2, tail=tail)
    whole = copy.deepcopy(model)
    with pytest.raises(OSError, match="disk gone"), caplog.at_level(logging.WARNING, "gradaccum"):
        train(accumulator, model, failing_after(pairs(2, 2, *[2] * is_inside)))
    assert (accumulator.updates, accumulator.samples) == (1, 4), "the window before is applied, the half one is not"
    assert ("1 micro-batches (2 samples) were accumulated and never applied" in caplog.text) == is_inside
    assert_no_gradients(model)
    whole_batches(whole, torch.optim.SGD(whole.parameters(), lr=0.1), [(ALL_X[:4], ALL_Y[:4])], squares)
    assert_same_gradients(parameters_of(model), parameters_of(whole))


def test_an_accumulator_that_is_dropped_with_a_window_open() -> None:
    model, optimizer, accumulator = make_accumulator(micro_batches=2, tail="carry")
    train(accumulator, model, pairs(2))
    with pytest.warns(ga.DiscardedWindowWarning, match=r"1 micro-batches \(2 samples\)"):
        del accumulator
    assert_no_gradients(model)
    optimizer.step()  # is free again


class Counting(TensorDataset):
    def __init__(self) -> None:
        super().__init__(ALL_X, ALL_Y)
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("tail", ["step", "drop", "carry"])
def test_a_data_loader_is_asked_for_nothing_twice(tail: str) -> None:
    model, _, accumulator = make_accumulator(batch_size=10, tail=tail)
    dataset = Counting()
    train(accumulator, model, DataLoader(dataset, batch_size=5))
    assert dataset.asked == list(range(23))
    assert accumulator.samples == {"step": 23, "drop": 20, "carry": 20}[tail]
    accumulator.flush()


def test_a_new_pass_ends_the_one_before() -> None:
    model, _, accumulator = make_accumulator(micro_batches=2)
    first = iter(accumulator.over(pairs(2, 2)))
    accumulator.backward(squares(model, next(first)))
    with pytest.warns(ga.DiscardedWindowWarning, match="1 micro-batches"):
        train(accumulator, model, pairs(1, 1))
    with pytest.raises(ga.MisuseError, match="ended by another over"):
        next(first)
    assert next(first, None) is None
    assert accumulator.samples == 2


# --------------------------------------------------------------------------------------------------------------- states
def test_a_state_is_counted_on_from(caplog: pytest.LogCaptureFixture) -> None:
    """Windows may be of another size from there on, which is said."""
    caplog.set_level("INFO", logger="gradaccum")
    model, _, before = make_accumulator(micro_batches=3)
    train(before, model, pairs(2, 1, 2, 3))
    state = before.state_dict()
    assert state == {"updates": 2, "micro_batches": 4, "samples": 8, "version": 1, "window": {"micro_batches": 3}}
    before.load_state_dict(state)
    assert "the state was saved with" not in caplog.text
    model, _, after = make_accumulator(micro_batches=2)
    after.load_state_dict(state)
    said = "the state was saved with micro_batches=3, and this run goes on with micro_batches=2 from update 3 on"
    assert said in caplog.text
    make_accumulator(batch_size=lambda update: 10 * update)[2].load_state_dict(state)
    assert "goes on with batch_size=30 from update 3 on" in caplog.text
    assert [update.index for update in train(after, model, pairs(5, 1))] == [3]
    assert (after.updates, after.micro_batches, after.samples) == (3, 6, 14)


def test_no_state_in_mid_window() -> None:
    model, _, accumulator = make_accumulator(micro_batches=3, tail="carry")
    state = accumulator.state_dict()
    train(accumulator, model, pairs(2, 3))
    with pytest.raises(ga.StateError, match=r"window is open, with 2 micro-batches \(5 samples\).*Save right after"):
        accumulator.state_dict()
    with pytest.raises(ga.StateError, match=r"window is open, with 2 micro-batches.*Load before training"):
        accumulator.load_state_dict(state)
    accumulator.flush()
    assert accumulator.state_dict()["updates"] == 1


def test_a_state_that_is_none() -> None:
    _, _, accumulator = make_accumulator(micro_batches=3)
    with pytest.raises(ga.StateError, match=r"no count of micro_batches, samples; .*holds updates, other"):
        accumulator.load_state_dict({"updates": 1, "other": 2})


# -------------------------------------------------------------------------------------------------- thrown away by hand
def test_a_discarded_window_is_in_no_update() -> None:
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2)
    data = list(torch.randn(13, 3).double().split([3, 1, 5, 4]))
    seen: list[torch.Tensor | None] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    updates = []
    for index, x in enumerate(accumulator.over(data)):
        if index == 1:
            assert accumulator.discard() == 1  # the micro-batch in hand has had no backward, and is left out too
            assert model.weight.grad is None
            continue
        updates.append(accumulator.backward(model(x).mean()))
    assert [update and update.samples for update in updates] == [None, None, 9]
    torch.testing.assert_close(seen[0], torch.cat(data[2:]).mean(0, keepdim=True))
    assert accumulator.discard() == 0


def test_a_window_outside_of_a_pass_is_discarded() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2)
    accumulator.backward(ga.Loss.mean(model(torch.ones(2, 3)).mean(), over=2))
    assert accumulator.discard() == 1
    optimizer.step()  # nobody minds any more
    assert accumulator.flush() is None
