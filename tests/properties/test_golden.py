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

Only public names of ``gradaccum`` are used, and no helper of other tests, so that any file may move.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

GOLDEN = Path(__file__).with_name("golden.json")
UPDATES = 3
ROWS = 13  # a prime: no micro-batch size above 1 divides it
MICRO_BATCH = 4
RAGGED = [3, 1, 5, 4]
FEATURES, CLASSES, WORDS, COLUMNS = 6, 3, 11, 9
PADDING, IGNORED = 0, -100

Batch = dict[str, Tensor]
Hashes = list[dict[str, str]]
Numbers = dict[str, list[float]]
Autocast = Callable[[], AbstractContextManager[Any]]

# Tolerances of `numbers` between machines, relative. Machines add in another order and round exp, tanh and sqrt to
# another last bit. A component of a gradient adds up fewer than 1,000 numbers: the worst is 2 * 1,000 * 2**-53 = 2e-13,
# and three updates pass it on: 7e-13. Seen with ATEN_CPU_CAPABILITY=default and MKL_CBWR=COMPATIBLE: 3e-15.
DOUBLE = 1e-12
# The same with 2**-24 = 6e-8 would be 4e-4 at worst, and errors of random sign leave a fortieth of it. Seen: 8e-8.
SINGLE = 1e-5
# One rounding to fp16 is off by 2**-12 = 0.024%. Where sums differ in the last bit of fp32, some roundings fall to the
# other side, by a whole unit: 0.05%. A number passes ten of them, of random sign: sqrt(10) times. Seen: 1e-7.
HALF = 2e-3
# bf16 has three bits fewer: 0.4% and 1.2%, and a norm over hundreds of components leaves half of it. Seen: 2.3e-3.
BF16 = 1e-2


# --------------------------------------------------------------------------------------------------- models and batches


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) that are the same on every machine. Normal ones are not: torch draws them by vectorised log
    and cos where the processor has AVX2, which moves their last bits."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


class Convolutions(nn.Module):
    """No bias before BatchNorm, whose gradient is 0 but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
        )
        self.head = nn.Linear(4 * 5 * 5, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.blocks(batch["image"]).flatten(1))


class Points(nn.Module):
    """Layers that read ``batch["x"]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(batch["x"])


class Transformer(nn.Module):
    """Words to logits of words; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, batch: Batch) -> Tensor:
        words = batch["words"]
        return self.head(self.layer(self.embedding(words), src_key_padding_mask=words == PADDING))


class Recurrent(nn.Module):
    """Words to logits of words, and to one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, WORDS)
        self.score = nn.Linear(8, 1)

    def states(self, batch: Batch) -> Tensor:
        return self.lstm(self.embedding(batch["words"]))[0]

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.states(batch))


class Spread(nn.Module):
    """The spread over the batch as one more feature."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, ga.gather(x).std(0).mean().expand(len(x), 1)], dim=1)


class Contrastive(nn.Module):
    """InfoNCE in both directions, with a scale that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        one, other = (F.normalize(output, dim=-1) for output in outputs)
        similar = self.scale.exp() * one @ other.T
        labels = torch.arange(len(one))
        return (F.cross_entropy(similar, labels) + F.cross_entropy(similar.T, labels)) / 2


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Points(nn.Linear(FEATURES, CLASSES)),
    "mlp": lambda: Points(nn.Linear(FEATURES, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, CLASSES)),
    # The middle has half a million elements, from which on `fused="auto"` adds up in place on a CPU.
    "wide": lambda: Points(nn.Linear(FEATURES, 512), nn.GELU(), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 3)),
    "spread": lambda: Points(nn.Linear(FEATURES, 8), nn.Tanh(), Spread(), nn.Linear(9, CLASSES)),
    "convolutions": Convolutions,
    "transformer": Transformer,
    "lstm": Recurrent,
    "generator": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, FEATURES)),
    "discriminator": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)),
    "contrastive": Contrastive,
}


