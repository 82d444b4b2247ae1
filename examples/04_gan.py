"""Two models, two optimizers, one pass: a GAN with one accumulator for each optimizer.

`d_accumulator.over(g_accumulator.over(loader))` lets both follow the same pass over the data. Each writes the gradients
of its own model only, although the generator's loss goes through the discriminator.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
angles = 2 * torch.pi * torch.rand(190)
real = torch.stack([angles.cos(), angles.sin()], dim=1)  # points on a circle
noise = torch.randn(190, 4)
data = TensorDataset(real, noise)  # noise belongs to the sample, so that it is the same however samples are grouped


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def losses(generator: nn.Module, discriminator: nn.Module, real: Tensor, noise: Tensor) -> Iterator[Tensor]:
    """The generator's loss and the discriminator's, both from before either is updated."""
    fake = generator(noise)
    yield F.softplus(-discriminator(fake)).mean()
    yield (F.softplus(-discriminator(real)) + F.softplus(discriminator(fake.detach()))).mean()


generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
whole_generator, whole_discriminator = copy.deepcopy(generator), copy.deepcopy(discriminator)

# Accumulation: batches of 32 from micro-batches of 8; the last batch has 30 samples.
g_accumulator = ga.Accumulator(generator, make_optimizer(generator), batch_size=32)
d_accumulator = ga.Accumulator(discriminator, make_optimizer(discriminator), batch_size=32)
for epoch in range(3):
    loader = DataLoader(data, batch_size=8)
    for real, noise in d_accumulator.over(g_accumulator.over(loader)):
        g_loss, d_loss = losses(generator, discriminator, real, noise)
        g_update = g_accumulator.backward(g_loss)
        d_update = d_accumulator.backward(d_loss)
    print(f"epoch {epoch}: generator {float(g_update.loss):.4f}, discriminator {float(d_update.loss):.4f}")

# The same on whole batches, in plain torch.
g_optimizer, d_optimizer = make_optimizer(whole_generator), make_optimizer(whole_discriminator)
for _ in range(3):
    for real, noise in DataLoader(data, batch_size=32):
        g_loss, d_loss = losses(whole_generator, whole_discriminator, real, noise)
        g_optimizer.zero_grad()
        g_loss.backward()
        d_optimizer.zero_grad()  # the generator's loss went through the discriminator, and left gradients in it
        d_loss.backward()
        g_optimizer.step()
        d_optimizer.step()

for model, whole in ((generator, whole_generator), (discriminator, whole_discriminator)):
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
print("both equal to the whole batch to 1e-12")
