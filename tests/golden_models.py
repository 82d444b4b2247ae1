"""The models and batches of tests/properties/test_golden.py, and the fingerprint of a machine that they make.

All numbers are drawn by `uniform`. Whatever is changed here changes the fingerprint, the recorded bits, or both.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import gradaccum as ga
from oracle import ROWS
from tasks import IGNORED, Batch, Model

UPDATES, MICRO_BATCH = 3, 4
FEATURES, CLASSES, WORDS, COLUMNS, PADDING = 6, 3, 11, 9, 0

NamedTensors = Iterable[tuple[str, Tensor | None]]


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) that are the same on every machine. Normal ones are not: torch draws them by vectorised log
    and cos where the processor has AVX2, which moves their last bits."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


class Layers(nn.Module):
    """Layers by name that read one entry of the batch; ``beside`` them others, which only a loss uses."""

    def __init__(self, key: str, *, beside: dict[str, nn.Module] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.key, self.order = key, list(layers)
        for name, layer in {**layers, **(beside or {})}.items():
            self.add_module(name, layer)

    def forward(self, batch: Batch) -> Tensor:
        hidden = batch[self.key]
        for name in self.order:
            hidden = self.get_submodule(name)(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # an LSTM returns its state as well
        return hidden


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


def _normalised(channels: int) -> nn.Module:
    """No bias before BatchNorm, whose gradient is 0 but for rounding."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Model("x", nn.Linear(FEATURES, CLASSES)),
    "mlp": lambda: Model("x", nn.Linear(FEATURES, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, CLASSES)),
    # The middle has half a million elements, from which on `fused="auto"` adds up in place on a CPU.
    "wide": lambda: Model(
        "x", nn.Linear(FEATURES, 512), nn.GELU(), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, CLASSES)
    ),
    "spread": lambda: Model("x", nn.Linear(FEATURES, 8), nn.Tanh(), Spread(), nn.Linear(9, CLASSES)),
    "convolutions": lambda: Layers(
        "image",
        blocks=nn.Sequential(_normalised(2), _normalised(4)),
        flat=nn.Flatten(),
        head=nn.Linear(4 * 5 * 5, CLASSES),
    ),
    "transformer": Transformer,
    "lstm": lambda: Layers(
        "words",
        embedding=nn.Embedding(WORDS, 5),
        lstm=nn.LSTM(5, 8, batch_first=True),
        head=nn.Linear(8, WORDS),
        beside={"score": nn.Linear(8, 1)},
    ),
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


def batches(make: Callable[..., Batch] = points, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [make(seed=seed, dtype=dtype) for seed in range(1, UPDATES + 1)]


sgd = partial(SGD, lr=0.1, momentum=0.9)
# AdamW divides a gradient by its own size, and makes a whole step of rounding errors where it is 0 but for them: no
# model with attention (the bias of the keys cancels in the softmax) is trained by it.
adamw = partial(AdamW, lr=0.01)


def sha256(tensors: NamedTensors) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor is None:
            digest.update(f"{name} None\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint() -> str:
    """What this machine makes of the cases' models by plain torch: machines that agree in it have the same kernels.

    Nothing of the library may take part: what it broke would change the fingerprint, and the bits would go unchecked.
    """
    made: list[tuple[str, Tensor | None]] = []
    precisions: list[tuple[torch.dtype, Any]] = [
        *((dtype, nullcontext) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((torch.float32, partial(torch.autocast, "cpu", dtype)) for dtype in (torch.bfloat16, torch.float16)),
    ]
    for name in sorted(MODELS.keys() - {"spread"}):  # it calls `ga.gather`
        for dtype, autocast in {"mlp": precisions, "wide": precisions[1:2]}.get(name, precisions[:2]):
            for rows in (1, MICRO_BATCH, ROWS):
                made += _plain(name, rows, dtype, autocast, sgd if name == "wide" or rows == 1 else adamw)
    kernels = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return hashlib.sha256(f"{kernels}: {sha256(made)}".encode()).hexdigest()


def _plain(name: str, rows: int, dtype: torch.dtype, autocast: Any, make_optimizer: Any) -> NamedTensors:
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
