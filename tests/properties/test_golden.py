"""Golden updates: a refactoring changes no bit of a gradient, a parameter, a buffer or a loss.

Each case trains a small model for three updates. After every update it is recorded, in ``golden.json``:

- ``hashes``: sha256 of every gradient that the optimizer found (in a step pre-hook), of every parameter and buffer
  after the update, and the loss in hexadecimal. They are compared bit for bit, but only where the machine's fingerprint
  is in the file: other instruction sets add in another order, and give other last bits.
- ``numbers``: losses, 2-norms of the gradients, 2-norm of the parameters and buffers at the end. They are compared on
  every machine, within the case's tolerance.

On a machine whose fingerprint is not in the file **only the numbers are compared**. To have the bits compared there,
record them with the code from before the change:

    python tests/properties/test_golden.py --record

This adds what is missing. It changes nothing that is there: numbers out of tolerance and other hashes for the same
fingerprint are refused. Where other bits are intended, delete the case, or its hashes, from ``golden.json`` first.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

sys.path.append(str(Path(__file__).parents[1]))  # for --record; pytest has the helpers of tests/ on its path already
from golden_models import (
    MICRO_BATCH,
    PADDING,
    UPDATES,
    adamw,
    batches,
    fingerprint,
    make_model,
    points,
    sgd,
    sha256,
    text,
)  # fmt: skip
from oracle import EXACT, RAGGED, ROWS, SINGLE
from tasks import IGNORED, Batch, pieces

GOLDEN = Path(__file__).with_name("golden.json")

Hashes = list[dict[str, str]]
Numbers = dict[str, list[float]]

# Tolerances of `numbers` between machines, relative. Machines add in another order and round exp, tanh and sqrt to
# another last bit: EXACT and SINGLE of the oracle. Seen with ATEN_CPU_CAPABILITY=default and MKL_CBWR=COMPATIBLE:
# 3e-15 and 8e-8. One rounding to fp16 is off by 2**-12 = 0.024%. Where sums differ in the last bit of fp32, some
# roundings fall to the other side, by a whole unit: 0.05%. A number passes ten of them, of random sign: sqrt(10) times.
# Seen: 1e-7.
HALF = 2e-3
# bf16 has three bits fewer: 0.4% and 1.2%, and a norm over hundreds of components leaves half of it. Seen: 2.3e-3.
BF16 = 1e-2


# ----------------------------------------------------------------------------------------------------- what is recorded
class Record:
    """Collects what each update did to the parameters and buffers of a module."""

    def __init__(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self.hashes: Hashes = []
        self.numbers: Numbers = {"losses": [], "gradient norms": [], "state norm": []}
        self._module = module
        self._seen: dict[str, Tensor | None] = {}
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                self._seen[self._names[parameter]] = None if gradient is None else gradient.detach().clone()

    def add(self, *losses: Tensor) -> None:
        """One update was made, of one optimizer or several."""
        assert self._seen, "no optimizer stepped"
        state = self._module.state_dict()
        loss = ", ".join(f"{loss.item().hex()} {loss.dtype}" for loss in losses)
        self.hashes.append({"gradients": sha256(self._seen.items()), "state": sha256(state.items()), "loss": loss})
        self.numbers["losses"] += [loss.item() for loss in losses]
        gradients = [gradient for gradient in self._seen.values() if gradient is not None]
        self.numbers["gradient norms"].append(norm(gradients))
        self.numbers["state norm"] = [norm(state.values())]
        self._seen = {}


def norm(tensors: Iterable[Tensor]) -> float:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm().item()


# ---------------------------------------------------------------------------------------- own loops and whole batches
def ragged(make: Callable[..., Batch] = points, dtype: torch.dtype = torch.float64) -> list[list[Batch]]:
    """One pass over micro-batches of four sizes."""
    return [[piece for batch in batches(make, dtype) for piece in pieces(batch, RAGGED)]]


def train(
    name: str, loss_fn: Any = None, make_optimizer: Any = sgd, *, passes: Iterable[Iterable[Any]] | None = None,
    data: Any = points, dtype: torch.dtype = torch.float64, rate_decay: float | None = None, **options: Any,
) -> Record:  # fmt: skip
    """By `ga.Accumulator` over ``passes``, with a flush at the end; without them by `ga.TrainStep`, on whole batches.

    Parameters of ``batch_loss`` are trained with the model's.
    """
    model, extra = make_model(name, dtype), options.get("batch_loss")
    module = nn.ModuleList([model, extra]) if isinstance(extra, nn.Module) else model
    optimizer = make_optimizer(module.parameters())
    record = Record(module, optimizer)
    options["scheduler"] = None if rate_decay is None else ExponentialLR(optimizer, rate_decay)
    if passes is None:
        train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=MICRO_BATCH, **options)
        for batch in batches(data, dtype):
            record.add(train_step(batch).loss)
        return record
    size = {} if "batch_size" in options else {"micro_batches": len(RAGGED)}
    accumulator = ga.Accumulator(model, optimizer, **{**size, **options})
    for one_pass in passes:
        for micro_batch in accumulator.over(one_pass):
            update = accumulator.backward(loss_fn(model, micro_batch))
            if update is not None:
                record.add(update.loss)
    flushed = accumulator.flush()
    if flushed is not None:
        record.add(flushed.loss)
    return record


def adversaries() -> Record:
    """Two accumulators follow one pass; the generator's loss goes through the discriminator."""
    generator, discriminator = make_model("generator"), make_model("discriminator")
    g_optimizer, d_optimizer = sgd(generator.parameters()), adamw(discriminator.parameters())
    record = Record(nn.ModuleList([generator, discriminator]), g_optimizer, d_optimizer)
    g_accumulator = ga.Accumulator(generator, g_optimizer, batch_size=ROWS)
    d_accumulator = ga.Accumulator(discriminator, d_optimizer, batch_size=ROWS)
    (micro_batches,) = ragged()
    for batch in d_accumulator.over(g_accumulator.over(micro_batches)):
        fake = generator(batch["second"])
        g_loss = F.softplus(-discriminator(fake)).mean()
        d_loss = (F.softplus(-discriminator(batch["x"])) + F.softplus(discriminator(fake.detach()))).mean()
        g_update, d_update = g_accumulator.backward(g_loss), d_accumulator.backward(d_loss)
        if g_update is not None and d_update is not None:
            record.add(g_update.loss, d_update.loss)
    return record


