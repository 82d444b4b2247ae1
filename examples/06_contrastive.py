"""A contrastive loss over 240 images on the memory of 16: every image is compared with all others of the batch.

The textbook loop compares each image with the 15 others of its micro-batch only. That is another loss, whatever it is
divided by. `forward` and `batch_loss` give the whole batch's.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

MICRO_BATCH_SIZE = 16

Batch = dict[str, Tensor]


def make_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 5 * 5, 32),
    )


class Alignment(nn.Module):
    """Khosla et al. 2020: drawings of one character are to be alike. The temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))

    def forward(self, vectors: Tensor, batch: Batch) -> Tensor:
        itself = torch.eye(len(vectors), dtype=torch.bool)
        similar = (vectors @ vectors.T / self.log_temperature.exp()).masked_fill(itself, -torch.inf)
        alike = (batch["character"][:, None] == batch["character"]) & ~itself
        return -(similar.log_softmax(dim=1)[alike]).mean()


def encode(encoder: nn.Module, batch: Batch) -> Tensor:
    return F.normalize(encoder(batch["image"]), dim=1)


def pictures(path: Path) -> Tensor:
    """24 Greek characters by 20 drawers, 28 x 28 bits each."""
    packed = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(7, -1, -1)) & 1
    return bits.reshape(24, 20, 1, 28, 28).to(torch.get_default_dtype())


torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # a model this small gains nothing from more
torch.manual_seed(0)
images = pictures(Path(__file__).parent / "data" / "omniglot_greek.bits")
characters = torch.arange(24)[:, None].expand(24, 10)
batch = {"image": images[:, :10].flatten(0, 1), "character": characters.flatten()}

encoder, alignment = make_encoder(), Alignment()
naive_encoder, (whole_encoder, whole_alignment) = copy.deepcopy(encoder), copy.deepcopy((encoder, alignment))

optimizer = torch.optim.SGD([*encoder.parameters(), *alignment.parameters()], lr=0.1)
train_step = ga.TrainStep(
    encoder, optimizer, forward=encode, batch_loss=alignment, micro_batch_size=MICRO_BATCH_SIZE, kept_graphs=5
)
torch.manual_seed(1)
update = train_step(batch)
print(f"{update.samples} images in {update.micro_batches} micro-batches: loss {float(update.loss):.4f}")

# The same on the whole batch, in plain torch: micro-batches for the random numbers' sake only, all graphs kept.
torch.manual_seed(1)
pieces = [{"image": part} for part in batch["image"].split(MICRO_BATCH_SIZE)]
loss = whole_alignment(torch.cat([encode(whole_encoder, piece) for piece in pieces]), batch)
loss.backward()
torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-12, atol=1e-14)

# The textbook loop: in alphabetical order most of a micro-batch is one character, and it has hardly any negatives.
torch.manual_seed(1)
for rows in torch.arange(len(batch["image"])).split(MICRO_BATCH_SIZE):
    piece = {name: value[rows] for name, value in batch.items()}
    (alignment(encode(naive_encoder, piece), piece) / len(pieces)).backward()

naive = torch.cat([p.grad.flatten() for p in naive_encoder.parameters() if p.grad is not None])
exact = torch.cat([p.grad.flatten() for p in whole_encoder.parameters() if p.grad is not None])
print(f"the textbook loop's gradient is off by {(naive - exact).norm() / exact.norm():.0%}")

with torch.no_grad():
    for parameter in [*whole_encoder.parameters(), *whole_alignment.parameters()]:
        if parameter.grad is not None:
            parameter -= 0.1 * parameter.grad
ours = nn.utils.parameters_to_vector([*encoder.parameters(), *alignment.parameters()]).detach()
whole = nn.utils.parameters_to_vector([*whole_encoder.parameters(), *whole_alignment.parameters()]).detach()
torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
print("the update equals the whole batch's to 1e-12, dropout included")
