"""Gradients added up in place by hand: what a loop takes that makes torch's own products, and does nothing else.

Linear layers and embeddings of a copy of the model add their weights' gradients to memory that is kept from update to
update: one GEMM with beta = 1 each, 0 in the first micro-batch, or the rows that were looked up. It is what could be
had by writing the layers anew, and shows what there is to be had at all.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _loops import Job
from _timing import Loop
from torch import Tensor, nn
from torch.autograd import Function


class Sum:
    """The gradient of one weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight.detach()
        self.total = torch.zeros_like(weight)
        self.is_empty = True

    def add_product(self, left: Tensor, right: Tensor) -> None:
        self.total.addmm_(left, right, beta=0 if self.is_empty else 1)
        self.is_empty = False

    def add_rows(self, places: Tensor, rows: Tensor) -> None:
        if self.is_empty:
            self.total.zero_()
        self.total.index_add_(0, places.flatten(), rows.flatten(0, -2))
        self.is_empty = False


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, into: Sum) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x)
        return F.linear(x, into.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,), gradient = ctx.saved_tensors, gradients[0]
        flat = gradient.flatten(0, -2)
        ctx.into.add_product(flat.t(), x.flatten(0, -2))
        return gradient @ ctx.into.weight, flat.sum(0) if ctx.needs_input_grad[1] else None, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, places: Tensor, into: Sum) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(places)
        return F.embedding(places, into.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.into.add_rows(*ctx.saved_tensors, gradients[0])
        return None, None, None


def by_hand(job: Job, rows: int | None = None) -> Loop:
    """The textbook loop with such layers.

    Args:
        job: what is trained; SGD without momentum.
        rows: of a micro-batch, where not as the job is cut.
    """
    job = job if rows is None else job.cut(rows)
    rate = job.optimizer.param_groups[0]["lr"]
    model = copy.deepcopy(job.model)
    sums: dict[nn.Parameter, Sum] = {}
    start = torch.zeros((), requires_grad=True)  # a function is run backward only where something asks for a gradient
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            into = sums.setdefault(module.weight, Sum(module.weight))
            forward = partial(_linear, module.bias) if isinstance(module, nn.Linear) else partial(_embedding, start)
            module.forward = partial(forward, into)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def update() -> None:
        for micro_batch in job.micro_batches:
            loss = job.loss_fn(model, micro_batch) / len(job.micro_batches)
            loss.backward()
        for weight, into in sums.items():
            weight.grad, into.is_empty = into.total, True
        optimizer.step()
        optimizer.zero_grad()

    update.model = model  # type: ignore[attr-defined]
    return update


def _linear(bias: Tensor | None, into: Sum, x: Tensor) -> Any:
    return _Linear.apply(x, bias, into)


def _embedding(start: Tensor, into: Sum, places: Tensor) -> Any:
    return _Embedding.apply(start, places, into)
