"""BatchNorm of the whole batch: a residual network in micro-batches, its running statistics too.

With `batch_norm="exact"` the micro-batches of a batch run side by side and meet at every BatchNorm. Without it each is
normalised by itself, which is another network; how far off that is, is printed.
"""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def distance(model: nn.Module) -> float:
    ours, theirs = (nn.utils.parameters_to_vector(one.parameters()) for one in (model, whole))
    return ((ours - theirs).norm() / theirs.norm()).item()


start = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1),
    nn.Sequential(*[Block(8) for _ in range(3)]),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
)
batches = [(torch.randn(rows, 3, 8, 8), torch.randint(0, 5, (rows,))) for rows in (26, 26, 26, 11)]

# The whole batch, in plain torch.
whole = copy.deepcopy(start)
optimizer = make_optimizer(whole)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(whole, batch).backward()
    optimizer.step()

# Each micro-batch by itself: what accumulation does elsewhere.
model = copy.deepcopy(start)
train_step = ga.TrainStep(model, make_optimizer(model), loss_fn, micro_batch_size=4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ga.BatchNormWarning)
    for batch in batches:
        train_step(batch)
print(f"micro-batches by themselves: off by {distance(model):.1%}")
assert distance(model) > 0.01

# Exactly the whole batch's, wherever the activations wait.
for activations in ("device", "host", "recompute"):
    model = copy.deepcopy(start)
    train_step = ga.TrainStep(
        model, make_optimizer(model), loss_fn, micro_batch_size=4, batch_norm="exact", activations=activations
    )
    for batch in batches:
        update = train_step(batch)
    print(f"exact, activations on {activations!r}: off by {distance(model):.0e}, loss {float(update.loss):.4f}")
    for ours, theirs in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
print("equal to the whole batch to 1e-10, running statistics too")