@torch.no_grad()
def make_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A new model of `MODELS`, its parameters and buffers drawn by `uniform`."""
    model = MODELS[name]().double()
    for seed, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            parameter.copy_(uniform(*parameter.shape, seed=seed) / math.sqrt(parameter[0].numel()))
        else:  # biases about 0, scales of normalisation about 1, as torch makes them
            centre = 1.0 if (parameter == 1).all() else 0.0
            parameter.copy_(centre + uniform(*parameter.shape, seed=seed) / 4)
    for seed, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            buffer.add_(uniform(*buffer.shape, seed=seed) / 4)
    return model.to(dtype)


def points(rows: int = ROWS, *, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    return {
        "x": uniform(rows, FEATURES, seed=seed).to(dtype),
        "second": uniform(rows, FEATURES, seed=seed + 100).to(dtype),
        "target": uniform(rows, CLASSES, seed=seed + 200).to(dtype),
        "image": uniform(rows, 2, 5, 5, seed=seed + 300).to(dtype),
        "label": torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed)),
    }


def text(rows: int = ROWS, *, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Padded on the right; some words have no label."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, COLUMNS + 1, (rows,), generator=generator)
    is_word = torch.arange(COLUMNS) < lengths[:, None]
    has_label = is_word & (torch.rand(rows, COLUMNS, generator=generator) < 0.7)
    return {
        "words": torch.randint(1, WORDS, (rows, COLUMNS), generator=generator).where(is_word, PADDING),
        "labels": torch.randint(WORDS, (rows, COLUMNS), generator=generator).where(has_label, IGNORED),
        "score": uniform(rows, 1, seed=seed).to(dtype),
    }


def batches(make: Callable[..., Batch] = points, *, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [make(seed=seed, dtype=dtype) for seed in range(1, UPDATES + 1)]


def pieces(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    parts = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(sizes))]


sgd = partial(SGD, lr=0.1, momentum=0.9)
# AdamW divides a gradient by its own size, and makes a whole step of rounding errors where it is 0 but for them: no
# model with attention (the bias of the keys cancels in the softmax) is trained by it.
adamw = partial(AdamW, lr=0.01)


# ----------------------------------------------------------------------------------------------------- what is recorded


class Record:
    """Collects what each update did to the parameters and buffers of a module."""

    def __init__(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self.hashes: Hashes = []
        self._losses: list[float] = []
        self._gradient_norms: list[float] = []
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
        self.hashes.append(
            {
                "gradients": sha256(self._seen.items()),
                "state": sha256(self._module.state_dict().items()),
                "loss": ", ".join(f"{loss.item().hex()} {loss.dtype}" for loss in losses),
            }
        )
        self._losses += [loss.item() for loss in losses]
        self._gradient_norms.append(norm(gradient for gradient in self._seen.values() if gradient is not None))
        self._seen = {}

    @property
    def numbers(self) -> Numbers:
        return {
            "losses": self._losses,
            "gradient norms": self._gradient_norms,
            "state norm": [norm(self._module.state_dict().values())],
        }


def sha256(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor is None:
            digest.update(f"{name} None\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def norm(tensors: Iterable[Tensor]) -> float:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm().item()


# ------------------------------------------------------------------------------------------------------------- two ways


def own_loop(
    model: nn.Module,
    optimizer: Optimizer,
    passes: Iterable[Iterable[Any]],
    loss_fn: Callable[[nn.Module, Any], Any],
    **options: Any,
) -> Record:
    """Trains with `ga.Accumulator`; what the last pass leaves of a window is flushed."""
    record = Record(model, optimizer)
    accumulator = ga.Accumulator(model, optimizer, **options)
    for one_pass in passes:
        for micro_batch in accumulator.over(one_pass):
            update = accumulator.backward(loss_fn(model, micro_batch))
            if update is not None:
                record.add(update.loss)
    flushed = accumulator.flush()
    if flushed is not None:
        record.add(flushed.loss)
    return record


def whole_in_hand(
    model: nn.Module,
    optimizer: Optimizer,
    whole_batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    **options: Any,
) -> Record:
    """Trains with `ga.TrainStep`; parameters of ``batch_loss`` are trained with the model's."""
    extra = options.get("batch_loss")
    record = Record(nn.ModuleList([model, extra]) if isinstance(extra, nn.Module) else model, optimizer)
    train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=MICRO_BATCH, **options)
    for batch in whole_batches:
        record.add(train_step(batch).loss)
    return record


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["target"])


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch), batch["label"])


