"""`ga.plan`: what it says, when it falls back, what it refuses, and that it leaves everything as it was."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from architectures import ARCHITECTURES, classes_loss, mlp, planned, rows_of_8
from gradaccum.fit.planner import as_bytes, default_sizes

ROWS = 16
GPT = ARCHITECTURES["gpt"]
METHODS = ("measure", "estimate")


# ------------------------------------------------------------------------------------------------------------- the plan
def test_measured() -> None:
    plan = planned(dataset_size=100)
    assert (plan.method, plan.device, plan.batch_size, plan.memory) == ("measure", "cpu", ROWS, 2**30)
    assert [row.micro_batch_size for row in plan.rows] == [1, 2, 4, 8, 16]
    assert [row.micro_batches for row in plan.rows] == [16, 8, 4, 2, 1]
    assert all(row.fits and row.is_measured and row.updates_per_epoch == 7 for row in plan.rows)
    for row in plan.rows:
        assert row.seconds is not None
        assert row.samples_per_second == pytest.approx(row.micro_batch_size / row.seconds)
        assert plan.peak_bytes(row.micro_batch_size) == row.peak_bytes
    fastest = max(plan.rows, key=lambda row: row.samples_per_second or 0.0)
    assert plan.micro_batch_size == fastest.micro_batch_size
    assert plan.largest_micro_batch_size == ROWS
    assert plan.whole_batch_fits
    assert not plan.accumulation_helps
    assert plan.notes == ()


def test_estimated() -> None:
    plan = planned(method="estimate")
    assert [row.micro_batch_size for row in plan.rows] == [1, 2, 4, 8, 16]
    assert all(row.seconds is None and row.samples_per_second is None and not row.is_measured for row in plan.rows)
    assert plan.micro_batch_size == plan.largest_micro_batch_size == ROWS
    assert plan.rows[0].updates_per_epoch is None


def test_the_breakdown() -> None:
    model = ARCHITECTURES["convolutions"].make()
    plan = planned(model, data=ARCHITECTURES["convolutions"].batch(ROWS), method="estimate")
    parts = plan.breakdown
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert parts.parameters == parts.gradients == parameters
    assert parts.buffers == sum(buffer.nbytes for buffer in model.buffers())
    assert parts.optimizer_state == 2 * parameters + 4 * len(list(model.parameters()))
    assert parts.resident == parts.parameters + parts.buffers + parts.gradients + parts.optimizer_state
    assert plan.peak_bytes(12) - plan.peak_bytes(11) == pytest.approx(parts.activations_per_sample, rel=0.01)
    of_line = parts.resident + parts.temporaries + 12 * parts.activations_per_sample
    assert plan.peak_bytes(12) == pytest.approx(of_line, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_between_two_sizes(method: str) -> None:
    """The largest that fits is looked at as well, and is the largest."""
    free = planned(method=method)
    budget = (free.row(8).peak_bytes + free.row(16).peak_bytes) // 2
    plan = planned(method=method, memory=budget)
    largest = plan.largest_micro_batch_size or 0
    assert 8 < largest < 16
    assert plan.peak_bytes(largest) <= budget < plan.peak_bytes(largest + 1)
    assert [row.fits for row in plan.rows] == [row.peak_bytes <= budget for row in plan.rows]
    assert not plan.row(16).fits
    assert plan.accumulation_helps
    if method == "estimate":
        assert plan.micro_batch_size == largest
        assert plan.row(largest).fits
    else:
        assert plan.row(16).seconds is None


SIZES = {"24GiB": 24 * 2**30, "24GB": 24 * 10**9, "24 gib": 24 * 2**30, " 1.5 MiB ": 3 * 2**19, "512KiB": 2**19}
SIZES |= {"7B": 7, "2TiB": 2**41, "1kB": 1000, 12345: 12345, "24000000000": 24 * 10**9}


@pytest.mark.parametrize("size", SIZES)
def test_budgets(size: str | int) -> None:
    assert as_bytes(size) == SIZES[size]


@pytest.mark.parametrize("size", ["24", "24G", "GiB", "", "24 GiB left", "-1GiB", "0GiB", 0, -5, True, 1.5, None])
def test_what_is_no_budget(size: object) -> None:
    with pytest.raises(ga.WindowError, match=r"is no size.*'24GiB' \(2\*\*30 bytes each\) or '24GB'"):
        as_bytes(size)  # type: ignore[arg-type]


def test_a_bend_of_the_curve() -> None:
    """Up to 25 samples something else is the peak. The size that a budget decides about is found near the bend."""

    def loss_fn(model: Any, data: Any) -> Tensor:
        torch.zeros(100_000)  # 400 kB, and gone
        return (model(data[0]).expand(-1, 2_000) * 1.0).mean()  # 8 kB a sample, and as much in backward

    model, data = nn.Linear(8, 1), rows_of_8(64)
    bend = planned(model, loss_fn, data, method="estimate").peak_bytes(2)
    plan = planned(model, loss_fn, data, method="estimate", memory=bend + 4_000)
    largest = plan.largest_micro_batch_size or 0
    assert 22 <= largest == plan.micro_batch_size <= 26
    one_piece = planned(model, loss_fn, data, method="estimate", micro_batch_sizes=[largest])
    assert plan.row(largest).peak_bytes == one_piece.row(largest).peak_bytes


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_for_nothing(method: str) -> None:
    ran: list[int] = []

    def loss_fn(model: Any, data: Any) -> Tensor:
        ran.append(len(data[0]))
        return classes_loss(model, data)

    plan = planned(loss_fn=loss_fn, method=method, memory=1000)
    assert method == "estimate" or max(ran) == 2  # two sizes tell that no other can be expected to fit
    assert plan.micro_batch_size is plan.largest_micro_batch_size is None
    assert not plan.accumulation_helps
    assert not any(row.fits or row.seconds for row in plan.rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_small_batches(rows: int, method: str) -> None:
    plan = planned(data=rows_of_8(rows), method=method)
    assert plan.rows[-1].micro_batch_size == rows
    assert plan.peak_bytes(100) > plan.peak_bytes(50) > plan.row(rows).peak_bytes


@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_the_users(method: str) -> None:
    plan = planned(micro_batch_sizes=[6, 3, 6], method=method)
    assert [row.micro_batch_size for row in plan.rows] == [3, 6]
    assert [row.is_measured for row in plan.rows] == [method == "measure"] * 2
    assert plan.micro_batch_size in (3, 6)


def test_without_a_budget_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = planned(method="estimate", memory=None)
    assert (estimated.memory, estimated.micro_batch_size) == (None, ROWS)
    memory = planned(memory=None).memory
    assert memory is None or memory > 2**20
    monkeypatch.setattr("gradaccum.fit.planner.available_bytes", lambda device: 1000)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    own = sum(parameter.nbytes for parameter in model.parameters())
    assert planned(model, optimizer=optimizer, memory=None).memory == 1000 + own
    classes_loss(model, rows_of_8()).backward()
    optimizer.step()
    # Gradients and momenta are its own.
    assert planned(model, optimizer=optimizer, memory=None).memory == 1000 + 3 * own


def test_every_kind_of_loss_and_batch() -> None:
    data = {"x": torch.randn(ROWS, 8), "name": ["a"] * ROWS}

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        assert len(micro_batch["name"]) == len(micro_batch["x"])
        output = model(micro_batch["x"])
        return {"mean": ga.Loss.mean(output.mean(), over=3), "plain": output.square().mean()}

    for method in METHODS:
        assert planned(loss_fn=loss_fn, data=data, method=method).method == method


def test_several_models_and_optimizers() -> None:
    def loss_fn(models: Any, data: Any) -> Tensor:
        return F.cross_entropy(models[0](data[0]) + models[1](data[0]), data[1])

    first, second = mlp(), mlp()
    optimizers = [torch.optim.Adam(first.parameters()), torch.optim.SGD(second.parameters(), momentum=0.9)]
    plan = ga.plan([first, second], loss_fn, rows_of_8(), optimizer=optimizers, memory="1GiB", method="estimate")
    parameters = sum(parameter.nbytes for parameter in first.parameters())
    assert plan.method == "estimate"
    assert plan.breakdown.parameters == plan.breakdown.gradients == 2 * parameters
    assert plan.breakdown.optimizer_state == 3 * parameters + 4 * 4


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_over_the_whole_batch(method: str) -> None:
    """Outputs of all samples and the gradient on them are there at any size."""

    def batch_loss(outputs: Tensor, data: Any) -> Tensor:
        assert len(outputs) == len(data[0]) == 64
        return (outputs @ outputs.t()).logsumexp(1).mean()

    coupled = {"loss_fn": None, "forward": lambda model, data: model(data[0]), "batch_loss": batch_loss}
    plan = planned(data=rows_of_8(64), method=method, **coupled)
    alone = planned(data=rows_of_8(64), method=method)
    assert plan.method == method
    assert plan.row(1).peak_bytes > alone.row(1).peak_bytes + 2 * 64 * 64 * 4  # logits of all pairs, and what is saved
    assert plan.row(32).peak_bytes < plan.row(64).peak_bytes


DEFAULTS = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 100: [1, 2, 4, 8, 16, 32, 64, 100]}
DEFAULTS |= {256: [1, 2, 4, 8, 16, 32, 64, 128, 256], 1_000_000: [*(2**i for i in range(8, 20)), 1_000_000]}


@pytest.mark.parametrize("batch_size", DEFAULTS)
def test_powers_of_two_and_the_whole(batch_size: int) -> None:
    assert default_sizes(batch_size) == DEFAULTS[batch_size]


# --------------------------------------------------------------------------------------------- what cannot be estimated
@pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(lambda model, data: classes_loss(model, data) * data[0].sum().item(), id="asks for a number"),
        pytest.param(lambda model, data: classes_loss(model, data) * len(data[0].numpy()), id="asks numpy"),
        pytest.param(lambda model, data: model(data[0][data[0][:, 0] > -100]).square().mean(), id="selects"),
    ],
)
def test_a_forward_that_needs_data_is_measured(loss_fn: Callable[[Any, Any], Tensor]) -> None:
    plan = planned(loss_fn=loss_fn, method="estimate")
    assert plan.method == "measure"
    assert all(row.is_measured for row in plan.rows)
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("Measured on cpu, since the forward needs tensors with data: ")
    assert plan.notes[0] in " ".join(str(plan).split())


def test_a_mistake_is_no_reason_to_measure() -> None:
    def loss_fn(model: Any, data: Any) -> Tensor:
        raise LookupError("a mistake")

    for method in METHODS:
        with pytest.raises(LookupError, match="a mistake"):
            planned(loss_fn=loss_fn, method=method)


# --------------------------------------------------------------------------------------------- elsewhere, or not at all
def test_a_model_that_is_nowhere_yet() -> None:
    """On the meta device: larger than this machine, estimated for a GPU that it does not have."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 1 << 20), nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 10))
    plan = planned(model, method="estimate", memory="20TiB")
    assert plan.device.startswith("cuda")
    assert plan.breakdown.parameters == pytest.approx(4 * 2**40, rel=1e-3)
    with pytest.raises(ga.UnsupportedError, match=r"on the meta device.*method='estimate'"):
        planned(model)


