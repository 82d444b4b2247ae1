"""Accelerate's documented loop, word for word, with one line more: a mean over unequal numbers of labels is exact.

+accelerator = exact(accelerator)
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

try:
    from accelerate import Accelerator
except ImportError:
    print("needs accelerate: pip install '.[accelerate]'")
    raise SystemExit from None

from gradaccum.integrations import exact

torch.manual_seed(0)
x = torch.randn(37, 7, 5)
labels = torch.randint(0, 3, (37, 7)).where(torch.arange(7) < torch.randint(1, 8, (37, 1)), -100)
start = nn.Linear(5, 3)


def loss_of(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten())


def trained(*, is_exact: bool) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    if is_exact:
        accelerator = exact(accelerator)
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(TensorDataset(x, labels), batch_size=5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for micro_batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, *micro_batch))
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


model = copy.deepcopy(start)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for rows in (slice(0, 20), slice(20, 37)):  # whole batches of 20 and 17
    loss_of(model, x[rows], labels[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()

for name, is_exact in (("stock", False), ("exact", True)):
    print(f"{name}: weights off by {(trained(is_exact=is_exact).weight - model.weight).norm():.1e}")
torch.testing.assert_close(trained(is_exact=True).weight, model.weight)
