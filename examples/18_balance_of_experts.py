"""A mixture of experts whose load is balanced over the whole batch, by two processes and in micro-batches.

    torchrun --nproc-per-node 2 examples/18_balance_of_experts.py

The balance of Switch, Mixtral and Qwen-MoE is  E sum_e f_e P_e , with f_e the share of tokens that go to expert e and
P_e its mean probability. It is a product of two means, and a mean over micro-batches of such products is another loss:
it wants every micro-batch balanced, whatever is in it. But f and P are made of sums over tokens, and these add up, over
micro-batches and over processes: ``combine="sum"``. For models of transformers, ``ga.balance_over_batch(model)`` is
`routing_sums` and `balanced_loss`.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradaccum as ga

EXPERTS, TOP, COEFFICIENT = 4, 2, 0.1


class MixtureOfExperts(nn.Module):
    """Returns logits and the router's probabilities, of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, EXPERTS)
        experts = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)) for _ in range(EXPERTS))
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        routed = self.router(tokens).softmax(-1)
        gates = torch.zeros_like(routed).scatter(1, routed.topk(TOP).indices, 1.0) * routed
        mixed = sum((gates[:, [e]] * expert(tokens) for e, expert in enumerate(self.experts)), torch.zeros(()))
        return mixed, routed


def routing_sums(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What the loss is made of: sums over tokens."""
    x, y = batch
    logits, routed = model(x)
    return {
        "loss": F.cross_entropy(logits, y.flatten(), reduction="sum"),
        "tokens": logits.new_tensor(len(logits)),
        "chosen": F.one_hot(routed.topk(TOP).indices, EXPERTS).sum((0, 1)).to(routed),
        "probability": routed.sum(0),
    }


def balanced_loss(sums: dict[str, Tensor], batch: object = None) -> Tensor:
    """Of whatever was summed."""
    share, probability = sums["chosen"] / sums["tokens"], sums["probability"] / sums["tokens"]
    return sums["loss"] / sums["tokens"] + COEFFICIENT * EXPERTS * (share * probability).sum()


dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.randn(23, 5, 8) + torch.randn(23, 1, 8)  # each text is about something, so its tokens like the same experts
y = x[..., :3].argmax(-1)
model = MixtureOfExperts()
whole, naive = copy.deepcopy(model), copy.deepcopy(model)

wrapped = DistributedDataParallel(model)
step = ga.TrainStep(
    wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1),
    forward=routing_sums, batch_loss=balanced_loss, combine="sum", micro_batch_size=4,
)  # fmt: skip
share = slice(rank, None, world_size)  # 12 and 11 texts
update = step((x[share], y[share]))

# The whole batch at once, by one process in plain torch.
loss = balanced_loss(routing_sums(whole, (x, y)))
loss.backward()
torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-12, atol=1e-14)
exact = torch.cat([p.grad.flatten() for p in whole.parameters()])
with torch.no_grad():
    for p in whole.parameters():
        p -= 0.1 * p.grad
for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)

# The textbook loop balances each micro-batch.
for part in zip(x.split(4), y.split(4), strict=True):
    (balanced_loss(routing_sums(naive, part)) / 6).backward()
off = torch.cat([p.grad.flatten() for p in naive.parameters()]) - exact
if rank == 0:
    print(f"loss {float(update.loss):.4f} over {update.samples} texts on {world_size} processes")
    print("the update equals the whole batch's to 1e-12")
    print(f"the textbook loop's gradient is off by {off.norm() / exact.norm():.0%}")
dist.destroy_process_group()
