"""None off and silent, none exact and blamed: a table of losses, layers and states, against plain torch."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from exact_or_told_cases import KINDS, ROWS, SIZE, Row
from exact_or_told_cases import TABLE as COMMON
from losses.torch_cases import CASES
from oracle import EXACT
from written_losses import WRITTEN

TABLE = COMMON | WRITTEN
DOCS = Path(__file__).parents[2] / "docs" / "exact.md"
OFF = 1e-9  # what is off is off by far more than rounding
PIECES = (8, 7, 7)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


class Scene:
    """A row, made anew from the same seed."""

    def __init__(self, row: Row) -> None:
        torch.manual_seed(3)
        self.row = row
        self.batch = row.batch()
        self.model = row.model()
        self.loss = row.loss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def gradient(self) -> Tensor:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters() if p.requires_grad]
        self.optimizer.zero_grad()
        return torch.cat([one.flatten() for one in found])

    def step(self, size: int = SIZE, **options: Any) -> ga.TrainStep:
        given = self.row.options()
        loss = () if "batch_loss" in given else (self.loss,)
        return ga.TrainStep(self.model, self.optimizer, *loss, micro_batch_size=size, **given, **options)

    def cut(self, start: int, stop: int) -> Any:
        return {name: value[start:stop] for name, value in self.batch.items()}

    def pieces(self) -> list[Any]:
        ends = [sum(PIECES[: i + 1]) for i in range(len(PIECES))]
        return [self.cut(end - size, end) for end, size in zip(ends, PIECES, strict=True)]


def value_of(loss: Any) -> Tensor:
    if isinstance(loss, dict):
        return torch.stack([value_of(one) for one in loss.values()]).sum()
    return loss.value if isinstance(loss, ga.Loss) else loss


def whole_gradient(row: Row) -> Tensor:
    """The oracle: the whole batch at once, by plain torch."""
    scene = Scene(row)
    value_of(scene.loss(scene.model, scene.batch)).backward()
    return scene.gradient()


def off(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


@contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """Notes errors and warnings of the library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ga.GradAccumError:
            said.append("error")
    said += ["warning" for one in caught if issubclass(one.category, ga.GradAccumWarning)]


def by_step(row: Row, **options: Any) -> tuple[str, Tensor | None, ga.TrainStep]:
    scene = Scene(row)
    step = scene.step(**options)
    said: list[str] = []
    with heard(said):
        step.backward(scene.batch)
    return (said or ["nothing"])[0], None if "error" in said else scene.gradient(), step


def by_loop(row: Row) -> tuple[str, Tensor | None]:
    scene = Scene(row)
    accumulator = ga.Accumulator(scene.model, scene.optimizer, micro_batches=len(PIECES), **scene.row.options())
    seen: list[Tensor] = []
    scene.optimizer.register_step_pre_hook(lambda *_: seen.append(scene.gradient()))
    said: list[str] = []
    with heard(said):
        for piece in accumulator.over(scene.pieces()):
            accumulator.backward(scene.loss(scene.model, piece))
    return (said or ["nothing"])[0], seen[0] if seen and "error" not in said else None


def evidence_of(step: ga.TrainStep) -> str:
    return step._accumulation.plan_line.evidence


def assert_told(row: Row, expected: str, **options: Any) -> None:
    """The step's outcome is the expected one, and a true one."""
    said, made, step = by_step(row, **options)
    if expected in ("error", "warning"):
        assert said == expected, evidence_of(step)
        if not row.is_random:  # it was off indeed
            unchecked = by_step(row, check="off", **options)
            assert unchecked[1] is None or off(unchecked[1], whole_gradient(row)) > OFF
    elif expected == "not checked":
        assert (said, evidence_of(step).split(":")[0]) == ("nothing", "not checked")
    else:
        assert said == "nothing", evidence_of(step)
        assert evidence_of(step).startswith("exact (checked on ")
        assert made is not None
        if not row.is_random:
            assert off(made, whole_gradient(row)) <= EXACT


@pytest.mark.parametrize("name", TABLE)
def test_the_step_is_exact_or_says_so_before_the_first_update(name: str) -> None:
    row = TABLE[name]
    expected = KINDS[row.kind].step
    assert_told(row, "exact" if expected == "silent" else expected)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.kind != "another loss"])