token_criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=IGNORED))


def over_tokens(model: nn.Module, batch: Batch) -> ga.Loss:
    return token_criterion(model(batch).transpose(1, 2), batch["labels"])


def under(autocast: Autocast) -> Callable[[nn.Module, Batch], Tensor]:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with autocast():
            output = model(batch)
        return F.mse_loss(output.float(), batch["target"])

    return loss_fn


in_bf16: Autocast = partial(torch.autocast, "cpu", torch.bfloat16)
in_half: Autocast = partial(torch.autocast, "cpu", torch.float16)


# ------------------------------------------------------------------------------------------------------------- own loop


def ragged() -> Record:
    """Windows of four micro-batches, none of one size; the last window has two."""
    model = make_model("linear")
    sizes = [*RAGGED, 2, 6, 1, 4, 3, 2]
    micro_batches = pieces(points(sum(sizes), seed=1), sizes)
    return own_loop(model, sgd(model.parameters()), [micro_batches], mse, micro_batches=4)


def class_weights() -> Record:
    """Windows of 10, 10 and 6 samples by ``batch_size``, the last micro-batch of one; clipped, with a schedule."""
    model = make_model("mlp")
    optimizer = adamw(model.parameters())
    criterion = ga.criterion(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)))
    data = points(26, seed=1)
    loader = DataLoader(TensorDataset(data["x"], data["label"]), batch_size=5)
    return own_loop(
        model,
        optimizer,
        [loader],
        lambda model, batch: criterion(model({"x": batch[0]}), batch[1]),
        batch_size=10,
        clip_norm=0.1,
        scheduler=ExponentialLR(optimizer, 0.5),
    )


def carried() -> Record:
    """Windows of three from passes of four, and a flush of the last two; a sum and what it is over, said by hand."""
    model = make_model("mlp")
    passes = [pieces(batch, RAGGED) for batch in batches()[:2]]

    def loss_fn(model: nn.Module, batch: Batch) -> ga.Loss:
        losses = F.cross_entropy(model(batch), batch["label"], reduction="none")
        counts = batch["x"][:, 0] > -0.5
        return ga.Loss.sum((losses * counts).sum(), over=counts.sum())

    optimizer = sgd(model.parameters(), nesterov=True, weight_decay=0.01)
    return own_loop(model, optimizer, passes, loss_fn, micro_batches=3, tail="carry")


def own_loop_over_tokens() -> Record:
    model = make_model("lstm")
    micro_batches = [piece for batch in batches(text) for piece in pieces(batch, RAGGED)]
    return own_loop(model, adamw(model.parameters()), [micro_batches], over_tokens, micro_batches=4, clip_norm=0.5)


def own_loop_terms() -> Record:
    model = make_model("lstm")
    micro_batches = [piece for batch in batches(text) for piece in pieces(batch, RAGGED)]
    return own_loop(model, sgd(model.parameters()), [micro_batches], terms, micro_batches=4, weights=weights_of_terms)


def terms(model: nn.Module, batch: Batch) -> dict[str, Any]:
    assert isinstance(model, Recurrent)
    states = model.states(batch)
    return {
        "words": token_criterion(model.head(states).transpose(1, 2), batch["labels"]),
        "score": F.mse_loss(model.score(states[:, 0]), batch["score"]),
    }


def weights_of_terms(batch: Batch) -> dict[str, Any]:
    return {"words": (batch["labels"] != IGNORED).sum(), "score": len(batch["score"])}


