"""Every path is the whole batch in float64: models x losses x splits x tails x windows x optimizers."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import gradaccum as ga
from oracle import (
    EXACT,
    ROWS,
    WAYS,
    Made,
    assert_same,
    assert_same_gradients,
    assert_same_number,
    gradients_of,
    own_loop,
    whole_batches,
    whole_in_hand,
)
from tasks import CLASSES, IGNORED, LOSSES, MODELS, Batch, LossCase, joined, make_batch, make_model

RATE = 1e-3  # so that training on sums does not diverge, which would blow rounding up

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=True),
    # Their eps is far above rounding: a gradient that is 0 but for rounding would be blown up to size 1 by a small one.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-2, fused=False, foreach=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-2, fused=True),
}

TAILS = ("step", "drop", "carry")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a window's gradient becomes an update."""

    optimizer: str
    clip_norm: float | None
    has_scheduler: bool

    def make(self, model: nn.Module) -> tuple[Optimizer, Any]:
        optimizer = OPTIMIZERS[self.optimizer](model.parameters())
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if self.has_scheduler else None


# Plain SGD without clipping comes first, and so is what a failing example shrinks to. A norm of 0.05 always clips here,
# 1e6 never, and infinity only measures.
settings_of_updates = st.builds(
    Setting,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    clip_norm=st.sampled_from([None, 0.05, 1e6, math.inf]),
    has_scheduler=st.booleans(),
)
models = st.sampled_from([name for name in MODELS if name != "sparse embedding"])
losses = st.sampled_from(list(LOSSES))
seeds = st.integers(0, 999)
sizes_of_micro_batches = st.lists(st.integers(0, 7), min_size=1, max_size=9)


def stream(sizes: list[int], *, seed: int, masked: list[int] | None = None) -> list[Batch]:
    """Micro-batches of these sizes; those at ``masked`` have no label that counts."""
    return [make_batch(n, seed=seed + 31 * i, masked=i in (masked or [])) for i, n in enumerate(sizes)]


def by_update(schedule: list[int]) -> Callable[[int], int]:
    """The size of each window: of a schedule that begins again at its end."""
    return lambda update: schedule[(update - 1) % len(schedule)]


def windows_of(
    passes: list[list[Batch]], tail: str, is_full: Callable[[list[Batch], int], bool]
) -> Iterator[list[Batch]]:
    """Which micro-batches make which update, spelled out: ``is_full(window, index)``."""
    window: list[Batch] = []
    index = 1
    for micro_batches in passes:
        for micro_batch in micro_batches:
            window.append(micro_batch)
            if is_full(window, index):
                yield window
                window, index = [], index + 1
        if tail == "step" and window:
            yield window
            window, index = [], index + 1
        if tail == "drop":
            window = []
    if window:  # carried, and flushed
        yield window


def check_loop(
    model: nn.Module,
    case: LossCase,
    passes: list[list[Batch]],
    windows: list[list[Batch]],
    setting: Setting,
    *,
    has_length: bool = True,
    **options: Any,
) -> None:
    whole_model = copy.deepcopy(model)
    optimizer, scheduler = setting.make(model)
    accumulator = ga.Accumulator(
        model, optimizer, clip_norm=setting.clip_norm, scheduler=scheduler, weights=case.weights, **options
    )
    streams: Iterable[Iterable[Batch]] = passes if has_length else [iter(one_pass) for one_pass in passes]

    made, updates = own_loop(accumulator, model, optimizer, streams, case.for_library)

    optimizer, scheduler = setting.make(whole_model)
    batches = [joined(window) for window in windows]
    expected = whole_batches(
        whole_model, optimizer, batches, case.for_oracle, clip_norm=setting.clip_norm, scheduler=scheduler
    )
    assert_same(made, without_losses_of_empty_terms(expected, made))
    check_counts(updates, case, batches, [len(window) for window in windows])
    assert accumulator.updates == len(windows)
    assert accumulator.samples == sum(len(batch["x"]) for batch in batches)
    assert accumulator.micro_batches == sum(len(window) for window in windows)


