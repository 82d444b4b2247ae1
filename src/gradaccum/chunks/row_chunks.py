r"""The rows of the last layer in chunks, each with its own forward and backward.

Accumulation over samples ends at one sample, and a large vocabulary does not fit even then: 4,096 tokens times 128,000
classes are 2 GiB of logits, and the loss makes three tensors of that size. But the loss of a row depends on that row
alone, so rows are cut like samples are: a chunk of them runs forward and, at once, backward; then its logits are gone.

The backward of a chunk needs the gradient of the batch's loss by the chunk's sum, which is known only when the window
is. It is one number s for all rows, and gradients are linear in it:

    dL / dW  =  s * sum over chunks of  d(sum of the chunk's losses) / dW

So the sums are made for a seed of 1 while the forward runs, and multiplied by s in the backward. What is kept from the
forward to the backward is a gradient for ``hidden`` and one for each leaf that ``loss_of_rows`` uses; for several terms
(a dict) these once for each term, since each has a seed of its own.

Leaves are found from the graphs of the chunks. Both they and ``hidden`` are inputs of one autograd function, so that
for everything outside (DDP, FSDP2, hooks, tied weights, fused gradients) these are gradients like any other.

Sources: Liger Kernel's fused linear cross entropy (Hsu et al. 2024, arXiv 2410.10989) for the backward inside of the
forward; torch 2.13's ``F.linear_cross_entropy(options=)`` does the same for cross entropy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from gradaccum.chunks.chunk_gradients import ChunkGradients
from gradaccum.chunks.row_order import Ignored, RowOrder, ignored_by
from gradaccum.errors import BatchError, LossError, UnsupportedError, WindowError
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normaliser import SINGLE
from gradaccum.types import HALF_DTYPES

LossOfRows = Callable[..., Any]


def chunked(loss_of_rows: LossOfRows, hidden: Tensor, *targets: Tensor, size: int = 1024) -> Any:
    """Computes a loss over rows in chunks, with one chunk's logits alive at a time.

    The gradients are those of ``loss_of_rows`` over all rows at once, for everything that it uses: a head, tied or not,
    with LoRA or not. The backward of each chunk runs inside of this call, and not at all under ``torch.no_grad()``.
    Rows whose label a loss of ``ga.criterion`` ignores are left out; finding them waits for the device once.

    Args:
        loss_of_rows: ``loss_of_rows(hidden_rows, *target_rows)`` returns a `Loss` (``ga.criterion(...)(...)`` makes
            one) or a dict of them. A row's loss may depend on that row alone: that is not checked. Terms of a dict
            have gradients of their own, each of the head's size; ``ce + 1e-4 * z`` of two losses over the same rows
            has one.
        hidden: [..., features], what the last layer gets.
        targets: tensors whose first dimensions are those of ``hidden`` but its last.
        size: rows in a chunk.

    Returns:
        A `Loss` whose root is a sum, in fp32 for bf16 and fp16; or a dict of them.

    Raises:
        BatchError: a target does not have the leading shape of ``hidden``.
        LossError: ``loss_of_rows`` returned no `Loss`, so what its mean is over is unknown.
        UnsupportedError: a hook is put on the logits, or something is used that was computed before; in the backward,
            that it is differentiated again or run twice.
        WindowError: ``size`` is below 1.

    Example:
        >>> head, hidden, labels = nn.Linear(8, 50), torch.randn(4, 7, 8), torch.randint(50, (4, 7))
        >>> criterion = ga.criterion(nn.CrossEntropyLoss())
        >>> loss = ga.chunked(lambda rows, labels: criterion(head(rows), labels), hidden, labels, size=16)
        >>> loss.weight
        tensor(28)
    """
    return in_chunks(loss_of_rows, hidden, targets, size=size)


def in_chunks(
    loss_of_rows: LossOfRows, hidden: Tensor, targets: Sequence[Tensor], *, size: int, ignored: Ignored | None = None
) -> Any:
    """`chunked`, where it may be known before which rows add nothing."""
    _check_arguments(hidden, targets, size)
    num_dims = hidden.dim() - 1
    run = _Run(loss_of_rows, [_as_rows(tensor, num_dims) for tensor in (hidden, *targets)], (hidden, *targets))
    # Hooks on saved tensors (checkpoints, offloading) are for graphs that live until the backward. These do not.
    with _no_saved_tensor_hooks():
        order = RowOrder(run.rows[1:], len(run.rows[0]), size, ignored)
        while (rows := order.next()) is not None:
            order.learn(run.chunk(rows))
    return run.result()


def _check_arguments(hidden: Any, targets: Sequence[Any], size: int) -> None:
    if type(size) is not int or size < 1:
        raise WindowError(
            f"size={size!r}: a chunk has at least 1 row, so size is an int from 1. 1024 suits most heads."
        )
    if not isinstance(hidden, Tensor) or hidden.dim() == 0 or not hidden.is_floating_point():
        what = f"{hidden.dtype} of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise BatchError(
            f"hidden is {what}. It is what the last layer gets, a floating-point tensor [..., features]; without "
            "features there are no rows to cut, and no gradient to hand back."
        )
    leading = hidden.shape[:-1]
    for i, target in enumerate(targets):
        if not isinstance(target, Tensor) or target.shape[: len(leading)] != leading:
            shown = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else f"a {type(target).__name__}"
            raise BatchError(
                f"Target {i} has {shown}, and hidden the shape {tuple(hidden.shape)}: rows would be paired with "
                f"other rows' targets. A target begins with {tuple(leading)}; what is the same for all rows goes into "
                "loss_of_rows itself."
            )


def _as_rows(tensor: Tensor, num_dims: int) -> Tensor:
    flat = tensor.detach()
    return flat.reshape(-1, *flat.shape[num_dims:]) if num_dims != 1 else flat


@dataclass(slots=True)
class _Term:
    """What the chunks of one term have added up to."""

    total: Tensor
    weight: Weight | None
    gradients: ChunkGradients
    of_rows: list[Tensor | None]  # by input; None where no gradient is wanted


class _Run:
    """The chunks of one call."""

    def __init__(self, loss_of_rows: LossOfRows, rows: list[Tensor], given: Sequence[Tensor]) -> None:
        self.rows = rows
        self._loss_of_rows = loss_of_rows
        self._given = given
        self._has_graph = torch.is_grad_enabled()
        self._wanted = [self._has_graph and tensor.requires_grad for tensor in given]
        self._terms: dict[str, _Term] = {}
        self._is_mapping = False

    def chunk(self, at: slice | Tensor) -> Ignored | None:
        """Runs one chunk, and returns which label its loss is known to ignore."""
        rows = [tensor[at] for tensor in self.rows]
        for i, is_wanted in enumerate(self._wanted):
            if is_wanted:
                rows[i] = rows[i].detach().requires_grad_()
        begun: int = torch.autograd._get_sequence_nr()
        with _HooksRefused():
            returned = self._loss_of_rows(*rows)
        losses = _checked_losses(returned)
        if self._terms and losses.keys() != self._terms.keys():
            raise LossError(
                f"loss_of_rows returned {list(losses)} for one chunk and {list(self._terms)} for another, so their "
                "sums have no common weight. Return every term for every chunk: ga.Loss.sum(zero, over=0) where one "
                "has nothing."
            )
        self._is_mapping = isinstance(returned, Mapping)
        waiting = list(losses)
        # Operations of the backward run in the dtype of their forward; under autocast they would be cast once more.
        with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            for name, loss in losses.items():
                waiting.remove(name)
                self._add(name, loss, rows, at, begun, keeps_graph=bool(waiting))
        return ignored_by(losses.values(), rows[1:])

    def _add(
        self, name: str, loss: Loss, rows: list[Tensor], at: slice | Tensor, begun: int, *, keeps_graph: bool
    ) -> None:
        seed, root = _seed(loss), loss.root.detach()
        total = root * seed if seed else torch.zeros_like(root)
        total = total.float() if total.dtype in HALF_DTYPES else total
        term = self._terms.get(name)
        if term is None:
            # Rows that are left out get no gradient: zero.
            of_rows = [
                torch.zeros_like(tensor) if is_wanted else None
                for tensor, is_wanted in zip(self.rows, self._wanted, strict=True)
            ]
            term = self._terms[name] = _Term(total, loss.weight, ChunkGradients(), of_rows)
        else:
            term.total = term.total + total
            term.weight = _sum_of_weights(term.weight, loss.weight)
        if not loss.root.requires_grad:
            return
        wanted = [i for i, is_wanted in enumerate(self._wanted) if is_wanted]
        found = term.gradients.add(loss.root, seed, [rows[i] for i in wanted], begun=begun, keeps_graph=keeps_graph)
        for i, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                of_rows = term.of_rows[i]
                assert of_rows is not None
                of_rows[at] = gradient

    def result(self) -> Any:
        """The losses, in the structure that ``loss_of_rows`` returned."""
        leaves = list(dict.fromkeys(leaf for term in self._terms.values() for leaf in term.gradients.leaves))
        totals = [term.total for term in self._terms.values()]
        if self._has_graph and (leaves or any(self._wanted)):
            held = [
                [
                    *(
                        None if rows is None else rows.view(given.shape)
                        for rows, given in zip(term.of_rows, self._given, strict=True)
                    ),
                    *(term.gradients.take(leaf) for leaf in leaves),
                ]
                for term in self._terms.values()
            ]
            totals = _HandOver.apply(_Held(held), totals, *self._given, *leaves)  # type: ignore[no-untyped-call]
        losses = {
            name: Loss(total, term.weight, is_mean=False)
            for (name, term), total in zip(self._terms.items(), totals, strict=True)
        }
        return losses if self._is_mapping else losses[SINGLE]


def _checked_losses(returned: Any) -> dict[str, Loss]:
    losses = dict(returned) if isinstance(returned, Mapping) else {SINGLE: returned}
    for name, loss in losses.items():
        if not isinstance(loss, Loss):
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            where = f" for the term {name!r}" if name else ""
            raise LossError(
                f"loss_of_rows returned {what}{where}, of which it is unknown what its mean is over, so chunks of "
                "unequal weight would count alike. Return a ga.Loss: ga.criterion(nn.CrossEntropyLoss())(logits, "
                "labels), or ga.Loss.sum(losses.sum(), over=losses.numel())."
            )
    if not losses:
        raise LossError("loss_of_rows returned an empty dict, so there is nothing to learn from. Return one term.")
    return losses


def _seed(loss: Loss) -> float:
    """What makes a chunk's loss the sum over its rows; a weight on a device is waited for where that is a mean."""
    if not loss.is_mean or loss.weight is None:
        return 1.0
    return loss.weight.item() if isinstance(loss.weight, Tensor) else float(loss.weight)


