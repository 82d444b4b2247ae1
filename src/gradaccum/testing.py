"""For your own test suite: a training step that stops being exact fails a test, and the message says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from gradaccum.audit_model import audit
from gradaccum.auditing.audit_report import Report


def assert_exact(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    micro_batch_size: int = 8,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    batch_loss: Callable[[Any, Any], Any] | None = None,
    combine: Literal["concat", "sum"] = "concat",
    weights: Callable[[Any], Any] | None = None,
) -> Report:
    """Asserts that accumulation makes the whole batch's update. The arguments are those of `audit`.

    Returns:
        The report, for further assertions.

    Raises:
        InexactError: accumulation makes another update. It is an AssertionError, and its message is the report.

    Example:
        >>> from gradaccum.testing import assert_exact
        >>> def loss_fn(model, micro_batch):
        ...     x, y = micro_batch
        ...     return F.mse_loss(model(x), y)
        >>> report = assert_exact(nn.Linear(3, 1), loss_fn, (torch.randn(12, 3), torch.randn(12, 1)))
    """
    __tracebackhide__ = True
    report = audit(
        model,
        loss_fn,
        batch,
        micro_batch_size,
        forward=forward,
        batch_loss=batch_loss,
        combine=combine,
        weights=weights,
    )
    report.raise_if_inexact()
    return report
