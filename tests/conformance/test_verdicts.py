"""Trainers in scenarios: the library is exact, known mistakes are found out, and every error is reproduced."""

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gradaccum as ga
from gradaccum.conformance import AdapterError, NotOffered, Trainer, error_of, judge, scenario, scenarios
from gradaccum.conformance.adapters import library, loops
from gradaccum.conformance.verdicts import KNOWN, figure, installed, is_installed, known, package_versions

NAMES = [case.name for case in scenarios()]
ROUNDING = 1e-12  # of the way that parameters go, in float64
COUPLED = {"BatchNorm", "contrastive loss", "experts' balance"}


def trainer(function: Any, *imports: str) -> Trainer:
    return Trainer(title="mine", function=function, imports=imports or ("from mine import train",))


@pytest.fixture(autouse=True)
def _states_put_back() -> Iterator[None]:
    yield
    for name in ("accelerate.state",):
        with contextlib.suppress(ModuleNotFoundError):
            state = importlib.import_module(name)
            for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
                kind._reset_state()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [library.accumulator, library.train_step])
def test_the_library_is_exact_and_warns_of_nothing(adapter: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = scenario(name)
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning")  # in processes of their own
    with warnings.catch_warnings():
        if case.stop_after is not None:  # a window is left open there
            warnings.simplefilter("ignore", ga.DiscardedWindowWarning)
        try:
            made = case.train(adapter)
        except NotOffered:
            assert name in COUPLED if adapter is library.accumulator else case.stop_after is not None
            return
    assert error_of(case, made) <= ROUNDING


REASONS = {
    "short last window": "each micro-batch's loss is divided by the number of micro-batches in a full window",
    "stream without a length": "the gradient of an epoch's incomplete last window stays, and is added",
    "reported loss": "it is the sum of the micro-batches' losses, divided by their number in a full window",
    "skipped update": "the schedule advances for an update that was skipped",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_the_textbook_loop_does_is_found_out(name: str) -> None:
    verdict = judge(scenario(name), known("textbook"))
    assert verdict.outcome == "off"
    assert verdict.error is not None
    assert verdict.error > 0.01
    assert REASONS[name] in str(verdict)
    assert scenario(name).why in str(verdict)


def test_the_textbook_loop_is_exact_where_nothing_is_ragged() -> None:
    for name in ("equal micro-batches, full windows", "clipping by norm"):
        verdict = judge(scenario(name), known("textbook"))
        assert (verdict.outcome, verdict.reproduction) == ("exact", ())
        assert re.match(rf"{name}: exact, \de-\d+ from the whole batch", str(verdict))


# Each a loop with one mistake, and the words that it is to be found out by.
def drops(model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int) -> Any:
    for _ in range(epochs):
        for i, batch in enumerate(batches, 1):
            (loss(model, batch) / micro_batches).backward()
            if i % micro_batches == 0:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()
    return model.parameters(), None


def schedules(
    model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int, scheduler: Any
) -> Any:
    last = len(batches)
    for _ in range(epochs):
        for i, batch in enumerate(batches, 1):
            number = micro_batches if i <= last // micro_batches * micro_batches else last % micro_batches
            (loss(model, batch) / number).backward()
            scheduler.step()
            if i % micro_batches == 0 or i == last:
                optimizer.step()
                optimizer.zero_grad()
    return model.parameters(), None


def never(model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int) -> Any:
    return model.parameters(), None


def strange(model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int) -> Any:
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model.parameters(), None


@pytest.mark.parametrize(
    ("adapter", "name", "words"),
    [
        (drops, "short last window", "the incomplete last window is thrown away"),
        (schedules, "schedule per update, short last window", "the schedule advances with each micro-batch"),
        (never, "short last window", "no update was made"),
        (strange, "short last window", "Which mistake it is was not found out"),
    ],
)
def test_known_mistakes(adapter: Any, name: str, words: str) -> None:
    assert words in str(judge(scenario(name), trainer(adapter)))


@pytest.mark.parametrize("name", ["short last window", "reported loss"])
def test_the_reproduction_prints_the_error(name: str) -> None:
    verdict = judge(scenario(name), known("textbook"))
    assert len(verdict.reproduction) == 5
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(verdict.reproduction), {})
    assert float(printed.getvalue()) == pytest.approx(verdict.error, rel=1e-6)
    assert verdict.reproduction[-1].endswith(f"# {verdict.error:.1e}")


# ------------------------------------------------------------------------------------------------- what adapters do
def raises(model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int) -> Any:
    raise RuntimeError("no such device. And more")


def refuses(model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int) -> Any:
    raise NotImplementedError("no streams here")


def test_an_error_is_a_verdict_and_a_refusal_another() -> None:
    verdict = judge(scenario("short last window"), trainer(raises))
    assert (verdict.outcome, verdict.reason, figure(verdict)) == ("error", "RuntimeError: no such device.", "error")
    assert len(verdict.reproduction) == 5
    verdict = judge(scenario("short last window"), trainer(refuses))
    assert (verdict.outcome, verdict.reason, figure(verdict)) == ("not offered", "no streams here", "-")
    verdict = judge(scenario("clipping by norm"), trainer(never))
    assert verdict.reason == "the adapter has no parameter clip_norm"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda model, optimizer, loss, batches, micro_batches: None, "has no parameter epochs, so what it trains"),
        (
            lambda *_, micro_batches, epochs: None,
            "returned NoneType, and has to return a pair",
        ),
        (lambda *_, micro_batches, epochs: (1, 2), "returned tuple, and has to return a pair"),
        (3, "3 is no function"),
    ],
)
def test_what_is_no_adapter(adapter: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        judge(scenario("short last window"), trainer(adapter))


def test_an_adapter_is_given_what_it_asks_for_and_leaves_no_trace() -> None:
    seen: dict[str, Any] = {}

    def train(model: Any, *_: Any, **options: Any) -> Any:
        seen.update(options)
        torch.set_default_dtype(torch.float16)
        torch.manual_seed(3)
        return model.parameters(), [1]

    state = torch.get_rng_state()
    made = scenario("clipping by norm").train(train)
    assert {"micro_batches", "epochs", "clip_norm", "scheduler", "scaler"} == seen.keys()
    assert (seen["micro_batches"], seen["clip_norm"], made.losses) == (4, 0.1, (1.0,))
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_no_such_scenario() -> None:
    with pytest.raises(ga.GradAccumError, match=r"There is no scenario 'x'\. There are: 'equal micro-batches, full"):
        scenario("x")


# ---------------------------------------------------------------------------------------------------- known by name
def test_known_trainers() -> None:
    assert {one.title for one in installed()} >= {"textbook", "Accumulator", "TrainStep"}
    assert not {"Accelerate, exact"} & {one.title for one in installed()}
    assert {"python", "torch", "gradaccum"} <= package_versions().keys()
    assert known("textbook").function is loops.textbook


FRAMEWORKS = [name for name, one in KNOWN.items() if one.package is not None]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"{KNOWN[name].package} is not installed")
    case = scenario("mean over tokens, ignored labels")
    verdict = judge(case, known(name))
    assert verdict.outcome == ("exact" if name.startswith("exact_") else "off"), verdict
    assert verdict.outcome == "exact" or "divided by the number of micro-batches in a full window" in str(verdict)