def gradient_only() -> Record:
    """``train_step.backward`` leaves the gradient, and the optimizer is stepped by hand."""
    model = make_model("mlp")
    optimizer = adamw(model.parameters())
    record = Record(model, optimizer)
    train_step = ga.TrainStep(model, optimizer, cross_entropy, micro_batch_size=MICRO_BATCH)
    for batch in batches():
        loss = train_step.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        record.add(loss.value)
    return record


# --------------------------------------------------------------------------------------------------- losses and options
def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["target"])


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch), batch["label"])


def under(dtype: torch.dtype) -> Callable[[nn.Module, Batch], Tensor]:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype):
            output = model(batch)
        return F.mse_loss(output.float(), batch["target"])

    return loss_fn


token_criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=IGNORED))
class_criterion = ga.criterion(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))


def tokens(model: nn.Module, batch: Batch) -> ga.Loss:
    return token_criterion(model(batch).transpose(1, 2), batch["labels"])


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ga.Loss:
    return class_criterion(model({"x": batch[0]}), batch[1])


def sum_over_count(model: nn.Module, batch: Batch) -> ga.Loss:
    losses = F.cross_entropy(model(batch), batch["label"], reduction="none")
    counts = batch["x"][:, 0] > -0.5
    return ga.Loss.sum((losses * counts).sum(), over=counts.sum())


def plain_sum(model: nn.Module, batch: Batch) -> ga.Loss:
    return ga.Loss.sum((model(batch) - batch["target"]).square().sum())  # over nothing: it stays a sum


def terms(model: Any, batch: Batch) -> dict[str, Any]:
    states, _ = model.lstm(model.embedding(batch["words"]))
    return {
        "words": token_criterion(model.head(states).transpose(1, 2), batch["labels"]),
        "score": F.mse_loss(model.score(states[:, 0]), batch["score"]),
    }