def test_one_micro_batch_is_the_whole_batch_and_nobody_is_blamed(name: str) -> None:
    row = TABLE[name]
    scene = Scene(row)
    step = scene.step(ROWS)
    said: list[str] = []
    with heard(said):
        step.backward(scene.batch)
    declared_wrong = row.kind == "count" or row.loop == "error" or KINDS[row.kind].loop == "error"
    assert said == [] or (declared_wrong and said == ["error"])
    if not said and not row.is_random:
        assert off(scene.gradient(), whole_gradient(row)) <= EXACT


@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if row.is_random and KINDS[row.kind].step == "exact"]
)
def test_what_is_drawn_for_each_sample_is_the_same_in_pieces(name: str) -> None:
    scene = Scene(TABLE[name])
    report = scene.step().audit(scene.batch)
    assert report.relative_error <= EXACT


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if KINDS[row.kind].loop != "-"])
def test_the_own_loop_is_exact_or_says_so_or_is_named_in_the_docs(name: str) -> None:
    row = TABLE[name]
    expected = row.loop or KINDS[row.kind].loop
    said, made = by_loop(row)
    is_exact = made is not None and (row.is_random or off(made, whole_gradient(row)) <= EXACT)
    if expected in ("error", "warning"):
        assert said == expected
        assert not is_exact or row.is_random
    else:
        assert said == ("warning" if expected == "asks" else "nothing")
        assert is_exact == (expected != "silent") or row.is_random or row.kind == "later"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.is_compiled])
def test_a_compiled_loss_ends_as_the_plain_one(name: str) -> None:
    row = TABLE[name]
    compiled = torch.compile(row.loss(), backend="aot_eager", dynamic=True)
    assert_told(Row(**{**vars_of(row), "loss": lambda: compiled}), KINDS[row.kind].step)


class Scaled(nn.Module):
    """A model that leaves inputs of criteria what they are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


CRITERIA = (
    *("L1", "MSE", "SmoothL1", "Huber", "PoissonNLL", "GaussianNLL", "BCE", "BCEWithLogits", "KLDiv batchmean"),
    *("HingeEmbedding", "MarginRanking", "CosineEmbedding", "SoftMargin", "MultiMargin", "MultiLabelMargin"),
    *("MultiLabelSoftMargin", "TripletMargin", "TripletMarginWithDistance", "CTC", "AdaptiveLogSoftmaxWithLoss"),
    *("NLL", "CrossEntropy"),
)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_compiled_criterion_of_torch_is_not_blamed_where_it_is_a_mean_over_samples(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(3)
    criterion, inputs = case.module(), case.inputs(ROWS)
    is_time_first = case.rows_at[0] == 1
    batch = {str(i): one.detach() for i, one in enumerate(inputs)}
    if is_time_first:
        batch["0"] = batch["0"].transpose(0, 1)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        first, *rest = batch.values()
        made = criterion(model(first).transpose(0, 1) if is_time_first else model(first), *rest)
        return getattr(made, "loss", made)

    compiled = torch.compile(loss_fn, backend="aot_eager", dynamic=True)
    last = batch["0"].shape[-1] if batch["0"].dim() > 1 else 1  # one number a sample is none of several features
    row = Row(kind="criterion", model=lambda: Scaled(last), loss=lambda: compiled, batch=lambda: dict(batch))
    # With ignored labels or class weights it is no mean over samples.
    assert_told(row, "error" if name in ("NLL", "CrossEntropy") else "exact")


def vars_of(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__dataclass_fields__}


def documented() -> str:
    """The lines of docs/exact.md that follow from the table."""
    words = {"-": "", "asks": "a warning that asks", "warning": "a warning", "error": "an error", "silent": "silent"}
    lines = []
    for key, kind in KINDS.items():
        names = [name for name, row in TABLE.items() if row.kind == key]
        shown = "; ".join(names[:3]) + (f"; {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(
            f"| {kind.what} | {shown} | {words.get(kind.step, kind.step)} | {words.get(kind.loop, kind.loop)} |"
        )
    return "\n".join(lines)


def test_there_are_more_than_a_hundred_and_the_docs_name_each_kind() -> None:
    assert len(TABLE) == len(COMMON) + len(WRITTEN) > 100
    assert {row.kind for row in TABLE.values()} == set(KINDS)
    text = DOCS.read_text(encoding="utf-8")
    missing = [line for line in documented().splitlines() if line not in text]
    assert not missing, "\n".join(missing)
