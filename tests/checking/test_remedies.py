"""Losses that do not add up, of every kind: the diagnosis, and each line that is printed, run on another batch.

The oracle is the whole batch in float64. The look has 8 rows; the lines are executed on 13, in micro-batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from gradaccum import tree
from gradaccum.checking.loss_errors import loss_error
from gradaccum.checking.remedies import Diagnosis, remedies
from gradaccum.checking.root_runs import Run, make_run
from gradaccum.losses.loss import Loss

ROWS, LOOK, TIME, WORDS, WIDTH = 13, 8, 6, 9, 8
TOLERANCE = 1e-9  # of the diagnosis; the lines are held to RIGHT
RIGHT = 1e-12
Batch = dict[str, Tensor]
Names = dict[str, Any]


class TinyTransformer(nn.Module):
    """Embedding, one causal layer, a head; ``[rows, TIME]`` to ``[rows, TIME, WORDS]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=torch.float64)
        return self.head(self.layer(self.embed(ids), src_mask=causal))


def make_batch(rows: int = ROWS) -> Batch:
    made = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, TIME + 1, (rows,), generator=made)
    is_there = torch.arange(TIME) < lengths[:, None]
    ids = torch.randint(2, WORDS, (rows, TIME), generator=made)
    maps = torch.randint(0, 3, (rows, 4, 4), generator=made)
    return {
        "ids": ids,
        "labels": ids.masked_fill(~is_there, -100),
        "padded": ids.masked_fill(~is_there, 0),
        "mask": torch.rand(rows, TIME, generator=made) < 0.6,
        "lengths": lengths,
        "maps": maps.masked_fill(torch.rand(rows, 4, 4, generator=made) < 0.4, 255),
        "anchors": torch.randint(-1, 4, (rows, 5), generator=made),
        "classes": torch.randint(0, WORDS, (rows,), generator=made),
        "target": torch.randn(rows, TIME, WORDS, generator=made, dtype=torch.float64),
        "image": torch.randn(rows, 1, 4, 4, generator=made, dtype=torch.float64),
        "importance": torch.rand(rows, generator=made, dtype=torch.float64) + 0.1,
        "prompt": torch.tensor([3, 3, 5, 5, 5, 8, 8, 8, 1, 1, 6, 6, 6])[:rows],
    }


class Both(nn.Module):
    """A language model and a small convolution, so that every loss goes with one model."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = TinyTransformer()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, batch: Batch) -> Tensor:
        return self.lm(batch["ids"])


def make_model() -> Both:
    torch.manual_seed(3)
    return Both().double()


def token_losses(model: Both, batch: Batch, labels: str = "labels") -> Tensor:
    return F.cross_entropy(model(batch).transpose(1, 2), batch[labels], reduction="none")


def token_mean(model: Both, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch).transpose(1, 2), batch["labels"])


def token_sum(model: Both, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch).transpose(1, 2), batch["labels"], reduction="sum")


def shifted_mean(model: Both, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def masked_sum(model: Both, batch: Batch) -> Tensor:
    return (token_losses(model, batch, "ids") * batch["mask"]).sum()


def class_scores(model: Both, batch: Batch) -> Tensor:
    return model(batch)[:, -1]


def rewards(model: Both, batch: Batch) -> Tensor:
    return model(batch).square().mean((1, 2))


def penalty(model: Both) -> Tensor:
    return 0.05 * model.lm.head.weight.square().mean()


def aux(model: Both, batch: Batch) -> Tensor:
    return 0.3 * model(batch).square().mean()


def of_conv(model: Both, batch: Batch) -> Tensor:
    return F.cross_entropy(model.conv(batch["image"]), batch["maps"], ignore_index=255)


CLASS_WEIGHTS = torch.linspace(0.2, 2.5, WORDS, dtype=torch.float64)
criterion_of_classes = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)


class Fused(torch.autograd.Function):
    """The shape of fused heads: gradients are made in the forward, and the graph shows nothing."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            loss = F.cross_entropy(leaf.transpose(1, 2), labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (of_scores,) = ctx.saved_tensors
        return of_scores * grads[0], None


