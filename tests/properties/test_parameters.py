"""Parameters of every kind, whose gradients reach ``.grad`` in a way of their own, against the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from oracle import ROWS, WAYS, Made, assert_same, assert_same_gradients, parameters_of, whole_batches
from tasks import CLASSES, FEATURES, TIME, WORDS, Batch, make_batch, pieces

EVERY_WAY = pytest.mark.parametrize("way", WAYS)
BATCHES = [make_batch(ROWS, seed=1), make_batch(ROWS, seed=2)]


class Layers(nn.Module):
    """Two layers on ``x``; the classes below change how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        return self.second(self.first(batch["x"]).tanh())


class LowRank(Layers):
    """A frozen layer with a trained low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.down = nn.Linear(FEATURES, 2, bias=False)
        self.up = nn.Linear(2, FEATURES, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        return self.second((self.first(batch["x"]) + self.up(self.down(batch["x"]))).tanh())


class UsedTwice(Layers):
    def forward(self, batch: Batch) -> Tensor:
        return self.second(self.first(self.first(batch["x"]).tanh()).tanh())


class Tied(nn.Module):
    """The embedding's weight is the output layer's as well."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, FEATURES, sparse=sparse)
        self.output = nn.Linear(FEATURES, CLASSES)
        self.output.weight = self.words.weight

    def forward(self, batch: Batch) -> Tensor:
        return self.output(self.words(batch["ids"] % CLASSES).cumsum(1))


class Sometimes(Layers):
    """An expert for the rows that begin with one of two words: some micro-batches have none, and do not run it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(FEATURES, FEATURES)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.first(batch["x"])
        chosen = (batch["ids"][:, 0] < 2).nonzero().squeeze(1)
        if len(chosen):
            hidden = hidden.index_add(0, chosen, self.expert(batch["x"][chosen]))
        return self.second(hidden)


class Sparse(nn.Module):
    """Embeddings only, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, CLASSES, sparse=True)

    def forward(self, batch: Batch) -> Tensor:
        return self.words(batch["ids"]).cumsum(1)


class SparseAndDense(Sparse):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(CLASSES, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        return self.output(super().forward(batch))


class Checkpointed(Layers):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].detach().requires_grad_(self.use_reentrant)  # it runs backward for such inputs only
        hidden = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.use_reentrant)
        return self.second(hidden)


class OddShapes(Layers):
    """A parameter of 0 dimensions, one without elements, and a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0, CLASSES))

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) / self.temperature + self.nothing.sum(0)


class Spectral(Layers):
    """A complex parameter: a filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(FEATURES // 2 + 1, dtype=torch.complex128))

    def forward(self, batch: Batch) -> Tensor:
        return self.second(torch.fft.irfft(torch.fft.rfft(batch["x"]) * self.filter, n=FEATURES))


class Transposed(Layers):
    """A parameter and inputs that do not lie in memory in order."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight = nn.Parameter(torch.randn(FEATURES, FEATURES).t())

    def forward(self, batch: Batch) -> Tensor:
        return super().forward({"x": batch["x"].transpose(0, 1).contiguous().transpose(0, 1)})


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    """Makes `Layers` of which something is changed."""

    def make() -> nn.Module:
        model = Layers()
        change(model)
        return model

    return make


KINDS: dict[str, Callable[[], nn.Module]] = {
    "frozen": changed(lambda model: model.first.requires_grad_(False)),
    "low rank": LowRank,
    "used twice": UsedTwice,
    # No batch uses it: its gradients are None, and weight decay leaves it alone.
    "unused": changed(lambda model: model.add_module("unused", nn.Linear(2, 2))),
    "tied": Tied,
    "tied, half of it sparse": lambda: Tied(sparse=True),
    "used in some micro-batches": Sometimes,
    "sparse": Sparse,
    "sparse and dense": SparseAndDense,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(use_reentrant=True),
    "odd shapes": OddShapes,
    "complex": Spectral,
    "parametrised": changed(lambda model: nn.utils.parametrizations.weight_norm(model.first)),
    # Gradients change on their way, by a hook that is linear, so that the sum may be taken after it.
    "hooked": changed(lambda model: model.second.weight.register_hook(lambda gradient: 3 * gradient)),
    # BatchNorm in evaluation mode sees single samples only.
    "frozen statistics": changed(
        lambda model: setattr(model, "first", nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(TIME).eval()))
    ),
    "transposed": Transposed,
}


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["y"])


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def with_decay(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW moves every parameter that has a gradient, were it zero, and none that has not."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2, weight_decay=0.1)


def sparse_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(model.parameters(), lr=0.01, eps=1e-2)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)  # not copied: copies have no hooks
    return KINDS[kind]().double()


def expected_of(kind: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> list[Made]:
    whole = make(kind)
    return whole_batches(whole, optimizer(whole), BATCHES, squares, **options)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("kind", KINDS)
@EVERY_WAY
def test_every_kind_of_parameter(way: str, kind: str, clip_norm: float | None) -> None:
    model = make(kind)
    expected = expected_of(kind, plain_sgd, clip_norm=clip_norm)
    made = WAYS[way](model, plain_sgd(model), BATCHES, squares, clip_norm=clip_norm)
    assert_same(made, expected)


@pytest.mark.parametrize("kind", ["unused", "used in some micro-batches", "tied", "frozen"])
@EVERY_WAY
def test_adamw_decays_what_the_whole_batch_would(way: str, kind: str) -> None:
    model = make(kind)
    assert_same(WAYS[way](model, with_decay(model), BATCHES, squares), expected_of(kind, with_decay))


@EVERY_WAY
def test_sparse_adam(way: str) -> None:
    model = make("sparse")
    optimizer = sparse_adam(model)
    are_sparse: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: are_sparse.append(model.words.weight.grad.is_sparse))
    assert_same(WAYS[way](model, optimizer, BATCHES, squares), expected_of("sparse", sparse_adam))
    assert all(are_sparse)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@EVERY_WAY
def test_compiled_model(way: str, backend: str) -> None:
    torch.compiler.reset()
    model = make("used twice")
    compiled = torch.compile(model, backend=backend)
    made = WAYS[way](model, plain_sgd(model), BATCHES, lambda _, batch: squares(compiled, batch), clip_norm=0.05)
    assert_same(made, expected_of("used twice", plain_sgd, clip_norm=0.05))


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.first.requires_grad_(True)


def add_layer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.third = nn.Linear(CLASSES, CLASSES).double()
    with torch.no_grad():
        model.third.weight.fill_(0.5)
        model.third.bias.zero_()
    model.forward = lambda batch: model.third(type(model).forward(model, batch))
    optimizer.add_param_group({"params": model.third.parameters()})


@pytest.mark.parametrize(("kind", "change"), [("frozen", unfreeze), ("used twice", add_layer)])
def test_what_is_trained_from_the_second_update_on(
    kind: str, change: Callable[[nn.Module, torch.optim.Optimizer], None]
) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[Batch], Any]) -> dict[str, Tensor]:
        step(BATCHES[0])
        change(model, optimizer)
        for batch in (BATCHES[1], *pieces(BATCHES[0], [9, 4])):  # smaller ones, whose sums are corrected at the end
            step(batch)
        return parameters_of(model)

    own, whole = make(kind), make(kind)
    optimizer = plain_sgd(own)
    made = train(own, optimizer, ga.TrainStep(own, optimizer, squares, micro_batch_size=4))
    optimizer = plain_sgd(whole)
    expected = train(whole, optimizer, lambda batch: whole_batches(whole, optimizer, [batch], squares))
    assert_same_gradients(made, expected)