def weights_of_terms(batch: Batch) -> dict[str, Any]:
    return {"words": (batch["labels"] != IGNORED).sum(), "score": len(batch["score"])}


def loader() -> DataLoader[Any]:
    data = points(26, seed=1)
    return DataLoader(TensorDataset(data["x"], data["label"]), batch_size=5)


def two_views(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch), model({"x": batch["second"]})


def overlap_and_total(model: nn.Module, batch: Batch) -> Tensor:
    predicted, true = model(batch).sigmoid(), batch["target"].sigmoid()
    return torch.stack([(predicted * true).sum(), predicted.sum() + true.sum()])


def contrastive(**options: Any) -> Record:
    return train("mlp", None, adamw, forward=two_views, batch_loss=make_model("contrastive"), **options)


def by_cost(name: str) -> Record:
    split = ga.split_by_cost(lambda batch: (batch["words"] != PADDING).sum(1), 16, piece_cost=1)
    return train(name, tokens, data=text, split=split)


SIZES = [*RAGGED, 2, 6, 1, 4, 3, 2]
LOW, FULL = {"dtype": torch.bfloat16, "accumulate_dtype": torch.float32}, {"dtype": torch.float32}
CLIPPED_TOKENS = {"data": text, "clip_norm": 0.2, "rate_decay": 0.7}
nesterov = partial(sgd, nesterov=True, weight_decay=0.01)

