"""What the check before the first update is told of a step, whose class lies above it.

The check itself is imported when it is due: training does not wait for it at ``import gradaccum``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradaccum.types import Split
from gradaccum.whole_batch.runners import RunnerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class StepToCheck:
    """What is looked at: a `TrainStep` without the class.

    Attributes:
        models: all modules, also those of the loss.
        model: what the user's functions are called with.
        optimizers: whose parameters are trained.
        options: how micro-batches are run.
        split: how a batch is cut.
        coupled_batch_norms: finds the names of layers that see the micro-batch, of which is warned elsewhere.
    """

    models: Sequence[nn.Module]
    model: Any
    optimizers: Sequence[Optimizer]
    options: RunnerOptions
    split: Split
    coupled_batch_norms: Callable[[], Sequence[str]]

    @property
    def functions(self) -> list[Any]:
        """The user's functions."""
        options = self.options
        return [options.loss_fn, options.forward, options.batch_loss, options.weights]