class Injected(torch.autograd.Function):
    """Adds the whole gradient of a balance loss in each backward, whatever the seed."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, balance: Tensor) -> Tensor:
        ctx.save_for_backward(balance)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])


def injected(model: Both, batch: Batch) -> Tensor:
    scores = model(batch)
    return Injected.apply(scores, scores.square().sum()).square().mean()  # type: ignore[no-any-return]


def recomputed(model: Both, batch: Batch) -> Tensor:
    hidden = model.lm.embed(batch["ids"])

    def head(hidden: Tensor) -> Tensor:
        return F.cross_entropy(model.lm.head(hidden).transpose(1, 2), batch["labels"])

    return checkpoint(head, hidden, use_reentrant=True)  # type: ignore[no-any-return]


def dice(model: Both, batch: Batch) -> Tensor:
    p, y = model.conv(batch["image"])[:, 0].sigmoid(), batch["maps"] == 1
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


def hardest(model: Both, batch: Batch) -> Tensor:
    losses = F.cross_entropy(class_scores(model, batch), batch["classes"], reduction="none")
    return losses.topk(len(losses) // 2).values.mean()


def contrastive(model: Both, batch: Batch) -> Tensor:
    hidden = F.normalize(model(batch), dim=-1)
    return F.cross_entropy(hidden[:, 0] @ hidden[:, -1].T / 0.1, torch.arange(len(hidden)))


def halves(model: Both, batch: Batch) -> Tensor:
    chosen, rejected = rewards(model, batch).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def neighbours(model: Both, batch: Batch) -> Tensor:
    scores = rewards(model, batch)
    return -F.logsigmoid(scores[0::2] - scores[1::2]).mean()


def in_prompts(model: Both, batch: Batch) -> Tensor:
    scores, prompts = rewards(model, batch), batch["prompt"]
    centred = [scores[prompts == one] - scores[prompts == one].mean() for one in prompts.unique()]
    return torch.cat(centred).square().sum() / len(scores)


@dataclass(frozen=True)
class Case:
    """A loss, what it is, one line that must be among those printed, and the names that lines may use."""

    loss: Callable[[Both, Batch], Any]
    kind: str
    line: str
    names: Callable[[Both, Batch], Names] = lambda model, batch: {}


def tokens(model: Both, batch: Batch) -> Names:
    return {"output": model(batch).transpose(1, 2), "target": batch["labels"]}


def shifted(model: Both, batch: Batch) -> Names:
    return {"output": model(batch)[:, :-1].transpose(1, 2), "target": batch["labels"][:, 1:]}


def classes(model: Both, batch: Batch) -> Names:
    found = {"output": class_scores(model, batch), "target": batch["classes"]}
    return {**found, "weight": CLASS_WEIGHTS}


def pixels(model: Both, batch: Batch) -> Names:
    return {"output": model.conv(batch["image"]), "target": batch["maps"]}


def summands(*losses: Callable[[Both, Batch], Tensor]) -> Callable[[Both, Batch], Names]:
    def names(model: Both, batch: Batch) -> Names:
        return dict(zip(("first", "second", "third"), (loss(model, batch) for loss in losses), strict=False))

    return names


COUNTED = "return ga.Loss.mean(loss, over=(batch['labels'] != -100).sum())"
SHIFTED = "return ga.Loss.mean(loss, over=(batch['labels'][:, 1:] != -100).sum())"
PIXELS = "return ga.Loss.mean(loss, over=(batch['maps'] != 255).sum())"
MASKED = "return ga.Loss.mean(loss, over=batch['mask'].sum())"
A_SUM = "return ga.Loss.sum(loss)"
TWO = "return {'first': first, 'second': second}\nweights=lambda batch: {'first': "

CASES = {
    # A mean over something else.
    "labels that are not -100": Case(token_mean, "weight", COUNTED, tokens),
    "shifted labels": Case(shifted_mean, "weight", SHIFTED, shifted),
    "pixels that are not 255": Case(of_conv, "weight", PIXELS, pixels),
    "its criterion with options": Case(
        of_conv, "weight", "return ga.criterion(nn.CrossEntropyLoss(ignore_index=255))(output, target)", pixels
    ),
    "an ignored class": Case(
        lambda m, b: F.cross_entropy(class_scores(m, b), b["classes"], ignore_index=8),
        "weight",
        "return ga.Loss.mean(loss, over=(batch['classes'] != 8).sum())",
        classes,
    ),
    "padding by 0": Case(
        lambda m, b: (token_losses(m, b, "ids") * (b["padded"] != 0)).sum() / (b["padded"] != 0).sum() + penalty(m),
        "weight",
        COUNTED,
    ),
    "positive anchors": Case(
        lambda m, b: (token_losses(m, b, "ids")[:, :5] * (b["anchors"] > 0)).sum() / (b["anchors"] > 0).sum(),
        "weight",
        "return ga.Loss.mean(loss, over=(batch['anchors'] >= 1).sum())",
    ),
    "a mask": Case(lambda m, b: masked_sum(m, b) / b["mask"].sum(), "weight", MASKED),
    "a mask, and a factor before it": Case(
        lambda m, b: masked_sum(m, b) / math.log(2) / b["mask"].sum(), "weight", MASKED
    ),
    "a mask, divided by hand": Case(lambda m, b: masked_sum(m, b) * (1 / b["mask"].sum().double()), "weight", MASKED),
    "what a mask leaves out": Case(
        lambda m, b: (token_losses(m, b, "ids") * ~b["mask"]).sum() / (~b["mask"]).sum(),
        "weight",
        "return ga.Loss.mean(loss, over=(~batch['mask']).sum())",
    ),
    "labels under a mask": Case(
        lambda m, b: (token_losses(m, b) * b["mask"]).sum() / (b["mask"] & (b["labels"] != -100)).sum(),
        "weight",
        "return ga.Loss.mean(loss, over=(batch['mask'] * (batch['labels'] != -100)).sum())",
    ),
    "lengths": Case(
        lambda m, b: token_sum(m, b) / b["lengths"].sum(),
        "weight",
        "return ga.Loss.mean(loss, over=batch['lengths'].sum())",
    ),
    "weights of samples": Case(
        lambda m, b: (rewards(m, b) * b["importance"]).sum() / b["importance"].sum(),
        "weight",
        "return ga.Loss.mean(loss, over=batch['importance'].sum())",
    ),
    "class weights": Case(
        lambda m, b: F.cross_entropy(class_scores(m, b), b["classes"], weight=CLASS_WEIGHTS),
        "weight",
        "return ga.criterion(nn.CrossEntropyLoss(weight=weight))(output, target)",
        classes,
    ),
    "class weights, smoothed": Case(
        lambda m, b: criterion_of_classes(class_scores(m, b), b["classes"]),
        "weight",
        "return ga.criterion(nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1))(output, target)",
        classes,
    ),
    "class weights of pixels, some ignored": Case(
        lambda m, b: F.cross_entropy(m.conv(b["image"]), b["maps"], weight=CLASS_WEIGHTS[:3], ignore_index=255),
        "weight",
        "return ga.Loss.mean(loss, over=weight[batch['maps'][batch['maps'] != 255]].sum())",
        lambda m, b: {**pixels(m, b), "weight": CLASS_WEIGHTS[:3]},
    ),
    "class weights by name": Case(
        lambda m, b: criterion_of_classes(class_scores(m, b), b["classes"]),
        "weight",
        "return ga.Loss.mean(loss, over=weight[batch['classes']].sum())",
        classes,
    ),
    "two heads over the same pixels": Case(lambda m, b: of_conv(m, b) + 0.5 * of_conv(m, b), "weight", PIXELS, pixels),
    # Opaque to the graph.
    "autograd.Function": Case(lambda m, b: Fused.apply(m(b), b["labels"]), "weight", COUNTED),
    "nan_to_num": Case(lambda m, b: token_mean(m, b).nan_to_num(), "weight", COUNTED, tokens),
    "where": Case(
        lambda m, b: torch.where(torch.ones((), dtype=torch.bool), token_mean(m, b), 0.0), "weight", COUNTED, tokens
    ),
    "clamped": Case(lambda m, b: token_mean(m, b).clamp(max=1e3), "weight", COUNTED, tokens),
    "checkpointed, reentrant": Case(recomputed, "weight", COUNTED),
    # Sums.
    "a sum": Case(token_sum, "sum", A_SUM),
    "a sum over a fixed number": Case(lambda m, b: token_sum(m, b) / 41, "sum", A_SUM),
    "sums of two terms": Case(lambda m, b: token_sum(m, b) + 0.1 * m(b).square().sum(), "sum", A_SUM),
    "a sum, compiled shape": Case(lambda m, b: token_sum(m, b).nan_to_num(), "sum", A_SUM),
    # Declared, and wrong.
    "declared over elements": Case(
        lambda m, b: ga.Loss.mean(shifted_mean(m, b), over=b["labels"].numel()), "weight", SHIFTED, shifted
    ),
    "declared without the shift": Case(
        lambda m, b: ga.Loss.mean(shifted_mean(m, b), over=(b["labels"] != -100).sum()), "weight", SHIFTED, shifted
    ),
    "declared over tokens, but over samples": Case(
        lambda m, b: ga.Loss.mean(rewards(m, b).mean(), over=b["lengths"].sum()),
        "weight",
        "return ga.Loss.mean(loss, over=len(batch['ids']))",
    ),
    "a sum declared as a mean": Case(
        lambda m, b: ga.Loss.mean(token_sum(m, b), over=(b["labels"] != -100).sum()), "sum", A_SUM
    ),
    "a mean declared as a sum": Case(lambda m, b: ga.Loss.sum(token_mean(m, b)), "weight", COUNTED, tokens),
    "a sum over a total": Case(
        lambda m, b: ga.Loss.sum(token_sum(m, b), over=41), "sum", "return ga.Loss.sum(loss.value)"
    ),
    # Several terms.
    "two means": Case(
        lambda m, b: token_mean(m, b) + aux(m, b),
        "terms",
        f"{TWO}(batch['labels'] != -100).sum(), 'second': len(batch['ids'])}}",
        summands(token_mean, aux),
    ),
    "two means, halved and subtracted": Case(
        lambda m, b: (token_mean(m, b) - aux(m, b)) / 2,
        "terms",
        f"{TWO}(batch['labels'] != -100).sum(), 'second': len(batch['ids'])}}",
        summands(lambda m, b: token_mean(m, b) / 2, lambda m, b: -aux(m, b) / 2),
    ),
    "three: tokens, a router's mask, a penalty": Case(
        lambda m, b: torch.stack([token_mean(m, b), masked_sum(m, b) / b["mask"].sum(), penalty(m)]).sum(),
        "terms",
        "return {'first': first, 'second': second, 'third': third}\nweights=lambda batch: {'first': "
        "(batch['labels'] != -100).sum(), 'second': batch['mask'].sum(), 'third': len(batch['ids'])}",
        summands(token_mean, lambda m, b: masked_sum(m, b) / b["mask"].sum(), lambda m, b: penalty(m)),
    ),
    "a sum and a penalty": Case(
        lambda m, b: token_sum(m, b) + penalty(m),
        "terms",
        "return {'first': ga.Loss.sum(first), 'second': second}\nweights=lambda batch: {'second': len(batch['ids'])}",
        summands(token_sum, lambda m, b: penalty(m)),
    ),
    "by name": Case(
        lambda m, b: {"lm": token_mean(m, b), "aux": aux(m, b)},
        "terms",
        "weights=lambda batch: {'lm': (batch['labels'] != -100).sum(), 'aux': len(batch['ids'])}",
    ),
    "by name, one of them a sum": Case(
        lambda m, b: {"kl": m(b).square().sum(), "aux": aux(m, b)},
        "terms",
        "return {**losses, 'kl': ga.Loss.sum(losses['kl'])}\nweights=lambda batch: {'aux': len(batch['ids'])}",
    ),
    "by name, one declared wrong": Case(
        lambda m, b: {"lm": ga.Loss.mean(token_mean(m, b), over=len(b["ids"])), "aux": aux(m, b)},
        "terms",
        "return {**losses, 'lm': ga.Loss.mean(losses['lm'], over=(batch['labels'] != -100).sum())}\n"
        "weights=lambda batch: {'lm': (batch['labels'] != -100).sum(), 'aux': len(batch['ids'])}",
    ),
    # Groups.
    "pairs in halves": Case(
        halves,
        "groups",
        "split=ga.split_by_samples(groups=lambda batch: torch.arange(len(batch['ids'])) % (len(batch['ids']) // 2))",
    ),
    "pairs of neighbours": Case(
        neighbours, "groups", "split=ga.split_by_samples(groups=lambda batch: torch.arange(len(batch['ids'])) // 2)"
    ),
    "completions of a prompt": Case(
        in_prompts, "groups", "split=ga.split_by_samples(groups=lambda batch: batch['prompt'])"
    ),
}

COUPLED = {
    "Dice": (dice, "batch_loss", "combine"),
    "the hardest half": (hardest, "batch_loss", "forward=forward, batch_loss=batch_loss"),
    "RMSE": (lambda m, b: m(b).square().mean().sqrt(), "batch_loss", 'combine="sum"'),
    "perplexity": (lambda m, b: F.cross_entropy(class_scores(m, b), b["classes"]).exp(), "batch_loss", 'combine="sum"'),
    "samples with a mask": (
        lambda m, b: (rewards(m, b) * b["mask"][:, :2].any(1)).sum() / b["mask"][:, :2].any(1).sum(),
        "weight",
        "over=count",
    ),
    "contrastive": (contrastive, "batch_loss", "forward=forward, batch_loss=batch_loss"),
    "injected gradients": (injected, "unknown", ""),
    "a count of its own": (
        lambda m, b: rewards(m, b) @ b["ids"].double().sin().sum(1).exp() / b["ids"].double().sin().sum(1).exp().sum(),
        "weight",
        "over=count",
    ),
}


def diagnose(
    model: Both, loss: Callable[[Both, Batch], Any], batch: Batch, rows: int = LOOK
) -> tuple[Diagnosis, Exception]:
    """What the check before the first update does: rows together, unequal pieces, and an explanation."""
    parameters = list(model.parameters())

    def run(which: Tensor) -> Run:
        piece = tree.take(batch, which)
        return make_run(
            loss(model, piece), parameters, rows=which, batch=piece, in_full=True, again=lambda: loss(model, piece)
        )

    everything = torch.arange(rows)
    try:
        parts = [run(which) for which in everything.split([5, rows - 5])]
    except (RuntimeError, ValueError):  # odd pairs
        parts = []
    whole = run(everything)
    found = remedies(whole, parts, run, tolerance=TOLERANCE)
    return found, loss_error(whole, parts, found)


def gradient_of(value: Tensor, model: Both) -> Tensor:
    value.backward()  # reentrant checkpoints allow no other way
    return taken(model)


def taken(model: Both) -> Tensor:
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]
    model.zero_grad()
    return torch.cat([one.flatten() for one in found])


def whole_gradient(case: Case, model: Both, batch: Batch) -> Tensor:
    """Of the loss as its author wrote it: of the value that was returned, or of the sum of the terms."""
    loss = case.loss(model, batch)
    terms = loss.values() if isinstance(loss, Mapping) else [loss]
    return gradient_of(sum(one.value if isinstance(one, Loss) else one for one in terms), model)  # type: ignore[arg-type]


def bare(loss: Any) -> Any:
    """What the user's variable holds: the 0-d tensor, but for a sum over something, whose parts the line names."""
    return loss.root if isinstance(loss, Loss) and (loss.is_mean or loss.weight is None) else loss


