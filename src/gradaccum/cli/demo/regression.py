"""The textbook experiment: a linear regression whose batch of 40 is accumulated from 10 x 4.

It is how gradient accumulation is usually shown to work: mean-squared error, plain SGD, no shuffling, and the epoch
losses printed side by side. With 1,000 samples everything divides evenly, and the textbook loop is indeed right.

The published losses (0.54340577, 0.19144142, 0.06752514) are sums of batch means divided by 1,000 samples, a fortieth
of the means that are shown here; with 23 batches of 40 and one of 37 such a sum would no longer be a mean of anything.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradaccum.cli.demo.task import Task

_TRUE_WEIGHT = (-2.0, 3.4)
_TRUE_BIAS = 4.2
_NOISE = 0.01
_SEED = 0  # the published experiment does not give its own, so its digits are out of reach; the setting is the same


def regression_task(num_samples: int, *, title: str, text: str) -> Task:
    """``y = -2 x1 + 3.4 x2 + 4.2 + 0.01 noise``, all of ``x1``, ``x2`` and noise standard normal."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(num_samples, 2, generator=generator)
    y = x @ torch.tensor(_TRUE_WEIGHT) + _TRUE_BIAS + _NOISE * torch.randn(num_samples, generator=generator)
    return Task(
        title=title,
        text=text,
        unit="samples",
        model=_linear_from_zeros,
        dataset=TensorDataset(x, y[:, None]),
        criterion=nn.MSELoss(),
        count=len,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        batch_size=40,
        micro_batch_size=10,
        epochs=3,
    )


def _linear_from_zeros() -> nn.Module:
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model
