"""Vision and language: every sample has text and 0 to 2 images, whose patches lie one after another.

`pixel_values` has a row for each patch of the whole batch, `image_grid` one for each image (Qwen2-VL's layout). `axes=`
says how many of them belong to each sample, counted in the text, where every image leaves a token.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

WORDS, IMAGE, WIDTH = 30, 29, 8


class VisionLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(12, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        embedded = self.words(batch["input_ids"])
        sizes = batch["image_grid"].prod(1).tolist()
        if sizes:  # each image token becomes the mean of its image's patches
            images = torch.stack([image.tanh().mean(0) for image in self.patches(batch["pixel_values"]).split(sizes)])
            embedded = embedded.masked_scatter((batch["input_ids"] == IMAGE)[..., None], images)
        return self.head(embedded.cumsum(1))


def make_batch() -> dict[str, Tensor]:
    ids = torch.randint(29, (7, 9))
    for sample, images in enumerate([1, 0, 2, 1, 0, 2, 1]):
        ids[sample, :images] = IMAGE
    grid = torch.randint(1, 5, (7, 2))
    return {"input_ids": ids, "image_grid": grid, "pixel_values": torch.randn(int(grid.prod(1).sum()), 12)}


def images_of(batch: dict[str, Tensor]) -> Tensor:
    return (batch["input_ids"] == IMAGE).sum(1)


def patches_of(batch: dict[str, Tensor]) -> Tensor:
    of_images = batch["image_grid"].prod(1).split(images_of(batch).tolist())
    return torch.stack([sizes.sum() for sizes in of_images])


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> ga.Loss:
    labels = batch["input_ids"][:, 1:].masked_fill(batch["input_ids"][:, 1:] == IMAGE, -100)
    losses = F.cross_entropy(model(batch)[:, :-1].transpose(1, 2), labels, reduction="sum")
    return ga.Loss.sum(losses, over=(labels != -100).sum())


model = VisionLanguage()
batches = [make_batch() for _ in range(4)]

# The whole batch.
whole = copy.deepcopy(model)
optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(whole, batch).value.backward()
    optimizer.step()

# Two or three samples at a time, each with its own images and patches.
train_step = ga.TrainStep(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    loss_fn,
    micro_batch_size=3,
    split=ga.split_by_samples(axes={"pixel_values": patches_of, "image_grid": images_of}),
)
for batch in batches:
    update = train_step(batch)
    print(f"update {update.index}: loss {float(update.loss):.5f}, {update.samples} samples, {update.weight} tokens")

for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
print("equal to the whole batch to 1e-12")