CASES: dict[str, tuple[Callable[[], Record], float]] = {
    # Windows of four micro-batches, none of one size; the last window has two.
    "own loop, ragged, short last window": (
        lambda: train("linear", mse, passes=[pieces(points(sum(SIZES), seed=1), SIZES)]), EXACT),
    # Windows of 10, 10 and 6 samples by ``batch_size``, the last micro-batch of one; clipped, with a schedule.
    "own loop, batch_size, class weights, clipped, schedule": (
        lambda: train("mlp", weighted, adamw, passes=[loader()], batch_size=10, clip_norm=0.1, rate_decay=0.5), EXACT),
    # Windows of three from passes of four, and a flush of the last two; a sum and what it is over, said by hand.
    "own loop, carried, sum over a count": (
        lambda: train("mlp", sum_over_count, nesterov, passes=[pieces(batch, RAGGED) for batch in batches()[:2]],
                      micro_batches=3, tail="carry"), EXACT),
    "own loop, tokens, clipped": (lambda: train("lstm", tokens, adamw, passes=ragged(text), clip_norm=0.5), EXACT),
    "own loop, terms": (lambda: train("lstm", terms, passes=ragged(text), weights=weights_of_terms), EXACT),
    "own loop, bf16 added up in fp32": (lambda: train("mlp", mse, passes=ragged(dtype=torch.bfloat16), **LOW), BF16),
    "own loop, bf16 autocast": (
        lambda: train("mlp", under(torch.bfloat16), adamw, passes=ragged(**FULL), **FULL), BF16),
    "own loop, two models in one pass": (adversaries, EXACT),
    "plain mean": (lambda: train("mlp", mse, fused=False, **FULL), SINGLE),
    "plain mean, fused": (lambda: train("mlp", mse, fused=True, **FULL), SINGLE),
    "plain mean, wide, fused by size": (lambda: train("wide", mse, fused="auto", **FULL), SINGLE),
    "plain sum": (lambda: train("linear", plain_sum, partial(sgd, lr=0.01)), EXACT),
    "tokens, clipped, schedule": (lambda: train("transformer", tokens, fused=False, **CLIPPED_TOKENS), EXACT),
    "tokens, clipped, schedule, fused": (lambda: train("transformer", tokens, fused=True, **CLIPPED_TOKENS), EXACT),
    "terms": (lambda: train("lstm", terms, adamw, data=text, weights=weights_of_terms), EXACT),
    "split by cost, transformer": (lambda: by_cost("transformer"), EXACT),
    "split by cost, lstm": (lambda: by_cost("lstm"), EXACT),
    "contrastive, no graph kept": (lambda: contrastive(kept_graphs=0), EXACT),
    "contrastive, one graph kept": (lambda: contrastive(kept_graphs=1), EXACT),
    "statistics that add up": (
        lambda: train("mlp", forward=overlap_and_total, batch_loss=lambda sums, batch: 1 - 2 * sums[0] / sums[1],
                        combine="sum", kept_graphs=0), EXACT),
    "batch norm, exact": (lambda: train("convolutions", cross_entropy, batch_norm="exact"), EXACT),
    "batch norm, exact, recomputed": (
        lambda: train("convolutions", cross_entropy, batch_norm="exact", activations="recompute"), EXACT),
    "batch norm, groups": (lambda: train("convolutions", cross_entropy, batch_norm=ga.GhostBatch(4)), EXACT),
    "batch norm, frozen": (lambda: train("convolutions", cross_entropy, batch_norm="frozen"), EXACT),
    "gather": (lambda: train("spread", mse, lockstep=True), EXACT),
    "bf16 added up in fp32, clipped": (lambda: train("mlp", mse, clip_norm=0.3, **LOW), BF16),
    "bf16 autocast": (lambda: train("mlp", under(torch.bfloat16), **FULL), BF16),
    "fp16 autocast, scaled, clipped": (
        lambda: train("mlp", under(torch.float16), scaler=torch.amp.GradScaler("cpu"), clip_norm=0.3, **FULL), HALF),
    "gradient only": (gradient_only, EXACT),
}  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """The bits of a sum depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- compare and record
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"machines": {}, "cases": {}}


def assert_same_numbers(made: Numbers, expected: Numbers, *, tolerance: float) -> None:
    assert made.keys() == expected.keys()
    for name, right in expected.items():
        assert len(made[name]) == len(right), f"{len(made[name])} {name} instead of {len(right)}"
        for index, (one, other) in enumerate(zip(made[name], right, strict=True), start=1):
            # Written so that a NaN fails.
            assert abs(one - other) <= tolerance * abs(other), (
                f"{name}, number {index}: {one!r} instead of {other!r}, off by {abs(one / other - 1):.1e}"
            )


def assert_same_bits(made: Hashes, expected: Hashes) -> None:
    assert len(made) == len(expected) == UPDATES, f"{len(made)} updates instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(made, expected, strict=True), start=1):
        differ = [what for what in other if one[what] != other[what]]
        assert not differ, f"update {index} has other bits than recorded: {', '.join(differ)}"


@pytest.fixture(scope="module")
def machine() -> str:
    with one_thread():
        return fingerprint()


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_recorded(name: str, machine: str) -> None:
    recorded, (run, tolerance) = golden(), CASES[name]
    assert name in recorded["cases"], f"not recorded: python {Path(__file__).name} --record"
    expected = recorded["cases"][name]
    with one_thread():
        record = run()
    assert_same_numbers(record.numbers, expected["numbers"], tolerance=tolerance)
    # Elsewhere the bits are compared with themselves: the number of updates is checked on every machine.
    assert_same_bits(record.hashes, expected["hashes"].get(machine, record.hashes))


def test_every_recorded_case_is_run() -> None:
    recorded = golden()
    assert recorded["cases"].keys() == CASES.keys()
    for name, case in recorded["cases"].items():
        assert case["hashes"].keys() == recorded["machines"].keys(), name


def record_all() -> None:
    """Adds this machine's hashes, and the numbers of cases that have none, to ``golden.json``."""
    recorded = golden()
    with one_thread():
        machine = fingerprint()
        for name, (run, tolerance) in CASES.items():
            record = run()
            expected = recorded["cases"].setdefault(name, {"numbers": record.numbers, "hashes": {}})
            try:
                assert_same_numbers(record.numbers, expected["numbers"], tolerance=tolerance)
                assert_same_bits(record.hashes, expected["hashes"].setdefault(machine, record.hashes))
            except AssertionError as error:
                sys.exit(f"Nothing was written. {name}: {error}. If that is intended, delete the case first.")
    recorded["machines"][machine] = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(CASES)} cases recorded for {machine}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Golden updates of gradaccum.")
    parser.add_argument("--record", action="store_true", required=True, help="add what is missing to golden.json")
    parser.parse_args()
    record_all()