def test_for_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("the device is here")
    model = GPT.make()
    here = planned(model, GPT.loss_fn, GPT.batch(ROWS), method="estimate")
    there = planned(model, GPT.loss_fn, GPT.batch(ROWS), method="estimate", device="cuda")
    assert there.device == "cuda"
    assert there.notes == (
        "There is no cuda here: kernels of the CPU were assumed, with CUDA's attention, dropout and optimizer steps.",
    )
    assert there.breakdown.activations_per_sample < here.breakdown.activations_per_sample  # no weights of pairs
    assert there.breakdown.optimizer_step > here.breakdown.optimizer_step  # all parameters at once


def test_out_of_memory_is_an_answer() -> None:
    tried: list[int] = []

    def loss_fn(model: Any, data: Any) -> Tensor:
        tried.append(len(data[0]))
        if len(data[0]) > 4 and not isinstance(data[0], torch._subclasses.FakeTensor):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return classes_loss(model, data)

    plan = planned(loss_fn=loss_fn)
    assert [(row.fits, row.is_measured) for row in plan.rows] == [(True, True)] * 3 + [(False, False)] * 2
    assert plan.micro_batch_size in (1, 2, 4)
    assert plan.largest_micro_batch_size == 7  # 8 did not run, and more is not tried
    assert max(tried) == 8


