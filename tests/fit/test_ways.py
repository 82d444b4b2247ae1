"""Every way to fit takes what is said of it, the line that asks for it runs, and what fits not is told which would."""

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from architectures import Gpt
from gradaccum.fit import planner
from gradaccum.fit.estimate import estimate
from gradaccum.fit.measure import measure
from gradaccum.fit.planner import _size_model
from gradaccum.fit.size_model import SizeModel
from gradaccum.fit.ways import Way, WorkCounter, ways_besides
from gradaccum.fit.workload import Workload
from gradaccum.memory.live_bytes import LiveBytes
from gradaccum.types import Activations
from scripts import benchmark

ESTIMATED = 0.15  # what is asked of an estimate; those here are within a thousandth
NETS = ("GPT-2 shape, large vocabulary", "long context", "ResNet", "T5", "mixture of experts")
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")


@pytest.fixture(scope="module")
def nets() -> Iterator[ModuleType]:
    with benchmark("_nets") as module:
        yield module


def next_words(model: Any, batch: Tensor) -> ga.Loss:
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    return ga.Loss.mean(loss, over=batch[:, 1:].numel())


def workload_of(model: nn.Module, loss_fn: Any, batch: Any) -> Workload:
    return Workload.checked(model, loss_fn, batch, forward=None, batch_loss=None)


def looked_at(workload: Workload, way: Way, *, method: str) -> SizeModel:
    found = _size_model(workload, workload.device, [1, 2], memory=None, looks_between=False)
    if method == "estimate":
        estimate(workload, found, target=workload.device, way=way)
    else:
        measure(workload, found, max_seconds=30, way=way)
    return found


@needs_transformers
@pytest.mark.parametrize("name", NETS)
def test_estimates_are_what_is_measured(name: str, nets: ModuleType) -> None:
    net = nets.NETS[name]
    torch.manual_seed(0)
    workload = workload_of(net.make(), net.loss_fn, net.batch(2))
    chunks = [way.chunk for way in ways_besides(workload, workload.device) if way.activations == "device"]
    has_head = name not in ("ResNet", "T5")  # T5 changes its logits, which is found when it runs
    assert 16 in chunks or not has_head
    ways = [Way(), Way("recompute"), *([Way("device", 16), Way("recompute", 16)] if has_head else [])]
    peaks: dict[Way, int] = {}
    for way in ways:
        measured, estimated = (looked_at(workload, way, method=method) for method in ("measure", "estimate"))
        for size in (1, 2):
            assert estimated.peaks[size] == pytest.approx(measured.peaks[size], rel=ESTIMATED), (way, size)
        peaks[way] = measured.peaks[2]
    assert peaks[Way("recompute")] < peaks[Way()]


