"""Compiled models, handed over as they are: one compilation for micro-batches of every size, and the same gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import gradaccum as ga
from gradaccum.window.compiled import AnyNumberOfRows, any_number_of_rows
from oracle import EXACT, assert_same_gradients, gradients_of

FEATURES, CLASSES = 4, 3

Batch = tuple[Tensor, Tensor]
Compile = Callable[[nn.Module, Any], Any]


class Compilations:
    """A backend that compiles nothing and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def backend() -> Iterator[Compilations]:
    torch._dynamo.reset()
    yield Compilations()
    torch._dynamo.reset()


class Model(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:  # torch compiles no forward of its own modules in place
        return super().forward(input)


def make() -> nn.Module:
    torch.manual_seed(1)
    return Model(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batch_of(rows: int) -> Batch:
    return torch.randn(rows, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (rows,))


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_whole_batchs(model: nn.Module, batch: Batch) -> None:
    whole = make()
    loss_fn(whole, batch).backward()
    made = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients_of(model).items()}
    assert_same_gradients(made, gradients_of(whole), tolerance=EXACT)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def inside(model: nn.Module, backend: Any) -> nn.Module:
    return nn.Sequential(torch.compile(model, backend=backend))


def forward_only(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


COMPILE: dict[str, Compile] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile": in_place,
    "a module inside": inside,
    "its forward": forward_only,
}


# -------------------------------------------------------------------------------------------------------- whole batches


@pytest.mark.parametrize("fused", ["auto", True, False])
@pytest.mark.parametrize("compile_", COMPILE)
def test_a_batch_is_compiled_for_once(compile_: str, fused: Any, backend: Compilations) -> None:
    own = make()
    model = COMPILE[compile_](own, backend)
    step = ga.TrainStep(model, SGD(own.parameters(), lr=0.1), loss_fn, micro_batch_size=4, fused=fused)
    batch = batch_of(23)  # pieces of 4 and of 3
    step.backward(batch)
    assert_whole_batchs(own, batch)
    own.zero_grad()
    for rows in (10, 21):
        assert step(batch_of(rows)).micro_batch_size == 4
    assert backend.count == 1


def test_a_compiled_loss_function(backend: Compilations) -> None:
    model = make()
    compiled = torch.compile(loss_fn, backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), compiled, micro_batch_size=4)
    batch = batch_of(23)
    step.backward(batch)
    assert_whole_batchs(model, batch)
    assert backend.count == 1


def test_a_loss_over_the_whole_batch(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    step = ga.TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        forward=lambda model, batch: model(batch[0]),
        batch_loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        micro_batch_size=4,
        kept_graphs=6,
    )
    batch = batch_of(23)
    step.backward(batch)
    assert_whole_batchs(model, batch)
    assert backend.count == 1


def test_sizes_that_are_searched(backend: Compilations) -> None:
    """Pieces of 2, 4, 8 and 16 are tried."""
    model = torch.compile(make(), backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn)
    for _ in range(5):
        step(batch_of(16))
    assert backend.count == 1


def test_under_autocast(backend: Compilations) -> None:
    """Casts that are kept over a window are no reason to compile again."""
    model = torch.compile(make().float(), backend=backend)

    def in_bf16(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), in_bf16, micro_batch_size=4)
    for rows in (23, 10):
        x, y = batch_of(rows)
        step((x.float(), y))
    assert backend.count == 1


def test_equal_pieces_are_compiled_for_their_size(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=4)
    batches = [batch_of(24), batch_of(12)]
    for batch in batches:
        step(batch)
    assert backend.count == 1
    step(batch_of(11))  # pieces of 4, 4 and 3: the one compilation that any size takes
    step(batch_of(10))
    assert backend.count == 2


def test_what_is_not_seen_is_left_to_torch(backend: Compilations) -> None:
    model = make()
    compiled = torch.compile(model, backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters()), lambda _, batch: loss_fn(compiled, batch), micro_batch_size=4)
    step(batch_of(23))
    assert backend.count == 2


def test_the_users_wish_for_code_for_each_size_is_kept(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend, dynamic=False)
    step = ga.TrainStep(model, SGD(model.parameters()), loss_fn, micro_batch_size=4)
    step(batch_of(23))
    assert backend.count == 2


# ------------------------------------------------------------------------------------------------------------ own loops


def loader_of(batch: Batch, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch), **options)


