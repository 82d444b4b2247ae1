"""Draws by sample: the run is the same however its batches are cut, run again, spread over processes, or resumed."""

import copy
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from ranks import results_of
from stochastic import ROWS, STOCHASTIC, WIDTH, Network, make_batches, make_model, regression
from wrapping import wrapped

EXACT = 1e-12  # of parameters of size 1, after five updates in float64: some thousand roundings of 1e-16
CUTS: list[Any] = [1, 2, 3, "auto", "reordered"]


class Reordered:
    """A split of one's own that packs rows of the batch in another order."""

    def rows(self, batch: Any) -> int:
        return len(batch[0])

    def largest(self, batch: Any) -> int:
        return len(batch[0])

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Tensor]:
        order = torch.arange(len(batch[0])) * 3 % len(batch[0])
        return [order[:2], order[2:6], order[6:]]

    def cut(self, batch: Any, rows: Any) -> Any:
        return tuple(one[rows] for one in batch)


def make_step(name: str, cut: Any = ROWS, **options: Any) -> tuple[nn.Module, ga.TrainStep]:
    """A model of `STOCHASTIC` and its step."""
    case = STOCHASTIC[name]
    model = make_model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if cut == "reordered":
        options["split"], cut = Reordered(), 4
    options.setdefault("randomness", "sample")
    return model, ga.TrainStep(model, optimizer, case.loss_fn, micro_batch_size=cut, **options)


def train(step: ga.TrainStep, updates: int = 5) -> None:
    """Trains on the batches that all runs here have."""
    for batch in make_batches(updates):
        step(batch)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(name: str, cut: Any = ROWS, **options: Any) -> Tensor:
    """Parameters after five updates."""
    torch.set_default_dtype(torch.float64)
    model, step = make_step(name, cut, **options)
    for batch in make_batches(5):
        step(batch)
    return flat(model)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_cut_makes_the_same_run(name: str) -> None:
    whole = trained(name)
    for cut in CUTS:
        assert (trained(name, cut) - whole).abs().max() < EXACT, cut
    torch_run = trained(name, randomness="torch")
    assert (torch_run - whole).abs().max() > 1e-4  # something is drawn


def test_torch_is_the_default_and_draws_what_it_always_did() -> None:
    torch.set_default_dtype(torch.float64)
    case = STOCHASTIC["transformer"]
    model = make_model(case)
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), case.loss_fn, micro_batch_size=ROWS)
    twin = make_model(case)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batch = make_batches(1)[0]
    torch.manual_seed(3)
    step(batch)
    torch.manual_seed(3)
    case.loss_fn(twin, batch).backward()
    optimizer.step()
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize(
    "options", [{"lockstep": True}, {"batch_norm": "exact"}, {"lockstep": True, "activations": "recompute"}]
)
def test_in_lockstep(options: dict[str, Any]) -> None:
    for name in ("transformer", "checkpoint")[: 1 if "activations" in options else 2]:  # the other has no blocks
        assert (trained(name, 3, **options) - trained(name)).abs().max() < EXACT