def own_loop_low_precision() -> Record:
    model = make_model("mlp", torch.bfloat16)
    micro_batches = [piece for batch in batches(dtype=torch.bfloat16) for piece in pieces(batch, RAGGED)]
    optimizer = sgd(model.parameters())
    return own_loop(model, optimizer, [micro_batches], mse, micro_batches=4, accumulate_dtype=torch.float32)


def own_loop_autocast() -> Record:
    model = make_model("mlp", torch.float32)
    micro_batches = [piece for batch in batches(dtype=torch.float32) for piece in pieces(batch, RAGGED)]
    return own_loop(model, adamw(model.parameters()), [micro_batches], under(in_bf16), micro_batches=4)


def adversaries() -> Record:
    """Two accumulators follow one pass; the generator's loss goes through the discriminator."""
    generator, discriminator = make_model("generator"), make_model("discriminator")
    g_optimizer, d_optimizer = sgd(generator.parameters()), adamw(discriminator.parameters())
    record = Record(nn.ModuleList([generator, discriminator]), g_optimizer, d_optimizer)
    g_accumulator = ga.Accumulator(generator, g_optimizer, batch_size=ROWS)
    d_accumulator = ga.Accumulator(discriminator, d_optimizer, batch_size=ROWS)
    micro_batches = [piece for batch in batches() for piece in pieces(batch, RAGGED)]
    for batch in d_accumulator.over(g_accumulator.over(micro_batches)):
        fake = generator(batch["second"])
        g_loss = F.softplus(-discriminator(fake)).mean()
        d_loss = (F.softplus(-discriminator(batch["x"])) + F.softplus(discriminator(fake.detach()))).mean()
        g_update, d_update = g_accumulator.backward(g_loss), d_accumulator.backward(d_loss)
        if g_update is not None and d_update is not None:
            record.add(g_update.loss, d_update.loss)
    return record


# ---------------------------------------------------------------------------------------------- the whole batch in hand


def plain_mean(*, fused: Any, name: str = "mlp") -> Record:
    model = make_model(name, torch.float32)
    return whole_in_hand(model, sgd(model.parameters()), batches(dtype=torch.float32), mse, fused=fused)


def plain_sum() -> Record:
    """A sum that is over nothing stays one."""
    model = make_model("linear")

    def loss_fn(model: nn.Module, batch: Batch) -> ga.Loss:
        return ga.Loss.sum((model(batch) - batch["target"]).square().sum())

    return whole_in_hand(model, sgd(model.parameters(), lr=0.01), batches(), loss_fn)


def tokens(*, fused: Any) -> Record:
    model = make_model("transformer")
    optimizer = sgd(model.parameters())
    scheduler = ExponentialLR(optimizer, 0.7)
    options: dict[str, Any] = {"clip_norm": 0.2, "scheduler": scheduler, "fused": fused}
    return whole_in_hand(model, optimizer, batches(text), over_tokens, **options)


def several_terms() -> Record:
    model = make_model("lstm")
    return whole_in_hand(model, adamw(model.parameters()), batches(text), terms, weights=weights_of_terms)


def by_cost(name: str) -> Record:
    model = make_model(name)
    split = ga.split_by_cost(lambda batch: (batch["words"] != PADDING).sum(1), 16, piece_cost=1)
    return whole_in_hand(model, sgd(model.parameters()), batches(text), over_tokens, split=split)


def contrastive(*, kept_graphs: int) -> Record:
    model, batch_loss = make_model("mlp"), make_model("contrastive")
    return whole_in_hand(
        model,
        adamw([*model.parameters(), *batch_loss.parameters()]),
        batches(),
        forward=lambda model, batch: (model(batch), model({"x": batch["second"]})),
        batch_loss=batch_loss,
        kept_graphs=kept_graphs,
    )