def streams(batch: Batch) -> dict[str, Any]:
    rows = len(batch[0])
    sampler = BatchSampler(SequentialSampler(range(rows)), batch_size=4, drop_last=False)
    return {
        "loader": loader_of(batch, batch_size=4),
        "batch sampler": loader_of(batch, batch_sampler=sampler),
        "list": list(zip(*(column.split(4) for column in batch), strict=True)),
    }


@pytest.mark.parametrize("stream", ["loader", "batch sampler", "list"])
def test_a_smaller_last_micro_batch(stream: str, backend: Compilations) -> None:
    batch = batch_of(23)
    model = torch.compile(make(), backend=backend)
    optimizer = SGD(model.parameters(), lr=0.0)
    accumulator = ga.Accumulator(model, optimizer, batch_size=100)
    seen: list[None] = []

    def look(*_: Any) -> None:
        assert_whole_batchs(model, batch)
        seen.append(None)

    optimizer.register_step_pre_hook(look)
    for _ in range(2):
        for micro_batch in accumulator.over(streams(batch)[stream]):
            accumulator.backward(loss_fn(model, micro_batch))
    assert len(seen) == 2
    assert backend.count == 1


def test_two_accumulators_follow_one_pass(backend: Compilations) -> None:
    plain, model = make(), torch.compile(make(), backend=backend)
    ones = ga.Accumulator(plain, SGD(plain.parameters(), lr=0.1), micro_batches=3)
    twos = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=2)
    for micro_batch in twos.over(ones.over(loader_of(batch_of(23), batch_size=4))):
        ones.backward(loss_fn(plain, micro_batch))
        twos.backward(loss_fn(model, micro_batch))
    assert backend.count == 1


def test_a_stream_that_cannot_be_seen_through_is_left_to_torch(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=2)
    for micro_batch in accumulator.over(batch_of(rows) for rows in (4, 4, 3, 5, 2)):
        accumulator.backward(loss_fn(model, micro_batch))
    assert backend.count == 2


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"batch_size": 4}, True),
        ({"batch_size": 4, "drop_last": True}, False),
        ({"batch_size": 23}, False),
        ({"batch_size": None}, False),
        ({"batch_size": 1}, False),
    ],
)
def test_what_a_loader_says_of_its_sizes(options: dict[str, Any], differ: bool) -> None:
    rows = AnyNumberOfRows()
    rows.expect_of(loader_of(batch_of(23), **options))
    assert hasattr(rows.marked(torch.zeros(4, 2)), "_dynamo_weak_dynamic_indices") is differ


def test_a_loader_of_a_stream() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(2)

    rows = AnyNumberOfRows()
    rows.expect_of(DataLoader(Stream(), batch_size=4))
    assert not hasattr(rows.marked(torch.zeros(4, 2)), "_dynamo_weak_dynamic_indices")


def test_a_list_with_a_broken_micro_batch_fails_in_its_place(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=1)
    broken = (torch.zeros(3, FEATURES, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    stream = iter(accumulator.over([batch_of(4), broken]))
    accumulator.backward(loss_fn(model, next(stream)))
    with pytest.raises(ga.BatchError, match="Rows disagree"):
        next(stream)


# --------------------------------------------------------------------------------------------- what else is handed over


def test_the_wrapper_is_the_model_for_everything_else(backend: Compilations) -> None:
    """Its parameters' names begin with ``_orig_mod.``, they are the original's, and so may the optimizer's be."""
    own = make()
    model = torch.compile(own, backend=backend)
    step = ga.TrainStep(
        model, AdamW(own.parameters(), fused=True), loss_fn, micro_batch_size=4, clip_norm=1.0, fused=True
    )
    update = step(batch_of(23))
    assert update.grad_norm is not None
    state = step.state_dict()
    step.load_state_dict(state)
    assert step.updates == 1


def test_without_a_compiled_model_nothing_is_marked() -> None:
    model = make()
    assert any_number_of_rows([model]) is None
    assert any_number_of_rows([model], loss_fn, None) is None
    assert any_number_of_rows([model], torch._dynamo.disable(loss_fn)) is None


def test_dynamo_is_not_imported_to_find_out() -> None:
    code = """
import sys, torch
from gradaccum.window.compiled import any_number_of_rows
assert any_number_of_rows([torch.nn.Linear(2, 1)]) is None
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