@pytest.mark.parametrize("options", [{}, {"kept_graphs": 0}, {"kept_graphs": 1}, {"lockstep": True}])
def test_losses_over_the_batch(options: dict[str, Any]) -> None:
    """The loss draws too: noise on all outputs, and a mask that belongs to no sample."""

    def batch_loss(outputs: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(F.dropout(outputs + 0.1 * torch.randn_like(outputs), 0.2), batch[1])

    def run(cut: int) -> Tensor:
        torch.set_default_dtype(torch.float64)
        for name in ("lstm", "checkpoint"):
            model = make_model(STOCHASTIC[name])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            step = ga.TrainStep(
                model, optimizer, forward=lambda model, batch: model(batch[0]), batch_loss=batch_loss,
                micro_batch_size=cut, randomness="sample", **options,
            )  # fmt: skip
            for batch in make_batches(5):
                step(batch)
        return flat(model)

    whole = run(ROWS)
    for cut in (1, 2, 3):
        assert (run(cut) - whole).abs().max() < EXACT


def test_resumed_with_another_size() -> None:
    torch.set_default_dtype(torch.float64)
    batches = make_batches(5)
    model, step = make_step("transformer", 3)
    for batch in batches[:2]:
        step(batch)
    state = step.state_dict()
    torch.manual_seed(99)  # the seed of the run goes on, whatever the new process starts from
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    resumed = ga.TrainStep(other, optimizer, regression, micro_batch_size=2, randomness="sample")
    resumed.load_state_dict(state)
    torch.manual_seed(98)
    for batch in batches[2:]:
        resumed(batch)
    assert (flat(other) - trained("transformer")).abs().max() < EXACT


def test_out_of_memory_runs_the_batch_again_with_the_same_draws() -> None:
    torch.set_default_dtype(torch.float64)
    expected = trained("transformer")
    case = STOCHASTIC["transformer"]
    model = make_model(case)
    failures: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        loss = case.loss_fn(model, batch)
        if len(batch[0]) > 4:
            failures.append(len(batch[0]))
            raise torch.OutOfMemoryError("more than four rows")
        return loss

    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, randomness="sample")
    for batch in make_batches(5):
        step(batch)
    assert failures
    assert (flat(model) - expected).abs().max() < EXACT


def test_torchs_generators_stay_where_they_are() -> None:
    torch.set_default_dtype(torch.float64)
    _, step = make_step("every distribution", 3)
    before = torch.get_rng_state()
    for batch in make_batches(2):
        step(batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_updates_and_seeds_draw_other_numbers() -> None:
    torch.set_default_dtype(torch.float64)
    drawn: list[Tensor] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        drawn.append(torch.rand(len(batch[0])))
        return regression(model, batch)

    for seed in (0, 1):
        model = Network()
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=ROWS, randomness="sample")
        batch = make_batches(1)[0]
        step(batch)
        step(batch)
        first, second = drawn[-2:]
        assert not (first[:, None] == second).any()
        step.backward(batch), step.backward(batch)  # of one update: the same masks for both steps of SAM
        assert torch.equal(drawn[-1], drawn[-2])
        optimizer.step()
        step.backward(batch)
        assert not torch.equal(drawn[-1], drawn[-2])
        optimizer.zero_grad()
    assert not torch.equal(drawn[-1], drawn[len(drawn) // 2 - 1])


def test_padding_that_is_trimmed_changes_no_draw() -> None:
    """Samples of like length are packed together and their padding is trimmed: a sample's mask is a part of its own."""
    torch.set_default_dtype(torch.float64)
    lengths = torch.tensor([3, 9, 4, 8, 2, 7, 5])
    x = torch.randn(ROWS, 9, WIDTH) * (torch.arange(9) < lengths[:, None])[..., None]

    def loss_fn(model: nn.Module, batch: Any) -> ga.Loss:
        real = (torch.arange(batch["x"].shape[1]) < batch["lengths"][:, None])[..., None]
        outputs = F.dropout(model(batch["x"]), 0.4) * real
        return ga.Loss.sum(outputs.square().sum(), over=real.sum())

    def run(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model = Network()
        step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, randomness="sample", **options)
        for _ in range(5):
            step({"x": x, "lengths": lengths})
        return flat(model)

    cost = ga.split_by_cost(lambda batch: batch["lengths"], max_cost=18)
    assert (run(split=cost, micro_batch_size=4) - run(micro_batch_size=ROWS)).abs().max() < EXACT


# -------------------------------------------------------------------------------------------------- what is not keyed


def _python(model: nn.Module, batch: Any) -> Tensor:
    return regression(model, batch) * random.random()


def _numpy(model: nn.Module, batch: Any) -> Tensor:
    return regression(model, batch) * numpy.random.rand()


def _own_generator(model: nn.Module, batch: Any) -> Tensor:
    return regression(model, batch) * torch.rand(len(batch[0]), generator=torch.Generator().manual_seed(0)).mean()


def _partners(model: nn.Module, batch: Any) -> Tensor:
    order = torch.randperm(len(batch[0]))
    return regression(model, (batch[0] + batch[0][order], batch[1]))


def _of_chosen(model: nn.Module, batch: Any) -> Tensor:
    chosen = batch[0].flatten(0, 1)
    chosen = chosen[chosen[:, 0] > 0]
    return F.mse_loss(model(batch[0]), batch[1]) + (F.dropout(chosen) ** 2).sum() * 0


def _no_state(model: Any, batch: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(
        lambda x: F.dropout(model(x)).square().mean(), batch[0], use_reentrant=False, preserve_rng_state=False
    )


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (_python, "Python's random or NumPy"),
        (_numpy, "Python's random or NumPy"),
        (_own_generator, "torch.Generator that is passed"),
        (_partners, r"torch.randperm over the rows of a micro-batch"),
        (_of_chosen, r"of which no part is one sample's"),
        (_no_state, r"preserve_rng_state=False"),
    ],
)
def test_what_is_not_keyed_is_named_once(loss_fn: Any, what: str) -> None:
    torch.set_default_dtype(torch.float64)
    model = Network()
    check = "off" if loss_fn is _own_generator else "first"  # whose mean is another one in every piece
    optimizer = torch.optim.SGD(model.parameters())
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=3, randomness="sample", check=check)
    with pytest.warns(ga.GradAccumWarning, match=re.escape('randomness="sample"') + ".*" + what) as warned:
        train(step, 3)
    assert len(warned) == 1


