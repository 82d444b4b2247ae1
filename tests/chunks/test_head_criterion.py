"""A head in chunks under both ways to train, against the whole batch in one piece; on several ranks too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradaccum as ga
from oracle import EXACT, WAYS, assert_same, whole_batches
from ranks import results_of
from tasks import IGNORED, Batch
from wrapping import full_tensor

FEATURES, CLASSES, TIME = 6, 701, 5
ROWS = 13


class LanguageModel(nn.Module):
    """Ids to what the head gets."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.lm_head = nn.Linear(FEATURES, CLASSES, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids)).tanh()


def make(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LanguageModel(tied=tied).double()


def make_batch(rows: int, *, seed: int = 0, masked: bool = False) -> Batch:
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows, TIME), generator=made)
    counts = torch.arange(TIME) < torch.randint(1, TIME + 1, (rows, 1), generator=made)
    return {
        "ids": torch.randint(CLASSES, (rows, TIME), generator=made),
        "labels": labels.masked_fill(~counts | masked, IGNORED),
    }


def loss_in_chunks(*, chunk: int = 7, **options: Any) -> Callable[[Any, Batch], ga.Loss]:
    def loss(model: Any, batch: Batch) -> ga.Loss:
        head = getattr(model, "module", model).lm_head
        criterion = ga.criterion(nn.CrossEntropyLoss(**options), head=head, chunk=chunk)
        return criterion(model(batch["ids"]), batch["labels"])

    return loss


def whole_loss(model: Any, batch: Batch, **options: Any) -> Tensor:
    logits = model.lm_head(model(batch["ids"]))
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("fused", [True, False, "auto"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_both_ways_to_train(way: str, tied: bool, fused: Any) -> None:
    batches = [make_batch(ROWS, seed=seed) for seed in range(3)]
    oracle, model = make(tied=tied), make(tied=tied)
    wanted = whole_batches(oracle, sgd(oracle), batches, whole_loss)
    found = WAYS[way](model, sgd(model), batches, loss_in_chunks(), fused=fused)
    assert_same(found, wanted)


def test_as_in_the_readme_of_torch() -> None:
    """Options of the loss, and labels that another option ignores."""
    batch, model, oracle = make_batch(ROWS), make(), make()
    batch["labels"][batch["labels"] == IGNORED] = 3
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    options: dict[str, Any] = {"ignore_index": 3, "label_smoothing": 0.1}
    loss = loss_in_chunks(**options)(model, batch)
    loss.value.backward()
    whole_loss(oracle, batch, **options).backward()
    for parameter, wanted in zip(model.parameters(), oracle.parameters(), strict=True):
        assert (parameter.grad - wanted.grad).abs().max() <= EXACT
    counted = int((batch["labels"] != 3).sum())
    assert (sum(seen), max(seen)) == (counted, 7)
    assert loss.weight == counted


def test_low_precision_sums() -> None:
    """64 micro-batches of one row in bf16: with fp32 sums the head's gradient is that of one piece."""
    batch = make_batch(64)
    oracle = make().bfloat16().double()  # the same parameters
    whole_loss(oracle, batch).backward()
    errors: dict[Any, float] = {}
    for dtype in (None, torch.float32):
        model = make().bfloat16()
        optimizer = sgd(model)
        seen: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_, model=model, seen=seen: seen.append(model.lm_head.weight.grad))
        step = ga.TrainStep(
            model, optimizer, loss_in_chunks(chunk=2), micro_batch_size=1, accumulate_dtype=dtype, fused=False
        )
        step(batch)
        wanted = oracle.lm_head.weight.grad
        errors[dtype] = ((seen[0].double() - wanted).norm() / wanted.norm()).item()
    assert errors[torch.float32] <= 0.6 * errors[None]
    assert errors[torch.float32] <= 2**-6  # the activations are bf16 all the same


def test_audited() -> None:
    model = make()
    report = ga.audit(model, loss_in_chunks(), make_batch(8), micro_batch_size=3)
    assert report.exact, str(report)


def test_a_head_that_is_none() -> None:
    with pytest.raises(ga.UnknownLossError, match="head='lm_head', which makes no logits"):
        ga.criterion(nn.CrossEntropyLoss(), head="lm_head")  # type: ignore[call-overload]


def test_without_a_head_it_is_a_criterion() -> None:
    assert repr(ga.criterion(nn.MSELoss())) == "ga.criterion(MSELoss())"


def over_ranks(rank: int, world_size: int, how: str, tied: bool) -> list[dict[str, Tensor]]:
    """Three updates on shares of unequal size, of which one rank's are once ignored and once missing."""
    model = make(tied=tied)
    trained: Any = model
    if how == "DDP":
        trained = DistributedDataParallel(model)
    elif how == "FSDP2":
        trained = fully_shard(model)
    elif how == "FSDP2, head apart":
        fully_shard(model.lm_head)
        trained = fully_shard(model)
    optimizer = sgd(trained)
    seen: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        seen.append({name: full_tensor(value.grad).clone() for name, value in model.named_parameters()})

    optimizer.register_step_pre_hook(note)
    step = ga.TrainStep(trained, optimizer, loss_in_chunks(), micro_batch_size=2)
    for batch in shares(rank):
        step(batch)
    return seen


def shares(rank: int) -> list[Batch]:
    return [
        make_batch(5 - 2 * rank, seed=rank),
        make_batch(4, seed=2 + rank, masked=bool(rank)),
        make_batch(0 if rank else 3, seed=4),
    ]


# A tied parameter cannot be of two groups of FSDP2.
@pytest.mark.parametrize(
    ("how", "tied"), [("DDP", True), ("DDP", False), ("FSDP2", True), ("FSDP2", False), ("FSDP2, head apart", False)]
)
def test_two_ranks(how: str, tied: bool) -> None:
    oracle = make(tied=tied)
    batches = [
        {name: torch.cat([one[name], other[name]]) for name in one}
        for one, other in zip(shares(0), shares(1), strict=True)
    ]
    wanted = whole_batches(oracle, sgd(oracle), batches, whole_loss)
    for found in results_of(over_ranks, 2, how, tied):
        assert len(found) == len(wanted)
        for gradients, made in zip(found, wanted, strict=True):
            for name, gradient in gradients.items():
                expected = made.gradients[name]
                assert expected is not None
                assert (gradient - expected).abs().max() <= EXACT, name