def dice() -> Record:
    """Overlap and total over the batch are sums over samples."""
    model = make_model("mlp")

    def statistics(model: nn.Module, batch: Batch) -> Tensor:
        predicted, true = model(batch).sigmoid(), batch["target"].sigmoid()
        return torch.stack([(predicted * true).sum(), predicted.sum() + true.sum()])

    return whole_in_hand(
        model,
        sgd(model.parameters()),
        batches(),
        forward=statistics,
        batch_loss=lambda sums, batch: 1 - 2 * sums[0] / sums[1],
        combine="sum",
        kept_graphs=0,
    )


def batch_norm(kind: Any, **options: Any) -> Record:
    model = make_model("convolutions")
    return whole_in_hand(model, sgd(model.parameters()), batches(), cross_entropy, batch_norm=kind, **options)


def gathered() -> Record:
    model = make_model("spread")
    return whole_in_hand(model, sgd(model.parameters()), batches(), mse, lockstep=True)


def low_precision() -> Record:
    model = make_model("mlp", torch.bfloat16)
    options: dict[str, Any] = {"accumulate_dtype": torch.float32, "clip_norm": 0.3}
    return whole_in_hand(model, sgd(model.parameters()), batches(dtype=torch.bfloat16), mse, **options)


def autocast_bf16() -> Record:
    model = make_model("mlp", torch.float32)
    return whole_in_hand(model, sgd(model.parameters()), batches(dtype=torch.float32), under(in_bf16))


def scaled_half() -> Record:
    model = make_model("mlp", torch.float32)
    options: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu"), "clip_norm": 0.3}
    return whole_in_hand(model, sgd(model.parameters()), batches(dtype=torch.float32), under(in_half), **options)


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


@dataclass(frozen=True, kw_only=True)
class Case:
    run: Callable[[], Record]
    tolerance: float = DOUBLE


CASES: dict[str, Case] = {
    "own loop, ragged, short last window": Case(run=ragged),
    "own loop, batch_size, class weights, clipped, schedule": Case(run=class_weights),
    "own loop, carried, sum over a count": Case(run=carried),
    "own loop, tokens, clipped": Case(run=own_loop_over_tokens),
    "own loop, terms": Case(run=own_loop_terms),
    "own loop, bf16 added up in fp32": Case(run=own_loop_low_precision, tolerance=BF16),
    "own loop, bf16 autocast": Case(run=own_loop_autocast, tolerance=BF16),
    "own loop, two models in one pass": Case(run=adversaries),
    "plain mean": Case(run=partial(plain_mean, fused=False), tolerance=SINGLE),
    "plain mean, fused": Case(run=partial(plain_mean, fused=True), tolerance=SINGLE),
    "plain mean, wide, fused by size": Case(run=partial(plain_mean, fused="auto", name="wide"), tolerance=SINGLE),
    "plain sum": Case(run=plain_sum),
    "tokens, clipped, schedule": Case(run=partial(tokens, fused=False)),
    "tokens, clipped, schedule, fused": Case(run=partial(tokens, fused=True)),
    "terms": Case(run=several_terms),
    "split by cost, transformer": Case(run=partial(by_cost, "transformer")),
    "split by cost, lstm": Case(run=partial(by_cost, "lstm")),
    "contrastive, no graph kept": Case(run=partial(contrastive, kept_graphs=0)),
    "contrastive, one graph kept": Case(run=partial(contrastive, kept_graphs=1)),
    "statistics that add up": Case(run=dice),
    "batch norm, exact": Case(run=partial(batch_norm, "exact")),
    "batch norm, exact, recomputed": Case(run=partial(batch_norm, "exact", activations="recompute")),
    "batch norm, groups": Case(run=partial(batch_norm, ga.GhostBatch(4))),
    "batch norm, frozen": Case(run=partial(batch_norm, "frozen")),
    "gather": Case(run=gathered),
    "bf16 added up in fp32, clipped": Case(run=low_precision, tolerance=BF16),
    "bf16 autocast": Case(run=autocast_bf16, tolerance=BF16),
    "fp16 autocast, scaled, clipped": Case(run=scaled_half, tolerance=HALF),
    "gradient only": Case(run=gradient_only),
}