def _sum_of_weights(one: Weight | None, other: Weight | None) -> Weight | None:
    if one is None or other is None:
        if one is not other:
            raise LossError(
                "loss_of_rows returned a sum without `over` for one chunk, and a loss that has a weight for another: "
                "they have no common weight. Return the same kind for every chunk: ga.Loss.sum(total, over=n)."
            )
        return None
    return one + other


class _HooksRefused(TorchFunctionMode):
    """Lets no hook be put on a tensor of a chunk, whose gradient is not what the hook would be told."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook or func is Tensor.retain_grad:
            where = getattr(args[1], "__module__", "") if len(args) > 1 else ""
            if where.startswith("torch.distributed.fsdp"):
                raise UnsupportedError(
                    "loss_of_rows runs a module that fully_shard was called on. Each chunk would gather its parameters "
                    "anew, and ranks with other numbers of chunks would wait for each other for ever. Write "
                    "ga.criterion(nn.CrossEntropyLoss(), head=model.lm_head), which gathers a head once, or leave the "
                    "head to the fully_shard of the whole model."
                )
            if not where.startswith("torch."):
                raise UnsupportedError(
                    f"loss_of_rows called {func.__name__}() on a tensor of {tuple(args[0].shape)}. Its gradient would "
                    "be one chunk's, for the sum of that chunk's losses and not for the batch's mean. Put hooks on "
                    "hidden or on parameters, which get the whole gradient."
                )
        return func(*args, **(kwargs or {}))


class _Held:
    """Gradients for seeds of 1, from the forward to the one backward; for each term those of all inputs."""

    def __init__(self, gradients: list[list[Tensor | None]]) -> None:
        self._gradients: list[list[Tensor | None]] | None = gradients

    def take_one(self, i: int) -> Tensor | None:
        """Takes the gradient of an input out, of the only term."""
        if self._gradients is None:
            return None  # the backward itself will say that it has run before
        (gradients,) = self._gradients
        gradient, gradients[i] = gradients[i], None
        return gradient

    def take(self) -> list[list[Tensor | None]]:
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            raise UnsupportedError(
                "The backward of a chunked loss ran a second time. Its logits are gone since the forward, and its "
                "gradients were handed on by the first backward. Call ga.chunked again, or add the losses up and run "
                "one backward: retain_graph=True cannot keep them."
            )
        return gradients


class _HandOver(Function):
    """Sums of losses, and their gradients as made before."""

    @staticmethod
    def forward(ctx: Any, held: _Held, totals: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.held = held
        ctx.take_gradient = held.take_one  # for `gradients.fused`, which adds it where the window adds up
        ctx.set_materialize_grads(False)
        return tuple(total.clone() for total in totals)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "A chunked loss was differentiated with create_graph=True. Its gradients were made in the forward, "
                "chunk by chunk, and have no graph of their own, so second derivatives would be missing. Compute the "
                "loss over all rows at once for a gradient penalty."
            )
        by_term: list[list[Tensor | None]] = ctx.held.take()
        found: list[Tensor | None] = []
        for i in range(len(by_term[0])):
            total: Tensor | None = None
            for gradients, seed in zip(by_term, seeds, strict=True):
                gradient, gradients[i] = gradients[i], None
                if gradient is None or seed is None or not ctx.needs_input_grad[i + 2]:
                    continue
                part = gradient.mul_(seed.to(gradient.device))
                total = part if total is None else total.add_(part)
            found.append(total)
        return None, None, *found


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    aside: list[Any] = []
    while (hooks := autograd._top_saved_tensors_default_hooks(False)) is not None:
        aside.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(aside):
            autograd._push_saved_tensors_default_hooks(*hooks)
