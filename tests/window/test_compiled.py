"""Compiled models, handed over as they are: one compilation for micro-batches of every size, and the same gradients."""

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


def batch_of(rows: int, dtype: torch.dtype = torch.float64) -> Batch:
    return torch.randn(rows, FEATURES, dtype=dtype), torch.randint(CLASSES, (rows,))


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accumulator_of(model: Any, **options: Any) -> ga.Accumulator:
    return ga.Accumulator(model, SGD(model.parameters(), lr=0.1), **options)


def assert_whole_batchs(model: nn.Module, batch: Batch) -> None:
    whole = make()
    loss_fn(whole, batch).backward()
    made = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients_of(model).items()}
    assert_same_gradients(made, gradients_of(whole), tolerance=EXACT)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def forward_only(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


COMPILE: dict[str, Compile] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile": in_place,
    "a module inside": lambda model, backend: nn.Sequential(torch.compile(model, backend=backend)),
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
    model, batch = make(), batch_of(23)
    loss = torch.compile(loss_fn, backend=backend)
    ga.TrainStep(model, SGD(model.parameters(), lr=0.1), loss, micro_batch_size=4).backward(batch)
    assert_whole_batchs(model, batch)
    assert backend.count == 1


def test_a_loss_over_the_whole_batch(backend: Compilations) -> None:
    model, batch = torch.compile(make(), backend=backend), batch_of(23)
    step = ga.TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        forward=lambda model, batch: model(batch[0]),
        batch_loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        micro_batch_size=4,
        kept_graphs=6,
    )
    step.backward(batch)
    assert_whole_batchs(model, batch)
    assert backend.count == 1


@pytest.mark.parametrize(
    ("options", "rows", "count"),
    [
        pytest.param({}, [16] * 5, 1, id="sizes that are searched: 2, 4, 8 and 16"),
        pytest.param({"micro_batch_size": 4}, [24, 12], 1, id="equal pieces, compiled for their size"),
        pytest.param({"micro_batch_size": 4}, [24, 12, 11, 10], 2, id="and then the one compilation for any size"),
    ],
)
def test_how_often_a_model_is_compiled(
    options: dict[str, Any], rows: list[int], count: int, backend: Compilations
) -> None:
    model = torch.compile(make(), backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, **options)
    for n in rows:
        step(batch_of(n))
    assert backend.count == count


def test_under_autocast(backend: Compilations) -> None:
    """Casts that are kept over a window are no reason to compile again."""

    def in_bf16(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    model = torch.compile(make().float(), backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters(), lr=0.1), in_bf16, micro_batch_size=4)
    for rows in (23, 10):
        step(batch_of(rows, torch.float32))
    assert backend.count == 1


def test_what_is_not_seen_is_left_to_torch_and_so_is_what_the_user_wants_otherwise(backend: Compilations) -> None:
    model = make()
    inside = torch.compile(model, backend=backend)
    step = ga.TrainStep(model, SGD(model.parameters()), lambda _, batch: loss_fn(inside, batch), micro_batch_size=4)
    step(batch_of(23))
    assert backend.count == 2
    model = torch.compile(make(), backend=backend, dynamic=False)
    ga.TrainStep(model, SGD(model.parameters()), loss_fn, micro_batch_size=4)(batch_of(23))
    assert backend.count == 4, "code for each size"


# ------------------------------------------------------------------------------------------------------------ own loops
def loader_of(batch: Batch, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch), **options)


STREAMS: dict[str, Callable[[Batch], Any]] = {
    "loader": lambda batch: loader_of(batch, batch_size=4),
    "batch sampler": lambda batch: loader_of(
        batch, batch_sampler=BatchSampler(SequentialSampler(range(len(batch[0]))), batch_size=4, drop_last=False)
    ),
    "list": lambda batch: list(zip(*(column.split(4) for column in batch), strict=True)),
}


@pytest.mark.parametrize("stream", STREAMS)
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
        for micro_batch in accumulator.over(STREAMS[stream](batch)):
            accumulator.backward(loss_fn(model, micro_batch))
    assert len(seen) == 2
    assert backend.count == 1


def test_two_accumulators_follow_one_pass(backend: Compilations) -> None:
    plain, model = make(), torch.compile(make(), backend=backend)
    ones, twos = accumulator_of(plain, micro_batches=3), accumulator_of(model, micro_batches=2)
    for micro_batch in twos.over(ones.over(loader_of(batch_of(23), batch_size=4))):
        ones.backward(loss_fn(plain, micro_batch))
        twos.backward(loss_fn(model, micro_batch))
    assert backend.count == 1


def test_a_stream_that_cannot_be_seen_through_is_left_to_torch(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    accumulator = accumulator_of(model, micro_batches=2)
    for micro_batch in accumulator.over(batch_of(rows) for rows in (4, 4, 3, 5, 2)):
        accumulator.backward(loss_fn(model, micro_batch))
    assert backend.count == 2


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(2)


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"batch_size": 4}, True),
        ({"batch_size": 4, "drop_last": True}, False),
        ({"batch_size": 23}, False),
        ({"batch_size": None}, False),
        ({"batch_size": 1}, False),
        ({"batch_size": 4, "dataset": Stream()}, False),
    ],
)
def test_what_a_loader_says_of_its_sizes(options: dict[str, Any], differ: bool) -> None:
    rows = AnyNumberOfRows()
    rows.expect_of(DataLoader(**{"dataset": TensorDataset(*batch_of(23)), **options}))
    assert hasattr(rows.marked(torch.zeros(4, 2)), "_dynamo_weak_dynamic_indices") is differ


def test_a_list_with_a_broken_micro_batch_fails_in_its_place(backend: Compilations) -> None:
    model = torch.compile(make(), backend=backend)
    accumulator = accumulator_of(model, micro_batches=1)
    broken = (torch.zeros(3, FEATURES, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    stream = iter(accumulator.over([batch_of(4), broken]))
    accumulator.backward(loss_fn(model, next(stream)))
    next(stream)
    with pytest.raises(ga.LossError, match="number of samples is not known"):
        accumulator.backward(loss_fn(model, batch_of(3)))


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