@pytest.mark.parametrize("can_be_estimated", [True, False])
def test_not_even_one_sample(can_be_estimated: bool) -> None:
    def loss_fn(model: Any, data: Any) -> Tensor:
        if not isinstance(data[0], torch._subclasses.FakeTensor) or not can_be_estimated:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")
        return classes_loss(model, data)

    if not can_be_estimated:
        with pytest.raises(ga.UnsupportedError, match="Micro-batches of 1 ran out of memory on cpu"):
            planned(loss_fn=loss_fn)
        return
    plan = planned(loss_fn=loss_fn)
    assert plan.micro_batch_size is None
    assert not any(row.fits or row.is_measured for row in plan.rows)
    assert plan.peak_bytes(16) == planned(method="estimate").peak_bytes(16)
    assert plan.notes == ("Micro-batches of 1 ran out of memory; peaks above that are estimated.",)


def test_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(max_seconds=1e-9)
    assert [row.is_measured for row in plan.rows] == [True, True, False, False, False]
    assert [row.seconds is None for row in plan.rows] == [False, True, True, True, True]
    assert plan.micro_batch_size == 1
    assert "Within 1e-09 s (max_seconds), from 4 on sizes were not run, and their peaks are predicted." in plan.notes
    assert "~" in str(plan)


def test_a_model_that_cannot_see_a_single_sample() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    for method in METHODS:
        plan = planned(model, method=method)
        assert [row.micro_batch_size for row in plan.rows] == [2, 4, 8, 16]
        assert plan.notes[0].startswith("A single sample cannot be run by itself: Expected more than 1 value")