def test_compiled_models_run_uncompiled_and_say_so() -> None:
    torch.set_default_dtype(torch.float64)
    expected = trained("transformer", 3)
    case = STOCHASTIC["transformer"]
    model = make_model(case)
    compiled: Any = torch.compile(model, backend="eager")
    step = ga.TrainStep(
        compiled, torch.optim.SGD(model.parameters(), lr=0.1), case.loss_fn, micro_batch_size=3, randomness="sample"
    )
    with pytest.warns(ga.GradAccumWarning, match="compiled code, which runs uncompiled"):
        train(step)
    assert (flat(model) - expected).abs().max() < EXACT


def test_a_wrong_value() -> None:
    with pytest.raises(ga.WindowError, match=r"randomness='samples'.*\"sample\".*\"torch\""):
        make_step("transformer", randomness="samples")


def test_the_plan_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gradaccum")
    torch.set_default_dtype(torch.float64)
    make_step("transformer", 3)[1](make_batches(1)[0])
    assert "exact (checked on 2 + 1 samples) | random draws by sample" in caplog.text


# ---------------------------------------------------------------------------------------------------------- processes


def check_ranks(rank: int, world_size: int, shares: list[int]) -> list[Tensor]:
    """Parameters after five updates of each model, each process with its share of the rows and a seed of its own.

    After two updates a new step goes on, with micro-batches of another size.
    """
    torch.set_default_dtype(torch.float64)
    found: list[Tensor] = []
    for case in STOCHASTIC.values():
        model = make_model(case)
        torch.manual_seed(100 * rank)  # the first one's counts
        batches = make_batches(5)
        called = wrapped(model, "DDP") if case.loss_fn is regression else model  # others use its layers
        state: Any = None
        for size, part in ((3, batches[:2]), (2, batches[2:])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            step = ga.TrainStep(called, optimizer, case.loss_fn, micro_batch_size=size, randomness="sample")
            if state is not None:
                step.load_state_dict(state)
            for batch in part:
                step(tuple(torch.split(one, shares)[rank] for one in batch))
            state = step.state_dict()
        found.append(flat(model))
    return found


@pytest.mark.parametrize("shares", [[7], [4, 3], [0, 7], [2, 4, 1]])
def test_over_processes(shares: list[int]) -> None:
    alone = [trained(name) for name in STOCHASTIC]
    for found in results_of(check_ranks, len(shares), shares):
        for name, one, expected in zip(STOCHASTIC, found, alone, strict=True):
            assert (one - expected).abs().max() < EXACT, name