def check_counts(updates: list[ga.Update], case: LossCase, batches: list[Batch], micro_batches: list[int]) -> None:
    assert [update.index for update in updates] == list(range(1, len(batches) + 1))
    assert [update.samples for update in updates] == [len(batch["x"]) for batch in batches]
    assert [update.micro_batches for update in updates] == micro_batches
    for update, batch in zip(updates, batches, strict=True):
        assert_same_weight(update.weight, case.weight(batch))


def assert_same_weight(weight: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert weight.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_weight(weight[name], value)
    elif expected is None:
        assert weight is None
    else:
        assert_same_number(float(weight), expected, where="weight")


def without_losses_of_empty_terms(expected: list[Made], made: list[Made]) -> list[Made]:
    """A term that weighs nothing in a window has a mean of NaN, and so has the sum of them all."""
    return [
        Made(**{**vars(right), "loss": left.loss}) if math.isnan(left.loss) and not right.is_skipped else right
        for left, right in zip(made, expected, strict=True)
    ]


@given(data=st.data(), tail=st.sampled_from(TAILS), model=models, loss=losses, setting=settings_of_updates, seed=seeds)
@settings(max_examples=120)
def test_own_loop_counted_in_micro_batches(
    data: st.DataObject, tail: str, model: str, loss: str, setting: Setting, seed: int
) -> None:
    case = LOSSES[loss]
    assume(tail != "carry" or case.weights is None)
    sizes = data.draw(st.lists(sizes_of_micro_batches, min_size=1, max_size=3), label="sizes of each pass")
    masked = data.draw(st.lists(st.integers(0, 8), max_size=4), label="masked")
    schedule = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="micro_batches")
    passes = [stream(one_pass, seed=seed + 7 * i, masked=masked) for i, one_pass in enumerate(sizes)]
    if tail == "drop":  # no update at all in a pass is an error
        assume(min(len(one_pass) for one_pass in passes) >= max(schedule))
    micro_batches = by_update(schedule)
    check_loop(
        make_model(model, seed=seed),
        case,
        passes,
        list(windows_of(passes, tail, lambda window, index: len(window) == micro_batches(index))),
        setting,
        has_length=data.draw(st.booleans(), label="has a length"),
        tail=tail,
        micro_batches=schedule[0] if len(schedule) == 1 else micro_batches,
    )


@st.composite
def windows_that_add_up(draw: st.DrawFn, sizes: list[int]) -> list[list[int]]:
    """Rows of micro-batches that add up to each window's size; of the last window perhaps only the first few."""
    windows: list[list[int]] = []
    for size in sizes:
        window: list[int] = []
        while sum(window) < size:
            window.append(draw(st.integers(0 if len(window) < 5 else 1, size - sum(window))))
        windows.append(window)
    return [*windows[:-1], windows[-1][: draw(st.integers(1, len(windows[-1])))]]


@given(data=st.data(), tail=st.sampled_from(TAILS), model=models, loss=losses, setting=settings_of_updates, seed=seeds)
@settings(max_examples=80)
def test_own_loop_counted_in_samples(
    data: st.DataObject, tail: str, model: str, loss: str, setting: Setting, seed: int
) -> None:
    case = LOSSES[loss]
    assume(tail != "carry" or case.weights is None)
    schedule = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=3), label="batch_size")
    batch_size = by_update(schedule)
    num_windows = data.draw(st.integers(1, 4), label="windows")
    sizes = data.draw(windows_that_add_up([batch_size(i + 1) for i in range(num_windows)]), label="rows")
    micro_batches = stream([n for window in sizes for n in window], seed=seed)
    first_pass = data.draw(st.integers(1, len(micro_batches)), label="first pass") if tail == "carry" else None
    passes = [
        one_pass
        for one_pass in (micro_batches[:first_pass], micro_batches[first_pass or len(micro_batches) :])
        if one_pass
    ]

    def is_full(window: list[Batch], index: int) -> bool:
        return sum(len(micro_batch["x"]) for micro_batch in window) == batch_size(index)

    windows = list(windows_of(passes, tail, is_full))
    assume(windows or tail != "drop")  # no update at all is an error
    check_loop(
        make_model(model, seed=seed),
        case,
        passes,
        windows,
        setting,
        tail=tail,
        batch_size=schedule[0] if len(schedule) == 1 else batch_size,
    )


