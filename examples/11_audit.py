"""Is it exact for me? `ga.audit` names what is not, and is silent once that is mended.

A training script as it is found in the wild: BatchNorm, a mean over the labels that count, dropout, a scale drawn once
for each forward. The audit tells which of these matter, and by how much.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.testing import assert_exact

torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small gains nothing from more
inputs = torch.randn(24, 12)
labels = inputs[:, :4].argmax(dim=1)
labels[inputs[:, 5] > 0.8] = -100  # not labelled
batch = inputs, labels


def network(normalisation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), normalisation, nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = micro_batch
    share = torch.distributions.Beta(0.4, 0.4).sample()
    return F.cross_entropy(model(x * (0.5 + share / 2)), y)


report = ga.audit(network(nn.BatchNorm1d(32)), loss_fn, batch, micro_batch_size=8)
print(report)
assert not report.exact
assert {(culprit.kind, culprit.where) for culprit in report.culprits} == {
    ("batch-norm", "1"),
    ("loss-weight", "the loss"),
    ("random", "the loss"),
}

# What the report says to type: another normalisation, a loss that knows its count, a draw for each sample.
criterion = ga.criterion(nn.CrossEntropyLoss())


def exact_loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> ga.Loss:
    x, y = micro_batch
    shares = torch.rand(len(x), 1)
    return criterion(model(x * (0.5 + shares / 2)), y)


report = assert_exact(network(nn.GroupNorm(4, 32)), exact_loss_fn, batch, micro_batch_size=8)
print(report)

# Dropout is still there: it draws another mask, which is another sample of the same noise, and no mistake.
assert report.exact
assert report.relative_error < 1e-12
