"""Losses over the whole batch: in micro-batches they give its gradient, whatever is kept and whatever runs again."""

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradaccum as ga
from coupled import COUPLED, ROWS, Batch, Coupled, Encoder, Temperature, contrastive, model_for
from oracle import assert_same_gradients, gradients_of
from scarce import Memory, Scarce

EXACT = 1e-10  # of the largest component; float64 and a few hundred additions leave 1e-14
CASES = pytest.mark.parametrize("case", COUPLED.values(), ids=COUPLED.keys())


def whole(model: nn.Module, case: Coupled) -> tuple[dict[str, Tensor | None], Tensor]:
    model = copy.deepcopy(model)
    loss = case.batch_loss(case.forward(model, case.batch), case.batch)
    loss.backward()
    return gradients_of(model), loss.detach()


def train_step(model: nn.Module, case: Coupled, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        forward=case.forward,
        batch_loss=case.batch_loss,
        combine=case.combine,
        **options,
    )


def assert_like_whole(case: Coupled, model: nn.Module, library_case: Coupled | None = None, **options: Any) -> ga.Loss:
    """The gradient and the loss are those of the whole batch; the library may be told the case in another way."""
    expected, expected_loss = whole(model, case)
    loss = train_step(model, library_case or case, **options).backward(case.batch)
    assert_same_gradients(gradients_of(model), expected, tolerance=EXACT)
    torch.testing.assert_close(loss.value, expected_loss, rtol=EXACT, atol=EXACT)
    return loss


@CASES
@pytest.mark.parametrize("kept", [None, 0, 1, 3], ids=lambda kept: f"kept {kept}")
@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, ROWS, "auto"], ids=str)
def test_equals_the_whole_batch(case: Coupled, size: Any, kept: int | None) -> None:
    assert_like_whole(case, model_for(case), micro_batch_size=size, kept_graphs=kept)


@CASES
def test_a_mean_of_micro_losses_is_something_else(case: Coupled) -> None:
    """The guard of the test above: these losses do couple samples."""
    model = model_for(case)
    expected, _ = whole(model, case)

    def loss_fn(model: nn.Module, batch: Batch) -> ga.Loss:
        rows = len(batch["x"])  # as a sum, whose count is taken as it is said
        return ga.Loss.sum(case.batch_loss(case.forward(model, batch), batch) * rows, over=rows)

    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=7, check="off")
    step.backward(case.batch)
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(gradients_of(model), expected, tolerance=1e-3)


@given(rows=st.integers(2, 17), size=st.integers(1, 17), kept=st.integers(0, 17), seed=st.integers(0, 99))
def test_any_cut(rows: int, size: int, kept: int, seed: int) -> None:
    torch.manual_seed(seed)
    batch = {"x": torch.randn(rows, 3, dtype=torch.float64), "second": torch.randn(rows, 3, dtype=torch.float64)}
    case = dataclasses.replace(COUPLED["contrastive"], batch=batch)
    assert_like_whole(case, model_for(case), micro_batch_size=size, kept_graphs=kept)


