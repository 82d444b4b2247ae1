"""Preference pairs (DPO): a batch is [chosen; rejected], and a pair must not be cut apart.

Cut at index 0, the first micro-batch would have chosen answers only, and its loss would compare them with each other,
without a message. `groups=` says which samples stay together.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

PAIRS, LENGTH, WORDS = 11, 6, 20
policy = nn.Sequential(nn.Embedding(WORDS, 8), nn.Flatten(), nn.Linear(8 * LENGTH, 1))
reference = copy.deepcopy(policy).requires_grad_(False)
batches = [{"input_ids": torch.randint(WORDS, (2 * PAIRS, LENGTH))} for _ in range(4)]


def dpo_loss(policy: nn.Module, batch: dict[str, Tensor]) -> ga.Loss:
    """Rafailov et al. 2023, equation 7; the score of an answer stands in for its log-likelihood."""
    gain = (policy(batch["input_ids"]) - reference(batch["input_ids"])).squeeze(1)
    chosen, rejected = gain.chunk(2)
    losses = -F.logsigmoid(0.1 * (chosen - rejected))
    return ga.Loss.mean(losses.mean(), over=len(losses))


def pair_of(batch: dict[str, Tensor]) -> Tensor:
    """Row i and row i + PAIRS have the same number."""
    return torch.arange(len(batch["input_ids"]) // 2).repeat(2)


# The whole batch.
whole = copy.deepcopy(policy)
optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
for batch in batches:
    optimizer.zero_grad()
    dpo_loss(whole, batch).value.backward()
    optimizer.step()

# At most 8 rows at a time, which are 4 pairs: 11 pairs in 4 + 4 + 3.
train_step = ga.TrainStep(
    policy,
    torch.optim.SGD(policy.parameters(), lr=0.5),
    dpo_loss,
    micro_batch_size=8,
    split=ga.split_by_samples(groups=pair_of),
)
for batch in batches:
    update = train_step(batch)
    print(
        f"update {update.index}: loss {float(update.loss):.5f}, {update.samples} rows in {update.micro_batches} pieces"
    )

for ours, theirs in zip(policy.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
print("equal to the whole batch to 1e-12")
