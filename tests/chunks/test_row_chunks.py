"""Chunks against all rows at once, in float64."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from gradaccum.gradients.fused.backward import FusedBackward
from gradaccum.gradients.fused.choice import choice_of
from gradaccum.gradients.graph import read_graph
from gradaccum.memory.live_bytes import LiveBytes
from oracle import EXACT, SINGLE

FEATURES, CLASSES = 8, 211  # a prime, and a head that is large enough to be added up in place
LEADING = (4, 13)
SIZES = [1, 7, 16, 52, 1000]
IGNORED = -100


class LoRA(nn.Module):
    """A frozen head and two small matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.down = nn.Linear(FEATURES, 3, bias=False)
        self.up = nn.Linear(3, CLASSES, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + 2 * self.up(self.down(hidden))


class Tied(nn.Module):
    """Embeds, and multiplies with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, FEATURES)

    def trunk(self, ids: Tensor) -> Tensor:
        return self.table(ids).tanh()

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.table.weight)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, CLASSES),
    "no bias": lambda: nn.Linear(FEATURES, CLASSES, bias=False),
    "two layers": lambda: nn.Sequential(
        nn.Linear(FEATURES, 600), nn.GELU(), nn.LayerNorm(600), nn.Linear(600, CLASSES)
    ),
    "LoRA": LoRA,
    "used twice": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), Twice()),
    "tied": Tied,
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, CLASSES)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.one(hidden) + self.one(hidden.square())


def make_labels(leading: tuple[int, ...] = LEADING, *, ignored: int | None = IGNORED) -> Tensor:
    labels = torch.randint(CLASSES, leading)
    if ignored is not None:
        labels.view(-1)[::3] = ignored
    return labels


def cross_entropy(**options: Any) -> Callable[..., ga.Loss]:
    criterion = ga.criterion(nn.CrossEntropyLoss(**options))
    return lambda head, hidden, labels: criterion(head(hidden).flatten(0, -2), labels.flatten())


def distillation(head: nn.Module, hidden: Tensor, teacher: Tensor) -> ga.Loss:
    losses = F.kl_div(head(hidden).log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    return ga.Loss.sum(losses.sum(), over=teacher[..., 0].numel())


def preference(head: nn.Module, hidden: Tensor, labels: Tensor, reference: Tensor) -> ga.Loss:
    """Log-probabilities, weighed token by token, as the gradient of DPO and GRPO does."""
    log_probs = -F.cross_entropy(head(hidden).flatten(0, -2), labels.flatten(), reduction="none")
    ratio = (log_probs - reference.flatten()).exp().clamp(0.5, 2)
    return ga.Loss.mean(-ratio.mean(), over=len(log_probs))


def with_z(head: nn.Module, hidden: Tensor, labels: Tensor) -> dict[str, ga.Loss]:
    logits = head(hidden).flatten(0, -2)
    squares = logits.logsumexp(-1).square()
    return {
        "ce": ga.criterion(nn.CrossEntropyLoss())(logits, labels.flatten()),
        "z": 1e-2 * ga.Loss.sum(squares.sum(), over=len(squares)),
    }


Case = tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]
LOSSES: dict[str, Case] = {
    "ignored labels": (cross_entropy(), lambda: (make_labels(),)),
    "another label is ignored": (cross_entropy(ignore_index=5), lambda: (make_labels(ignored=5),)),
    "smoothing": (cross_entropy(label_smoothing=0.2), lambda: (make_labels(),)),
    "class weights": (cross_entropy(weight=torch.rand(CLASSES).double()), lambda: (make_labels(),)),
    "a sum": (cross_entropy(reduction="sum"), lambda: (make_labels(),)),
    "class probabilities": (cross_entropy(), lambda: (torch.rand(*LEADING, CLASSES).softmax(-1),)),
    "distillation": (distillation, lambda: (torch.randn(*LEADING, CLASSES),)),
    "log-probabilities": (preference, lambda: (make_labels(ignored=None), torch.randn(LEADING) - 5)),
    "z-loss": (with_z, lambda: (make_labels(),)),
}
LOSSES["class probabilities"] = (
    lambda head, hidden, target: ga.criterion(nn.CrossEntropyLoss())(
        head(hidden).flatten(0, -2), target.flatten(0, -2)
    ),
    LOSSES["class probabilities"][1],
)


@pytest.fixture(autouse=True)
def in_double() -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def gradients(losses: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """With another seed for each term."""
    losses = losses if isinstance(losses, dict) else {"": losses}
    total = torch.stack([(0.37 + i) * loss.value for i, loss in enumerate(losses.values())]).sum()
    return list(torch.autograd.grad(total, inputs))


def assert_close(found: Any, wanted: Any, tolerance: float = EXACT) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str, size: int) -> None:
    loss, make_targets = LOSSES[name]
    head, hidden, targets = HEADS["linear"](), torch.randn(*LEADING, FEATURES, requires_grad=True), make_targets()
    inputs = [hidden, *head.parameters()]
    whole = loss(head, hidden, *targets)
    # Rows come with one dimension in front.
    chunks = ga.chunked(lambda rows, *of_rows: loss(head, rows, *of_rows), hidden, *targets, size=size)
    if isinstance(whole, dict):
        assert list(chunks) == list(whole)
    for one, other in zip(
        chunks.values() if isinstance(whole, dict) else [chunks],
        whole.values() if isinstance(whole, dict) else [whole],
        strict=True,
    ):
        assert (one.weight is None) == (other.weight is None)
        if one.weight is not None and other.weight is not None:
            assert float(one.weight) == pytest.approx(float(other.weight), rel=EXACT)
        assert_close([one.value], [other.value])
    assert_close(gradients(chunks, inputs), gradients(whole, inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", HEADS)
def test_every_head(name: str, size: int) -> None:
    head: Any = HEADS[name]()
    labels = make_labels()
    start = torch.randint(CLASSES, LEADING) if name == "tied" else torch.randn(*LEADING, FEATURES, requires_grad=True)
    inputs = [parameter for parameter in head.parameters() if parameter.requires_grad]
    inputs += [] if name == "tied" else [start]
    loss = cross_entropy()

    def hidden() -> Tensor:
        return head.trunk(start) if name == "tied" else start * 2

    chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden(), labels, size=size)
    assert_close(gradients(chunks, inputs), gradients(loss(head, hidden(), labels), inputs))


def test_ignored_rows_are_never_run() -> None:
    head, labels, seen = nn.Linear(FEATURES, CLASSES), make_labels(), list[int]()
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    hidden, loss = torch.randn(*LEADING, FEATURES), cross_entropy()
    ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=16)
    assert sum(seen) == (labels != IGNORED).sum()
    seen.clear()
    ga.chunked(lambda rows, labels: with_z(head, rows, labels), hidden, labels, size=16)
    assert sum(seen) == labels.numel()  # the second term counts them
    seen.clear()
    ga.chunked(lambda rows, labels: loss(head, rows, labels) * 2, hidden, labels, size=16)
    assert sum(seen) == labels.numel()  # what was made of a loss is not looked into


@pytest.mark.parametrize("leading", [(0,), (3, 0), (1,), ()])
@pytest.mark.parametrize("all_ignored", [True, False])
def test_hardly_any_rows(leading: tuple[int, ...], all_ignored: bool) -> None:
    head, hidden = nn.Linear(FEATURES, CLASSES), torch.randn(*leading, FEATURES, requires_grad=True)
    labels = torch.full(leading, IGNORED) if all_ignored else torch.randint(CLASSES, leading)
    loss = ga.criterion(nn.CrossEntropyLoss())
    found = ga.chunked(lambda rows, labels: loss(head(rows), labels), hidden, labels, size=5)
    assert found.weight == (0 if all_ignored else labels.numel())
    wanted = loss(head(hidden.reshape(-1, FEATURES)), labels.reshape(-1)).total
    inputs = [hidden, *head.parameters()]
    assert_close(torch.autograd.grad(found.total, inputs), torch.autograd.grad(wanted, inputs))


def test_a_mean_over_nothing_adds_nothing() -> None:
    head, hidden, mask = nn.Linear(FEATURES, 1), torch.randn(12, FEATURES, requires_grad=True), torch.zeros(12)
    mask[:3] = 1

    def loss(rows: Tensor, mask: Tensor) -> ga.Loss:
        return ga.Loss.mean((head(rows).squeeze(1).square() * mask).sum() / mask.sum(), over=mask.sum())

    inputs = [hidden, *head.parameters()]
    for size in (3, 5, 12):
        chunks = ga.chunked(loss, hidden, mask, size=size)
        assert_close(gradients(chunks, inputs), gradients(loss(hidden, mask), inputs))


def test_targets_get_gradients_too() -> None:
    head, hidden = nn.Linear(FEATURES, 5), torch.randn(12, FEATURES, requires_grad=True)
    other = torch.randn(12, 5, requires_grad=True)

    def loss(rows: Tensor, other: Tensor) -> ga.Loss:
        return ga.Loss.sum((head(rows) * other).square().sum(), over=len(rows))

    inputs = [hidden, other, *head.parameters()]
    assert_close(gradients(ga.chunked(loss, hidden, other, size=5), inputs), gradients(loss(hidden, other), inputs))


@pytest.mark.parametrize("frozen", ["trunk", "head", "both"])
def test_frozen(frozen: str) -> None:
    head, hidden, labels = nn.Linear(FEATURES, CLASSES), torch.randn(*LEADING, FEATURES), make_labels()
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "trunk")
    loss = cross_entropy()
    chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=16)
    inputs = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    if frozen == "both":
        assert not chunks.root.requires_grad
        assert_close([chunks.value], [loss(head, hidden, labels).value])
    else:
        assert_close(gradients(chunks, inputs), gradients(loss(head, hidden, labels), inputs))


def test_without_gradients_no_backward_is_run() -> None:
    head, hidden, labels = (
        nn.Linear(FEATURES, CLASSES),
        torch.randn(*LEADING, FEATURES, requires_grad=True),
        make_labels(),
    )
    loss = cross_entropy()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=16)
            assert not chunks.root.requires_grad
        assert_close([chunks.value], [loss(head, hidden, labels).value])


@pytest.mark.parametrize(("where", "reentrant"), [("around", True), ("around", False), ("within", False)])
def test_checkpoints(where: str, reentrant: bool) -> None:
    head, hidden, labels = HEADS["two layers"](), torch.randn(*LEADING, FEATURES, requires_grad=True), make_labels()
    loss, inputs = cross_entropy(), [hidden, *head.parameters()]
    again = functools.partial(checkpoint, use_reentrant=reentrant)

    def of_rows(rows: Tensor, labels: Tensor) -> ga.Loss:
        return loss(functools.partial(again, head) if where == "within" else head, rows, labels)

    def total(hidden: Tensor) -> Tensor:
        return ga.chunked(of_rows, hidden.sin(), labels, size=16).total

    (again(total, hidden) if where == "around" else total(hidden)).backward()
    found = [tensor.grad for tensor in inputs]
    assert_close(found, torch.autograd.grad(loss(head, hidden.sin(), labels).total, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adds_up_in_fp32(dtype: torch.dtype) -> None:
    head = nn.Linear(FEATURES, CLASSES).to(dtype)
    hidden = torch.randn(600, FEATURES).to(dtype).requires_grad_()
    labels, loss = make_labels((600,)), cross_entropy()
    wide = copy.deepcopy(head).double()
    wide_hidden = hidden.detach().double().requires_grad_()
    wanted = gradients(loss(wide, wide_hidden, labels), [wide_hidden, *wide.parameters()])
    chunks = ga.chunked(lambda rows, labels: loss(lambda x: head(x).float(), rows, labels), hidden, labels, size=3)
    assert chunks.root.dtype == torch.float32
    found = gradients(chunks, [hidden, *head.parameters()])
    assert [one.dtype for one in found] == [dtype] * 3
    # One rounding to the dtype at the end, and those of one chunk: not of 200 sums.
    tolerance = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_autocast() -> None:
    head = nn.Linear(FEATURES, CLASSES, dtype=torch.float32)
    hidden = torch.randn(*LEADING, FEATURES, dtype=torch.float32, requires_grad=True)
    labels, loss, inputs = make_labels(), cross_entropy(), [hidden, *head.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=16)
        whole = loss(head, hidden, labels)
    wanted = gradients(whole, inputs)
    found = gradients(chunks, inputs)
    assert [one.dtype for one in found] == [torch.float32] * 3
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 2**-7 * other.norm()  # bf16 has 8 bits


def test_dropout_is_drawn_once_a_chunk() -> None:
    head, hidden = nn.Linear(FEATURES, 1, bias=False), torch.randn(64, FEATURES, requires_grad=True)

    def loss(rows: Tensor) -> ga.Loss:
        return ga.Loss.sum(head(F.dropout(rows, 0.5)).sum(), over=len(rows))

    chunks = ga.chunked(loss, hidden, size=8)
    by_rows, by_head = torch.autograd.grad(chunks.root, [hidden, head.weight])
    drawn = by_rows / head.weight  # 0 or 2: the same for the value, the head's gradient and the rows'
    assert_close([(drawn * hidden).sum(0, keepdim=True)], [by_head])
    assert_close([(drawn * hidden * head.weight).sum()], [chunks.root])


class TestHooks:
    def test_a_hook_on_a_parameter_sees_the_whole_gradient_once(self) -> None:
        head, hidden, labels = nn.Linear(FEATURES, CLASSES), torch.randn(*LEADING, FEATURES), make_labels()
        loss, seen = cross_entropy(), list[Tensor]()
        wanted = gradients(loss(head, hidden, labels), [head.weight])

        def hook(gradient: Tensor) -> Tensor:
            seen.append(gradient.clone())
            return 3 * gradient

        head.weight.register_hook(hook)
        chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=16)
        assert not seen
        (0.37 * chunks.value).backward()
        assert len(seen) == 1
        assert_close(seen, wanted)
        assert head.weight.grad is not None
        assert_close([head.weight.grad], [3 * wanted[0]])

    @pytest.mark.parametrize("how", ["register_hook", "retain_grad", "full backward hook"])
    def test_on_logits(self, how: str) -> None:
        head, hidden, labels = nn.Linear(FEATURES, CLASSES), torch.randn(*LEADING, FEATURES), make_labels()
        if how == "full backward hook":
            head.register_full_backward_hook(lambda *_: None)

        def loss(rows: Tensor, labels: Tensor) -> ga.Loss:
            logits = head(rows)
            if how == "register_hook":
                logits.register_hook(lambda gradient: gradient)
            if how == "retain_grad":
                logits.retain_grad()
            return ga.criterion(nn.CrossEntropyLoss())(logits, labels)

        with pytest.raises(ga.UnsupportedError, match="chunk"):
            ga.chunked(loss, hidden, labels, size=16)


class TestRefused:
    def make(self) -> tuple[ga.Loss, Tensor]:
        head, hidden = nn.Linear(FEATURES, CLASSES), torch.randn(*LEADING, FEATURES, requires_grad=True)
        loss = cross_entropy()
        return ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, make_labels()), hidden

    def test_a_second_backward(self) -> None:
        chunks, _ = self.make()
        chunks.total.backward(retain_graph=True)
        with pytest.raises(ga.UnsupportedError, match=r"a second time.*Call ga.chunked again"):
            chunks.total.backward()

    def test_a_second_derivative(self) -> None:
        chunks, hidden = self.make()
        with pytest.raises(ga.UnsupportedError, match="create_graph=True"):
            torch.autograd.grad(chunks.total, hidden, create_graph=True)

    def test_what_was_computed_before(self) -> None:
        head, hidden = nn.Linear(FEATURES, CLASSES), torch.randn(8, FEATURES)
        temperature = nn.Parameter(torch.zeros(()))
        scale, criterion, labels = temperature.exp(), ga.criterion(nn.CrossEntropyLoss()), make_labels((8,))
        with pytest.raises(ga.UnsupportedError, match=r"ExpBackward0.*Compute it inside of loss_of_rows"):
            ga.chunked(lambda rows, labels: criterion(head(rows) * scale, labels), hidden, labels, size=4)

        def inside(rows: Tensor, labels: Tensor) -> ga.Loss:
            return criterion(head(rows) * temperature.exp(), labels)

        inputs = [temperature, *head.parameters()]
        found = gradients(ga.chunked(inside, hidden, labels, size=3), inputs)
        assert_close(found, gradients(inside(hidden, labels), inputs))

    def test_a_reentrant_checkpoint_within(self) -> None:
        head, hidden, labels = nn.Linear(FEATURES, CLASSES), torch.randn(8, FEATURES), make_labels((8,))
        criterion = ga.criterion(nn.CrossEntropyLoss())

        def loss(rows: Tensor, labels: Tensor) -> ga.Loss:
            return criterion(checkpoint(head, rows, use_reentrant=True), labels)

        with pytest.raises(ga.UnsupportedError, match="use_reentrant=False"):
            ga.chunked(loss, hidden.requires_grad_(), labels)

    def test_arguments(self) -> None:
        hidden = torch.randn(4, 3, FEATURES)
        with pytest.raises(ga.WindowError, match="size=0"):
            ga.chunked(lambda rows: rows, hidden, size=0)
        with pytest.raises(ga.BatchError, match=r"Target 0 has shape \(3, 4\)"):
            ga.chunked(lambda rows, labels: rows, hidden, torch.zeros(3, 4))
        with pytest.raises(ga.BatchError, match=r"hidden is torch\.int64"):
            ga.chunked(lambda rows: rows, torch.zeros(3, 4, dtype=torch.long))
        with pytest.raises(ga.LossError, match=r"a tensor of shape \(\).*Return a ga.Loss"):
            ga.chunked(lambda rows: rows.sum(), hidden)

    def test_terms_that_change(self) -> None:
        hidden = torch.randn(10, FEATURES, requires_grad=True)

        def loss(rows: Tensor) -> dict[str, ga.Loss]:
            return {("full" if len(rows) == 4 else "short"): ga.Loss.sum(rows.sum(), over=len(rows))}

        with pytest.raises(ga.LossError, match=r"\['short'\] for one chunk and \['full'\]"):
            ga.chunked(loss, hidden, size=4)


def test_one_chunk_is_alive_at_a_time() -> None:
    classes, features, rows, size = 4099, 16, 1024, 64
    head = nn.Linear(features, classes, bias=False, dtype=torch.float32)
    hidden = torch.randn(rows, features, dtype=torch.float32, requires_grad=True)
    labels, criterion = torch.randint(classes, (rows,)), ga.criterion(nn.CrossEntropyLoss())

    def peak(run: Callable[[], Any]) -> int:
        with LiveBytes() as live:
            result = run()
            del result
        return live.peak

    def of_rows(rows: Tensor, labels: Tensor) -> ga.Loss:
        return criterion(head(rows), labels)

    def by_itself() -> Any:
        return torch.autograd.grad(of_rows(hidden[:size], labels[:size]).total, [hidden, head.weight])

    def chunks() -> Any:
        return torch.autograd.grad(ga.chunked(of_rows, hidden, labels, size=size).total, [hidden, head.weight])

    gradient = 4 * (head.weight.numel() + hidden.numel())
    assert peak(chunks) <= 1.1 * peak(by_itself) + gradient
    assert peak(chunks) < peak(lambda: torch.autograd.grad(of_rows(hidden, labels).total, [hidden, head.weight])) / 3


def test_in_single_precision() -> None:
    head, hidden, labels = (
        nn.Linear(FEATURES, CLASSES),
        torch.randn(*LEADING, FEATURES, requires_grad=True),
        make_labels(),
    )
    loss = cross_entropy()
    wanted = gradients(loss(head, hidden, labels), [hidden, *head.parameters()])
    head.float()
    hidden = hidden.detach().float().requires_grad_()
    chunks = ga.chunked(lambda rows, labels: loss(head, rows, labels), hidden, labels, size=7)
    found = gradients(chunks, [hidden, *head.parameters()])
    assert_close([one.double() for one in found], wanted, SINGLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_added_where_the_window_adds_up(dtype: torch.dtype) -> None:
    """In one pass, with the factor of the backward; what has several factors is left to torch."""
    torch.manual_seed(0)
    head, criterion = nn.Linear(8, 50, bias=False).to(dtype), ga.criterion(nn.CrossEntropyLoss())
    head.weight.grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, labels = torch.randn(3, 7, 8, dtype=dtype), torch.randint(50, (3, 7))
    fused = FusedBackward([head.weight], choice_of(True))  # type: ignore[arg-type]
    rows, expected = hidden.double(), head.weight.detach().double().requires_grad_()
    for factor in (1.0, 0.5, 3.0):
        loss = ga.chunked(lambda rows, labels: criterion(head(rows), labels), hidden, labels, size=4)
        before = head.weight.grad
        graph = read_graph([loss.root])
        plan = fused.plan([loss.root], None, graph)
        assert plan is not None
        assert list(plan.in_place) == [head.weight]
        assert fused.run((loss.root,), (torch.full_like(loss.root, factor),), None, graph)
        assert before is None or head.weight.grad is before
        whole = F.cross_entropy((rows @ expected.t()).flatten(0, 1), labels.flatten(), reduction="sum")
        (factor * whole).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == head.weight.grad_dtype
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (0.05, 0.1)
    torch.testing.assert_close(head.weight.grad.double(), expected.grad, rtol=rtol, atol=atol)
    terms = ga.chunked(
        lambda rows, labels: {"a": criterion(head(rows), labels), "b": criterion(head(rows), labels)},
        hidden, labels, size=4,
    )  # fmt: skip
    assert fused.plan([term.root for term in terms.values()], None, read_graph([terms["a"].root])) is None