@pytest.mark.parametrize("method", ["measure", "estimate"])
def test_lines_that_run_and_take_what_they_are_said_to(method: str) -> None:
    torch.manual_seed(0)
    model, batch = Gpt(layers=4, width=16, dropout=0.0), torch.randint(60, (6, 17))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"optimizer": optimizer, "method": method, "max_seconds": 20}
    most = ga.plan(model, next_words, batch, memory="1GiB", **options)
    plan = ga.plan(model, next_words, batch, memory=(most.breakdown.resident + most.peak_bytes(1)) // 2, **options)
    assert plan.micro_batch_size is None
    assert [way.words for way in plan.ways] == ["recomputed blocks"]
    way = plan.ways[0]
    assert way.line in plan.advice
    assert way.line in str(plan)
    assert (way.seconds is not None) == (method == "measure")
    held = [*model.parameters(), batch]
    names = {"ga": ga, "model": model, "optimizer": optimizer, "loss_fn": next_words, "batch": batch}
    with LiveBytes() as live:
        step = eval(way.line, names)
        step(batch)
        live.reset_peak()  # the first update is checked, with more rows
        step(batch)
    taken = live.peak + sum(tensor.nbytes for tensor in held)
    assert way.peak_bytes == pytest.approx(taken, rel=0.03)
    assert plan.memory is not None
    assert taken <= plan.memory


@needs_transformers
def test_a_large_vocabulary_is_run_in_chunks(nets: ModuleType) -> None:
    net = nets.NETS["GPT-2 shape, large vocabulary"]
    torch.manual_seed(0)
    model, batch = net.make(), net.batch(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"optimizer": optimizer, "method": "estimate"}
    breakdown = ga.plan(model, net.loss_fn, batch, memory="1GiB", **options).breakdown
    plan = ga.plan(model, net.loss_fn, batch, memory=breakdown.resident + (12 << 20), **options)
    assert plan.micro_batch_size is None
    way = plan.ways[0]
    assert "chunks of 16" in way.words
    names = {"ga": ga, "model": model, "optimizer": optimizer, "loss_fn": net.loss_fn, "batch": batch}
    with LiveBytes() as live:
        exec(way.line, names)
    assert live.peak + breakdown.parameters <= 1.01 * way.peak_bytes


def test_the_host_takes_activations_off_a_device_that_is_elsewhere() -> None:
    workload = workload_of(Gpt(layers=6, width=64), next_words, torch.randint(60, (64, 17)))
    cuda = torch.device("cuda")
    assert {way.activations for way in ways_besides(workload, cuda)} == {"device", "recompute", "host"} - {"device"}
    peaks: dict[Activations, int] = {}
    kinds: tuple[Activations, ...] = ("device", "host")
    for activations in kinds:
        found = _size_model(workload, workload.device, [64], memory=None, looks_between=False)
        estimate(workload, found, target=workload.device, way=Way(activations))
        assert found.whole is not None
        peaks[activations] = found.whole
    assert peaks["host"] < 0.5 * peaks["device"]


def test_work_is_that_of_products() -> None:
    x, weight = torch.randn(3, 5), torch.randn(5, 7)
    with WorkCounter() as work:
        (x @ weight).exp()
    assert work.count == 2 * 3 * 5 * 7


def test_recomputing_is_one_more_forward_of_the_blocks() -> None:
    model, batch = Gpt(layers=4, width=16, dropout=0.0), torch.randint(60, (6, 17))
    most = ga.plan(model, next_words, batch, memory="1GiB", method="estimate")
    plan = ga.plan(model, next_words, batch, memory=most.peak_bytes(2), method="estimate")
    alone, recomputed = sorted(plan.ways, key=lambda way: way.work or 0.0)
    assert (alone.words, alone.work) == ("micro-batches alone", 1.0)
    assert recomputed.work is not None
    assert 1.1 < recomputed.work < 4 / 3  # the head is not run again
    assert plan.ways == (alone, recomputed)  # both fit, and what costs less comes first
    assert f"estimated {recomputed.work:.2f} of the time, by products" in str(plan)


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_where_all_fits_no_other_way_is_looked_at(budget: str | None) -> None:
    plan = ga.plan(Gpt(), next_words, torch.randint(60, (4, 17)), memory=budget, method="estimate")
    assert plan.ways == ()
    assert "Ways" not in str(plan)


def test_where_nothing_fits_no_way_is_named() -> None:
    plan = ga.plan(Gpt(), next_words, torch.randint(60, (4, 17)), memory=1000, method="estimate")
    assert plan.ways == ()
    assert "Ways" not in str(plan)


def test_a_way_that_cannot_be_run_is_noted() -> None:
    class OnlyOnce(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    runs: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        runs.append(len(x))
        if len(runs) % 2 == 0 and x.requires_grad and "forward" in vars(self):
            raise ValueError("not twice. Never")
        return nn.Sequential.forward(self, x)

    class Block(nn.Sequential):
        pass

    model = OnlyOnce()
    for block in model.blocks:
        block.__class__ = Block
    Block.forward = forward  # type: ignore[method-assign]
    plan = ga.plan(
        model,
        lambda model, x: ga.Loss.mean(model(x).square().mean(), over=len(x)),
        torch.randn(64, 64),
        memory="160KiB",
        method="estimate",
    )
    assert "Not looked at: recomputed blocks. It could not be run: not twice." in plan.notes


def failing(step: ga.TrainStep, batch: Any, monkeypatch: pytest.MonkeyPatch, left: int) -> str:
    """The message where every micro-batch runs out of memory, and so many bytes were left before."""
    monkeypatch.setattr(planner, "available_bytes", lambda device: left)
    with pytest.raises(ga.DoesNotFitError) as caught:
        step(batch)
    return str(caught.value)


def test_what_does_not_fit_is_told_the_first_way_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Gpt(layers=4, dropout=0.0), torch.randint(60, (2, 17))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: Any, batch: Tensor) -> ga.Loss:
        if not any("forward" in vars(module) for module in model.modules()):
            raise torch.OutOfMemoryError("scarce")
        return next_words(model, batch)

    step = ga.TrainStep(model, optimizer, loss_fn, check="off")
    text = failing(step, batch, monkeypatch, left=1 << 30)
    line = 'ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=1, activations="recompute")'
    assert "the first way in which one sample fits is recomputed blocks, with" in text
    assert line in text
    names = {"ga": ga, "model": model, "optimizer": optimizer, "loss_fn": loss_fn}
    assert eval(line, names)(batch).index == 1
    assert "first way" not in failing(step, batch, monkeypatch, left=1000)