@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    micro_batch_size=st.integers(1, 20) | st.just("auto"),
    masked=st.booleans(),
    model=models,
    loss=losses,
    setting=settings_of_updates,
    seed=seeds,
)
@settings(max_examples=100)
def test_whole_batch_in_hand(
    sizes: list[int], micro_batch_size: Any, masked: bool, model: str, loss: str, setting: Setting, seed: int
) -> None:
    case = LOSSES[loss]
    batches = stream(sizes, seed=seed, masked=[1] if masked else [])
    own, whole = make_model(model, seed=seed), make_model(model, seed=seed)
    optimizer, scheduler = setting.make(own)
    train_step = ga.TrainStep(
        own,
        optimizer,
        case.for_library,
        micro_batch_size=micro_batch_size,
        weights=case.weights,
        clip_norm=setting.clip_norm,
        scheduler=scheduler,
    )

    made, updates = whole_in_hand(train_step, own, optimizer, batches)

    optimizer, scheduler = setting.make(whole)
    expected = whole_batches(
        whole, optimizer, batches, case.for_oracle, clip_norm=setting.clip_norm, scheduler=scheduler
    )
    assert_same(made, without_losses_of_empty_terms(expected, made))
    if micro_batch_size == "auto":
        check_counts(updates, case, batches, [update.micro_batches for update in updates])
    else:
        check_counts(updates, case, batches, [-(-n // micro_batch_size) for n in sizes])
        assert all(update.micro_batch_size <= micro_batch_size for update in updates)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_every_micro_batch_size_gives_the_same_gradient(model: str, loss: str) -> None:
    case, batch = LOSSES[loss], make_batch(ROWS)
    whole = make_model(model)
    value = case.for_oracle(whole, batch)
    value.backward()
    own = make_model(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=RATE)
    for micro_batch_size in range(1, ROWS + 2):
        train_step = ga.TrainStep(
            own, optimizer, case.for_library, micro_batch_size=micro_batch_size, weights=case.weights
        )
        made = train_step.backward(batch)
        where = f"micro-batches of {micro_batch_size}: "
        assert_same_gradients(gradients_of(own), gradients_of(whole), tolerance=EXACT, where=where)
        assert_same_number(made.value.item(), value.item(), where=f"{where}loss")
        optimizer.zero_grad()


@pytest.mark.parametrize("labels", ["all ignored", "all of the class without weight"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_a_micro_batch_with_nothing_to_learn_from(way: str, loss: str, labels: str) -> None:
    """Rows 3 to 6 are a micro-batch of their own and more, however the batch is cut."""
    case, batch = LOSSES[loss], make_batch(ROWS)
    if labels == "all ignored":
        batch["labels"][3:7], batch["mask"][3:7] = IGNORED, False
    else:
        batch["labels"][3:7].masked_fill_(batch["mask"][3:7], CLASSES - 1)
    own, whole = make_model("mlp"), make_model("mlp")
    made = WAYS[way](own, OPTIMIZERS["sgd"](own.parameters()), [batch], case.for_library, weights=case.weights)
    expected = whole_batches(whole, OPTIMIZERS["sgd"](whole.parameters()), [batch], case.for_oracle)
    assert not expected[0].is_skipped
    assert_same(made, expected)