def accumulated_gradient(case: Case, entry: str, model: Both, batch: Batch) -> Tensor:
    """Trains as the entry says, line by line, and returns the gradient."""
    lines = dict(line.replace("return ", "return=", 1).split("=", 1) for line in entry.split("\n"))
    names = {"ga": ga, "nn": nn, "torch": torch}

    def loss_fn(model: Both, batch: Batch) -> Any:
        loss = case.loss(model, batch)
        if "return" not in lines:
            return loss
        own = {name: bare(one) for name, one in loss.items()} if isinstance(loss, Mapping) else {}
        return eval(
            lines["return"], {**names, **case.names(model, batch), "batch": batch, "loss": bare(loss), "losses": own}
        )

    options: dict[str, Any] = {"micro_batch_size": 4}
    if "weights" in lines:
        options["weights"] = eval(lines["weights"], names)
    if "split" in lines:
        return sum_over_groups(loss_fn, lines["split"], model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ga.TrainStep(model, optimizer, loss_fn, **options).backward(batch)
    return taken(model)


def sum_over_groups(loss_fn: Callable[[Both, Batch], Any], split: str, model: Both, batch: Batch) -> Tensor:
    """A mean over samples, in pieces of whole groups."""
    groups = eval(split.removeprefix("ga.split_by_samples(groups=").removesuffix(")"), {"torch": torch})(batch)
    assert len(groups) == len(batch["ids"])
    pieces = groups.unique().split([1, len(groups.unique()) - 1])
    total = torch.zeros(())
    for ids in pieces:
        rows = torch.isin(groups, ids).nonzero().flatten()
        total = total + len(rows) / len(groups) * gradient_of(loss_fn(model, tree.take(batch, rows)), model)
    return total


@pytest.fixture
def model() -> Iterator[Both]:
    return make_model()  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
def test_each_line_is_right_on_another_batch(name: str, model: Both) -> None:
    case = CASES[name]
    found, error = diagnose(model, case.loss, make_batch())
    assert found.kind == case.kind
    assert case.line in found.instead or not case.line
    assert found.instead
    batch = make_batch()
    if found.kind == "groups":
        batch = {name: value[:12] for name, value in batch.items()}
    expected = whole_gradient(case, model, batch)
    for entry in found.instead:
        off = (accumulated_gradient(case, entry, model, batch) - expected).norm() / expected.norm()
        assert off < RIGHT, entry
        assert entry.split("\n")[0] in str(error)
    assert isinstance(error, ga.MeanError if found.kind in ("sum", "weight", "terms") else ga.LossError)


@pytest.mark.parametrize("name", COUPLED)
def test_nothing_is_printed_as_tried_for_a_loss_that_has_no_such_line(name: str, model: Both) -> None:
    loss, kind, line = COUPLED[name]
    found, error = diagnose(model, loss, make_batch())
    assert (found.kind, found.instead) == (kind, ())
    assert line in " ".join(found.untried)
    assert "Nothing that" in str(error)


def compiled(loss: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    return torch.compile(loss, backend=backend, dynamic=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_mean_is_named_by_what_the_batch_counts(backend: str, model: Both) -> None:
    inside = compiled(lambda m, b: F.cross_entropy(m.head(m.embed(b["ids"])).transpose(1, 2), b["labels"]), backend)
    case = Case(lambda m, b: inside(m.lm, {"ids": b["ids"], "labels": b["labels"]}), "weight", COUNTED)
    found, _ = diagnose(model, case.loss, make_batch())
    assert found.instead[0] == COUNTED
    batch = make_batch()
    expected = whole_gradient(case, model, batch)
    assert (accumulated_gradient(case, COUNTED, model, batch) - expected).norm() < RIGHT * expected.norm()


@pytest.mark.parametrize("again", [True, False])
def test_addends_of_a_compiled_graph_need_the_loss_once_more(again: bool, model: Both) -> None:
    """A compiled backward gives its buffers away, so its graph is run through once."""
    scores_of = compiled(lambda m, ids: m.head(m.embed(ids)).relu().square(), "aot_eager")

    def loss(m: Both, b: Batch) -> Tensor:
        scores = scores_of(m.lm, b["ids"])
        return F.cross_entropy(scores.transpose(1, 2), b["labels"]) + 0.1 * scores.square().mean()

    parameters, batch = list(model.parameters()), make_batch()
    run = make_run(
        loss(model, batch),
        parameters,
        rows=torch.arange(ROWS),
        batch=batch,
        in_full=True,
        again=(lambda: loss(model, batch)) if again else None,
    )
    term = run.terms[""]
    if again:
        added = sum(one.gradient.vector for one in term.addends)
        assert (added - term.gradient.vector).norm() < RIGHT * term.gradient.vector.norm()  # type: ignore[operator]
    else:
        assert not term.addends


def test_batches_of_other_shapes_are_named_as_they_nest(model: Both) -> None:
    batch = make_batch()

    def loss(m: Both, b: Any) -> Tensor:
        ids, rest = b
        return F.cross_entropy(m.lm(ids).transpose(1, 2), rest["y"])

    parameters = list(model.parameters())
    nested = (batch["ids"], {"y": batch["labels"]})

    def run(rows: Tensor) -> Run:
        piece = tree.take(nested, rows)
        return make_run(loss(model, piece), parameters, rows=rows, batch=piece, in_full=True)

    rows = torch.arange(LOOK)
    found = remedies(run(rows), [run(one) for one in rows.split([5, 3])], run, tolerance=TOLERANCE)
    assert found.instead[0] == "return ga.Loss.mean(loss, over=(batch[1]['y'] != -100).sum())"


def test_in_single_precision(model: Both) -> None:
    single = model.float()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in make_batch().items()}
    parameters = list(single.parameters())
    scores = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def run(rows: Tensor) -> Run:
        piece = tree.take(batch, rows)
        hidden = scores(single.lm.embed(piece["ids"]))
        loss = F.cross_entropy(single.lm.head(hidden).transpose(1, 2), piece["labels"])
        return make_run(loss, parameters, rows=rows, batch=piece, in_full=True)

    rows = torch.arange(LOOK)
    found = remedies(run(rows), [run(one) for one in rows.split([5, 3])], run, tolerance=1e-4)
    assert found.instead[0] == COUNTED


def test_a_piece_without_labels_counts_for_nothing(model: Both) -> None:
    batch = make_batch()
    batch["labels"][5:8] = -100  # the second piece's mean is NaN
    found, _ = diagnose(model, token_mean, batch)
    assert found.instead[0] == COUNTED


def test_counts_that_are_the_same_on_these_rows_are_all_named(model: Both) -> None:
    batch = make_batch()
    batch["other"] = batch["labels"].clone()
    batch["other"][LOOK:] = -100
    found, _ = diagnose(model, token_mean, batch)
    assert {COUNTED, COUNTED.replace("labels", "other")} <= set(found.instead)


def test_a_loss_that_is_right_is_not_explained_away(model: Both) -> None:
    found, _ = diagnose(model, aux, make_batch())
    assert (found.kind, found.instead) == ("state", ())
    assert "from the same state" in found.what


def test_runs_leave_no_gradient_behind(model: Both) -> None:
    before = [torch.randn_like(one) for one in model.parameters()]
    for parameter, grad in zip(model.parameters(), before, strict=True):
        parameter.grad = grad
    for loss in (token_mean, recomputed):
        batch = make_batch()
        for writes_grad in (False, True):
            loss_of_batch = loss(model, batch)
            make_run(
                loss_of_batch, list(model.parameters()), rows=torch.arange(ROWS), batch=batch, writes_grad=writes_grad
            )
    assert all(one.grad is grad for one, grad in zip(model.parameters(), before, strict=True))


def test_the_message_has_the_numbers(model: Both) -> None:
    _, error = diagnose(model, token_mean, make_batch())
    text = str(error)
    assert isinstance(error, ga.MeanError)
    assert "for 8 samples together" in text
    assert "pieces of 5 and 3" in text
    assert "taken as a mean over samples" in text
    assert f"this was tried and is right, any one of:\n    {COUNTED}\n" in text
    assert text.endswith("\n    return ga.criterion(nn.CrossEntropyLoss())(output, target)")


def test_a_loss_of_pairs_without_pieces_says_so(model: Both) -> None:
    _, error = diagnose(model, neighbours, make_batch())
    assert "cannot be computed for a piece" in str(error)
    assert not isinstance(error, ga.MeanError)