def test_updates_follow_the_whole_batchs() -> None:
    case = COUPLED["contrastive"]
    model, twin = model_for(case), model_for(case)
    step = train_step(model, case, micro_batch_size=4, clip_norm=0.01)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index in range(1, 6):
        update = step(case.batch)
        optimizer.zero_grad()
        loss = case.batch_loss(case.forward(twin, case.batch), case.batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        optimizer.step()
        torch.testing.assert_close(update.loss, loss.detach(), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(update.grad_norm, norm, rtol=EXACT, atol=EXACT)
        assert (update.index, update.samples, update.micro_batches, update.micro_batch_size) == (index, ROWS, 4, 4)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)


# ---------------------------------------------------------------------------------------------- what runs a second time
class Counting(nn.Module):
    """Counts forwards with a graph and without."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.with_graph = self.without = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.with_graph += 1
        else:
            self.without += 1
        return self.inner(x)


@pytest.mark.parametrize(("kept", "with_graph", "without"), [(None, 4, 0), (4, 4, 0), (3, 4, 1), (1, 4, 3), (0, 4, 4)])
def test_what_fits_runs_once(kept: int | None, with_graph: int, without: int) -> None:
    case = COUPLED["triplet"]
    model = Counting(model_for(case))
    train_step(model, case, micro_batch_size=4, kept_graphs=kept).backward(case.batch)
    assert (model.with_graph, model.without) == (with_graph, without)


@pytest.mark.parametrize("room", [0, 1, 2, 3], ids=lambda room: f"room for {room}")
def test_as_many_graphs_as_fit(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """What is left of the device decides: here so much that so many graphs fit beside the one that runs again."""
    case = COUPLED["triplet"]
    model = Counting(model_for(case))
    step = train_step(model, case, micro_batch_size=4)
    counted = step._run._runner.kept  # type: ignore[attr-defined]
    step.backward(case.batch)  # counts a graph
    gradients = sum(parameter.numel() * 8 for parameter in model.parameters())
    graph = 4 * counted._row_bytes
    monkeypatch.setattr(
        "gradaccum.whole_batch.kept_graphs.available_bytes", lambda device: gradients + 2 * (room + 1) * graph
    )
    model.zero_grad()
    model.with_graph = model.without = 0
    step.backward(case.batch)
    assert (model.with_graph, model.without) == (4, 4 - room if room < 3 else 0)


def parts_of(batch: Batch) -> list[Batch]:
    """As a size of 4 cuts it."""
    return [{name: value[rows] for name, value in batch.items()} for rows in torch.arange(ROWS).split([4, 3, 3, 3])]


def looped(model: nn.Module, case: Coupled) -> nn.Module:
    """A copy of the model after a loop over the micro-batches that keeps all graphs, and one backward."""
    model = copy.deepcopy(model)
    outputs = [case.forward(model, part) for part in parts_of(case.batch)]
    if isinstance(outputs[0], tuple):
        joined: Any = tuple(torch.cat(views) for views in zip(*outputs, strict=True))
    else:
        joined = torch.cat(outputs)
    case.batch_loss(joined, case.batch).backward()
    return model


@pytest.mark.parametrize("kept", [0, 1, 2, 4, None])
def test_dropout_is_replayed(kept: int | None) -> None:
    """The masks are those of the loop, and so is the state afterwards."""
    case = COUPLED["contrastive"]
    model = model_for(case, dropout=0.5)
    torch.manual_seed(3)
    twin = looped(model, case)
    afterwards = torch.get_rng_state()
    torch.manual_seed(3)
    train_step(model, case, micro_batch_size=4, kept_graphs=kept).backward(case.batch)
    assert_same_gradients(gradients_of(model), gradients_of(twin), tolerance=EXACT)
    assert torch.equal(torch.get_rng_state(), afterwards)


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(()).item()])
def test_every_generator_is_replayed(draw: Callable[[], float]) -> None:
    drawn: list[float] = []

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        drawn.append(draw())
        return model(batch["x"]) * drawn[-1]

    case = dataclasses.replace(COUPLED["triplet"], forward=forward)
    model = model_for(case)
    train_step(model, case, micro_batch_size=5, kept_graphs=0)(case.batch)
    assert drawn[:3] == drawn[:2:-1]
    assert len(set(drawn)) == 3


class Remembering(nn.Module):
    """BatchNorm, a large buffer that moves, and one that is replaced."""

    table: Tensor
    queue: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(5).double()
        self.register_buffer("table", torch.zeros(1 << 17))
        self.register_buffer("queue", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.table.add_(1)
            self.queue = torch.cat([self.queue[1:], x.detach().mean().reshape(1)])
        return self.norm(self.inner(x)) * (1 + self.queue.sum()) * (1 + self.table[0].double())


@pytest.mark.filterwarnings("ignore::gradaccum.BatchNormWarning")
@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_buffers_advance_once(kept: int) -> None:
    case = COUPLED["triplet"]
    model = Remembering(model_for(case))
    twin = looped(model, case)
    train_step(model, case, micro_batch_size=4, kept_graphs=kept, check="off").backward(case.batch)
    assert_same_gradients(gradients_of(model), gradients_of(twin), tolerance=EXACT)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("is_outside", [True, False])
def test_autocast(kept: int, is_outside: bool) -> None:
    """Casts of weights that were cached without a graph are not taken for those with one."""
    case = COUPLED["contrastive"]
    model = model_for(case).float()
    batch = {name: value.float() for name, value in case.batch.items()}
    forward = case.forward if is_outside else torch.autocast("cpu", dtype=torch.bfloat16)(case.forward)
    case = dataclasses.replace(
        case,
        forward=forward,
        batch_loss=lambda outputs, batch: contrastive(tuple(output.float() for output in outputs), batch),
    )
    found = []
    for size in (4, ROWS):
        model.zero_grad()
        step = train_step(model, case, micro_batch_size=size, kept_graphs=kept)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_outside):
            step.backward(batch)
        found.append(gradients_of(model))
    # Eight bits of mantissa, and sums over pieces rounded apart.
    assert_same_gradients(*found, tolerance=0.03)


def test_a_scaled_loss() -> None:
    case = COUPLED["contrastive"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_like_whole(case, model_for(case), micro_batch_size=4, kept_graphs=1, scaler=scaler)


# ---------------------------------------------------------------------------------------------------- what is not alike
class Forgetful(nn.Module):
    """Depends on a counter that nobody can put back."""

    def __init__(self, inner: nn.Module, *, by: float = 1e-3, dtypes: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.by = by
        self.dtypes = dtypes
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.dtypes:
            return self.inner(x).to(torch.float32 if self.calls > 3 else torch.float64)
        return self.inner(x) * (1 + self.by * self.calls)


def test_a_forward_that_is_not_repeatable_is_an_error_and_no_update() -> None:
    case = COUPLED["contrastive"]
    model = Forgetful(model_for(case))
    before = copy.deepcopy(model.state_dict())
    step = train_step(model, case, micro_batch_size=5, kept_graphs=0)
    with pytest.raises(ga.ReplayError, match=r"differ from the first by 0\.0\d+ of their size(.|\n)*counter"):
        step(case.batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_dtype_is_an_error_and_rounding_is_not() -> None:
    case = COUPLED["triplet"]
    step = train_step(Forgetful(model_for(case), dtypes=True), case, micro_batch_size=5, kept_graphs=0)
    with pytest.raises(ga.ReplayError, match=r"returned \(3, 5\) float32, the first \(\d, 5\) float64|autocast"):
        step(case.batch)
    train_step(Forgetful(model_for(case), by=1e-15), case, micro_batch_size=5, kept_graphs=0)(case.batch)


def test_what_is_not_finite_is_skipped_not_a_difference() -> None:
    case = COUPLED["triplet"]
    model = model_for(case)
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    assert train_step(model, case, micro_batch_size=5, kept_graphs=0, clip_norm=1.0)(case.batch).skipped


# --------------------------------------------------------------------------------------------------- outputs and losses
@pytest.mark.parametrize("kept", [0, 2, None])
@pytest.mark.parametrize("is_passed", [True, False], ids=["passed as a model", "found"])
def test_the_loss_may_own_parameters(kept: int | None, is_passed: bool) -> None:
    """Each gets its gradient once, however many micro-batches there are."""
    case = COUPLED["contrastive"]
    model, loss = model_for(case), Temperature()
    twin, twin_loss = copy.deepcopy((model, loss))
    twin_loss(case.forward(twin, case.batch), case.batch).backward()
    models = [model, loss] if is_passed else model
    step = ga.TrainStep(
        models,
        torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1),
        forward=lambda _, batch: case.forward(model, batch),
        batch_loss=loss if not is_passed else lambda outputs, batch: loss(outputs, batch),
        micro_batch_size=3,
        kept_graphs=kept,
    )
    step.backward(case.batch)
    assert_same_gradients(gradients_of(model), gradients_of(twin), tolerance=EXACT)
    assert_same_gradients(gradients_of(loss), gradients_of(twin_loss), tolerance=EXACT)


@dataclasses.dataclass
class Named:
    vectors: Tensor
    others: dict[str, Any]


@pytest.mark.parametrize("kept", [0, 2, None])
def test_nested_outputs_and_outputs_that_the_loss_ignores(kept: int | None) -> None:
    case = COUPLED["contrastive"]

    def forward(model: nn.Module, batch: Batch) -> Named:
        one, other = case.forward(model, batch)
        return Named(one, {"pair": [other, one.argmax(dim=1)], "ignored": one.exp(), "frozen": batch["x"], "n": None})

    def batch_loss(outputs: Named, batch: Batch) -> Tensor:
        assert outputs.others["pair"][1].shape == (ROWS,)
        assert outputs.others["n"] is None
        assert torch.equal(outputs.others["frozen"], batch["x"])
        return contrastive((outputs.vectors, outputs.others["pair"][0]), batch)

    nested = dataclasses.replace(case, forward=forward, batch_loss=batch_loss)
    assert_like_whole(case, model_for(case), nested, micro_batch_size=4, kept_graphs=kept)


def test_several_terms_each_over_its_own_whole() -> None:
    case = COUPLED["contrastive"]

    def batch_loss(outputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, ga.Loss]:
        return {
            "pairs": ga.Loss.mean(contrastive(outputs, batch), over=ROWS),
            "size": ga.Loss.sum(outputs[0].square().sum(), over=outputs[0].numel()),
        }

    def sum_of_terms(outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return contrastive(outputs, batch) + outputs[0].square().mean()

    model, terms = model_for(case), dataclasses.replace(case, batch_loss=batch_loss)
    loss = assert_like_whole(dataclasses.replace(case, batch_loss=sum_of_terms), model, terms, micro_batch_size=4)
    model.zero_grad()
    parts = train_step(model, terms, micro_batch_size=4)(case.batch).losses
    assert set(parts) == {"pairs", "size"}
    torch.testing.assert_close(loss.value, parts["pairs"] + parts["size"], rtol=EXACT, atol=EXACT)


def test_samples_packed_by_cost_come_back_in_the_batchs_order() -> None:
    """Labels would be paired with other samples' outputs otherwise."""
    case = COUPLED["Cox"]
    split = ga.split_by_cost(lambda batch: (batch["time"] * 10).long() + 1, 20)
    assert_like_whole(case, model_for(case), micro_batch_size=5, split=split, kept_graphs=1)


def test_statistics_in_half_precision_are_added_up_in_fp32() -> None:
    """1 / 256 of bf16's range: the 257th would be lost."""
    step = _step(
        forward=lambda model, x: (model(x)[:, 0] * 0 + 1).sum().bfloat16(),
        batch_loss=lambda total, x: total,
        combine="sum",
        micro_batch_size=1,
    )
    assert step.backward(torch.ones(300, 3)).value == 300


def test_statistics_take_no_memory_of_outputs() -> None:
    case = COUPLED["Dice"]

    def batch_loss(sums: Tensor, batch: Batch) -> Tensor:
        assert sums.shape == (2,)
        return case.batch_loss(sums, batch)

    train_step(model_for(case), dataclasses.replace(case, batch_loss=batch_loss), micro_batch_size=3)(case.batch)


def test_in_a_gan_only_the_own_models_get_gradients() -> None:
    case = COUPLED["triplet"]
    generator, critic = Encoder(100, 6).double(), Encoder(6, 5).double()
    case = dataclasses.replace(case, forward=lambda generator, batch: critic(generator(batch["x"])))
    train_step(generator, case, micro_batch_size=4, kept_graphs=2).backward(case.batch)
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert_same_gradients(gradients_of(generator), whole(generator, case)[0], tolerance=EXACT)


# ------------------------------------------------------------------------------------------------------- out of memory
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("countdown", range(8))
@pytest.mark.parametrize("size", [4, "auto"])
def test_running_out_of_memory_changes_nothing(where: str, countdown: int, size: Any) -> None:
    """Whichever piece fails: fewer graphs are kept, or pieces are smaller, and the gradient is the same."""
    case = COUPLED["contrastive"]
    memory = Memory()
    inner = model_for(case, dropout=0.5)
    model = nn.Sequential(inner, Scarce(memory, where=where))
    torch.manual_seed(5)
    step = train_step(model, case, micro_batch_size=size)
    if size == "auto":  # what is drawn depends on the cut, so compare without
        inner.dropout.p = 0.0
    undisturbed = copy.deepcopy(model)
    torch.manual_seed(5)
    train_step(undisturbed, case, micro_batch_size=4).backward(case.batch)
    afterwards = torch.get_rng_state()
    torch.manual_seed(5)
    memory.countdown = countdown
    step.backward(case.batch)
    assert memory.failures == (memory.countdown is None)
    assert_same_gradients(gradients_of(model), gradients_of(undisturbed), tolerance=EXACT)
    if size != "auto":
        assert torch.equal(torch.get_rng_state(), afterwards)


def test_fewer_graphs_are_kept_after_running_out_of_memory_and_more_again() -> None:
    case = COUPLED["contrastive"]
    memory = Memory()
    counting = Counting(model_for(case))
    model = nn.Sequential(counting, Scarce(memory))
    step = train_step(model, case, micro_batch_size=4)
    step(case.batch)
    assert counting.without == 0
    memory.countdown = 7  # the fourth micro-batch's second view
    step(case.batch)
    assert (memory.failures, counting.without) == (1, 4), "two graphs of four were kept"


def test_a_piece_that_does_not_fit_by_itself_is_an_error_at_a_fixed_size() -> None:
    case = COUPLED["contrastive"]
    model = nn.Sequential(model_for(case), Scarce(Memory(limit=3)))
    with pytest.raises(torch.OutOfMemoryError):
        train_step(model, case, micro_batch_size=4)(case.batch)
    assert train_step(model, case, micro_batch_size="auto")(case.batch).micro_batch_size <= 3


# ----------------------------------------------------------------------------------------------------------- bad input
def _step(**options: Any) -> ga.TrainStep:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ga.TrainStep(model, optimizer, **{"micro_batch_size": 2, **options})


FORWARD: dict[str, Any] = {"forward": lambda model, x: model(x), "batch_loss": lambda y, x: y.square().mean()}


TWICE: dict[str, Any] = {"forward": lambda model, x: torch.cat([model(x), model(x)])}
MEAN: dict[str, Any] = {"forward": lambda model, x: model(x).mean()}
NUMBER: dict[str, Any] = {"forward": lambda model, x: 3.0}
WIDTH: dict[str, Any] = {"forward": lambda model, x: model(x)[:, : len(x) - 1]}
SEVERAL: dict[str, Any] = {"forward": lambda model, x: (model(x),) * len(x)}

MISUSE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two views, in pieces": (TWICE, ga.BatchError, r"shape \(4, 2\) .* micro-batch of 2"),
    "two views, whole": ({**TWICE, "micro_batch_size": 5}, ga.BatchError, r"shape \(10, 2\) .* micro-batch of 5"),
    "a mean, in pieces": (MEAN, ga.BatchError, r"shape \(\) \(output 0\)"),
    "a mean, whole": ({**MEAN, "micro_batch_size": 5}, ga.BatchError, r"shape \(\) \(output 0\)"),
    "a number, in pieces": (NUMBER, ga.BatchError, "returned no tensor"),
    "a number, whole": ({**NUMBER, "micro_batch_size": 5}, ga.BatchError, "returned no tensor"),
    "width": ({**WIDTH, "micro_batch_size": 3}, ga.BatchError, "Output 0 has rows of shape"),
    "number of outputs": (
        {**SEVERAL, "batch_loss": lambda y, x: y[0].sum(), "micro_batch_size": 3},
        ga.BatchError,
        "2 tensors for one micro-batch and 3 for another|3 tensors",
    ),
    "rows instead of sums": (
        {"combine": "sum", "micro_batch_size": 3},
        ga.BatchError,
        r"Statistic 0 has shape \(2, 2\) in one",
    ),
    "a loss of rows": ({"batch_loss": lambda y, x: y}, ga.LossError, r"shape \(5, 2\)"),
    "a loss that is a float": ({"batch_loss": lambda y, x: y.mean().item()}, ga.LossError, "is a float"),
    "a loss without a graph": ({"batch_loss": lambda y, x: y.mean().detach()}, ga.LossError, "has no graph"),
    "outputs without a graph": (
        {"forward": lambda model, x: model(x).detach()},
        ga.LossError,
        "0 of 2 trainable parameters got a gradient",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), MISUSE.values(), ids=MISUSE.keys())
def test_misuse(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _step(**{**FORWARD, **options})(torch.randn(5, 3))