# ---------------------------------------------------------------------------------------------------------- the machine


def fingerprint() -> str:
    """What this machine makes of the cases' models by plain torch: machines that agree in it have the same kernels.

    Nothing of the library may take part: what it broke would change the fingerprint, and the bits would go unchecked.
    """
    made: list[tuple[str, Tensor | None]] = []
    precisions: list[tuple[torch.dtype, Autocast]] = [
        (torch.float64, nullcontext),
        (torch.float32, nullcontext),
        (torch.bfloat16, nullcontext),
        (torch.float32, in_bf16),
        (torch.float32, in_half),
    ]
    for name in sorted(MODELS.keys() - {"spread"}):  # it calls `ga.gather`
        for dtype, autocast in {"mlp": precisions, "wide": precisions[1:2]}.get(name, precisions[:2]):
            for rows in (1, MICRO_BATCH, ROWS):
                made += _plain(name, rows, dtype, autocast, sgd if name == "wide" or rows == 1 else adamw)
    kernels = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return hashlib.sha256(f"{kernels}: {sha256(made)}".encode()).hexdigest()


def _plain(
    name: str, rows: int, dtype: torch.dtype, autocast: Autocast, make_optimizer: Callable[..., Optimizer]
) -> list[tuple[str, Tensor | None]]:
    """Two updates with all rows, one of them clipped; and the products that are added up in place."""
    model = make_model(name, dtype)
    optimizer = make_optimizer(model.parameters())
    x = points(rows, seed=1, dtype=dtype)
    batch = x | text(rows, seed=1, dtype=dtype)
    made: list[tuple[str, Tensor | None]] = []
    for clip_norm in (math.inf, 0.1):
        optimizer.zero_grad()
        with autocast():
            if name == "contrastive":
                output = model((x["x"], x["second"]), x)
            else:
                output = model(x["x"] if name in ("generator", "discriminator") else batch)
        output = output.double() if dtype == torch.float64 else output.float()
        loss = (F.softplus(output).mean() + output.flatten(1).logsumexp(1).mean()) if output.ndim > 1 else output
        if output.ndim == 2 and output.shape[1] == CLASSES:
            weight = torch.arange(1, CLASSES + 1, dtype=output.dtype)
            loss = loss + F.cross_entropy(output, batch["label"], weight) + F.mse_loss(output, torch.ones_like(output))
        loss.backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        made += [("loss", loss), ("norm", total)]
        made += [(parameter_name, parameter.grad) for parameter_name, parameter in model.named_parameters()]
        optimizer.step()
    made += list(model.state_dict().items())
    y = x["target"]
    made += [("in place", torch.ones(CLASSES, FEATURES, dtype=dtype).addmm_(y.T, x["x"]))]
    made += [("sum", y.sum(0)), ("spread", y.std(0, correction=0)), ("norm", torch.linalg.vector_norm(y))]
    return made


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
    assert len(made) == len(expected), f"{len(made)} updates instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(made, expected, strict=True), start=1):
        differ = [what for what in other if one[what] != other[what]]
        assert not differ, f"update {index} has other bits than recorded: {', '.join(differ)}"


def trained(case: Case) -> Record:
    record = case.run()
    assert len(record.hashes) == UPDATES
    return record


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def machine() -> str:
    with one_thread():
        return fingerprint()


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_recorded(name: str, machine: str) -> None:
    recorded = golden()
    assert name in recorded["cases"], f"not recorded: python {Path(__file__).name} --record"
    expected = recorded["cases"][name]

    record = trained(CASES[name])

    assert_same_numbers(record.numbers, expected["numbers"], tolerance=CASES[name].tolerance)
    if machine in recorded["machines"]:
        assert_same_bits(record.hashes, expected["hashes"][machine])


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
        for name, case in CASES.items():
            record = trained(case)
            expected = recorded["cases"].setdefault(name, {"numbers": record.numbers, "hashes": {}})
            try:
                assert_same_numbers(record.numbers, expected["numbers"], tolerance=case.tolerance)
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
