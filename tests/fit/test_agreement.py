"""Measured, estimated and true: what a plan says of an architecture is what training it takes.

The truth is a real training run, by `TrainStep`, of which every tensor is counted.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gradaccum as ga
from architectures import ARCHITECTURES, OPTIMIZERS, Architecture
from gradaccum import tree
from gradaccum.memory.live_bytes import LiveBytes

ROWS = 24
SIZES = (2, 8, 24)  # of equal pieces: a batch is cut evenly, whatever size is asked for
# Measured, nothing is left out but 0-d tensors of the bookkeeping. Estimated, the LSTM's workspace is known to 3%, and
# sizes between those that were run are taken to be on a straight line.
MEASURED, ESTIMATED = 0.005, 0.03


def true_peak(
    architecture: Architecture, make_optimizer: Callable[[nn.Module], Optimizer], batch: Any, size: int
) -> int:
    """Bytes of everything that is alive in the second update: the optimizer's state is there from the first on."""
    model = architecture.make()
    optimizer = make_optimizer(model)
    held = [*model.parameters(), *model.buffers(), *tree.tensors(batch)]
    with LiveBytes() as live:
        train_step = ga.TrainStep(model, optimizer, architecture.loss_fn, micro_batch_size=size)
        train_step(batch)
        live.reset_peak()
        train_step(batch)
    return live.peak + sum(tensor.nbytes for tensor in held)


@pytest.mark.filterwarnings("ignore::gradaccum.BatchNormWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_five_architectures(name: str, optimizer: str) -> None:
    architecture, make_optimizer = ARCHITECTURES[name], OPTIMIZERS[optimizer]
    batch, model = architecture.batch(ROWS), architecture.make()

    def plan(method: str, sizes: tuple[int, ...]) -> ga.Plan:
        options: dict[str, Any] = {"memory": "1GiB", "method": method, "micro_batch_sizes": sizes}
        return ga.plan(model, architecture.loss_fn, batch, optimizer=make_optimizer(model), **options)

    estimated, measured = plan("estimate", SIZES[1:]), plan("measure", SIZES)
    assert (estimated.method, measured.method) == ("estimate", "measure")
    assert [row.is_measured for row in measured.rows] == [True] * len(SIZES)
    for size in SIZES:
        true = true_peak(architecture, make_optimizer, batch, size)
        assert measured.row(size).peak_bytes == pytest.approx(true, rel=MEASURED)
        assert estimated.peak_bytes(size) == pytest.approx(true, rel=ESTIMATED)


def test_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    gpt2 = Architecture(make=lambda: transformers.GPT2LMHeadModel(config), batch=lambda rows: None, loss_fn=loss_fn)
    batch = {"input_ids": torch.randint(0, 100, (ROWS, 24))}
    adamw = OPTIMIZERS["adamw"]
    for method, tolerance in (("estimate", ESTIMATED), ("measure", MEASURED)):
        options: dict[str, Any] = {"memory": "1GiB", "method": method, "micro_batch_sizes": SIZES}
        plan = ga.plan(model, loss_fn, batch, optimizer=adamw(model), **options)
        assert plan.method == method
        for size in SIZES[1:]:
            true = true_peak(gpt2, adamw, batch, size)
            assert plan.row(size).peak_bytes == pytest.approx(true, rel=tolerance)