@pytest.mark.parametrize("method", METHODS)
def test_remarks(method: str) -> None:
    plan = planned(mlp().eval(), optimizer=None, method=method)
    assert plan.notes[0].startswith("No optimizer was passed, so its state is not counted")
    assert plan.notes[1].startswith("The model is in eval mode")
    model = mlp()
    unknown = planned(model, optimizer=torch.optim.LBFGS(model.parameters()), method=method)
    assert unknown.notes == ("The memory of LBFGS is not counted: its step could not be run.",)
    embedding = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(4, 10))
    data = torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
    sparse = planned(embedding, data=data, optimizer=torch.optim.SGD(embedding.parameters()), method=method)
    assert sparse.notes[0].startswith("A gradient is sparse and grows with each micro-batch")


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "guess"}, ga.WindowError, "method='guess' is not known"),
        ({"memory": "24"}, ga.WindowError, "memory='24' is no size.* or the number of bytes, at least 1000"),
        ({"micro_batch_sizes": [0, 4]}, ga.WindowError, r"micro_batch_sizes=\[0, 4\]: .* from 1 to the batch's 16"),
        ({"micro_batch_sizes": [17]}, ga.WindowError, "from 1 to the batch's 16"),
        ({"micro_batch_sizes": []}, ga.WindowError, "from 1 to the batch's 16"),
        ({"micro_batch_sizes": [True]}, ga.WindowError, "from 1 to the batch's 16"),
        ({"max_seconds": 0}, ga.WindowError, "max_seconds=0 leaves no time"),
        ({"device": "cuda"}, ga.WindowError, "method='measure' runs on the model's own device, cpu"),
        ({"loss_fn": None}, ga.WindowError, "loss_fn is NoneType, forward NoneType and batch_loss NoneType"),
        ({"loss_fn": None, "forward": classes_loss}, ga.WindowError, r"both\s+forward=.* and batch_loss="),
        ({"forward": classes_loss, "batch_loss": classes_loss}, ga.WindowError, "say two things"),
        ({"optimizer": 3}, ga.ParameterError, "optimizer must be a torch Optimizer"),
        ({"model": mlp().requires_grad_(False)}, ga.ParameterError, "none of the 4 parameters requires a gradient"),
        ({"model": nn.LazyLinear(3), "optimizer": None}, ga.ParameterError, "have no shape yet"),
        ({"data": rows_of_8(0)}, ga.BatchError, "The batch has 0 rows"),
        ({"data": (torch.zeros(3, 8), torch.zeros(4))}, ga.BatchError, "Rows disagree"),
        ({"loss_fn": lambda model, data: torch.zeros(())}, ga.LossError, "has no graph"),
        ({"loss_fn": lambda model, data: model(data[0])}, ga.LossError, "needs a scalar"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planned(**options)


def test_a_plan_is_frozen() -> None:
    plan = planned(method="estimate")
    assert isinstance(plan, ga.Plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.micro_batch_size = 3  # type: ignore[misc]
    for size in (0, -1, 1.5, True):
        with pytest.raises(ga.WindowError, match=r"peak_bytes\(.*at least one sample"):
            plan.peak_bytes(size)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no row of 3 samples; there are 1, 2, 4, 8, 16"):
        plan.row(3)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, data = GPT.make().cuda(), GPT.batch(64)
    planned(model, GPT.loss_fn, data)  # cuBLAS allocates a workspace the first time, and keeps it
    before, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    measured = planned(model, GPT.loss_fn, data, memory=None)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert torch.cuda.memory_allocated() == allocated
    estimated = planned(model, GPT.loss_fn, data, method="estimate")
    assert (measured.method, estimated.method) == ("measure", "estimate")
    assert measured.memory is not None
    assert measured.device.startswith("cuda:0 (")
    for size in (8, 32, 64):
        # cuBLAS keeps a workspace of its own, which nobody can foresee.
        assert measured.row(size).peak_bytes == pytest.approx(estimated.peak_bytes(size), rel=0.15, abs=64 << 20)
