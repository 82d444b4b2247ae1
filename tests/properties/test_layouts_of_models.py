"""Models of Hugging Face in the layouts of their own collators, made from a config: TrainStep is the whole batch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.auditing.in_double import InDouble  # these models compute in fp32 here and there

transformers = pytest.importorskip("transformers")

EXACT = 1e-12
IMAGE = 90
VOCABULARY = 100
sizes = pytest.mark.parametrize("size", [1, 2, "auto"])


def gradient(model: nn.Module) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def check(model: nn.Module, loss_fn: Any, batch: Any, size: Any, split: ga.Split, *, samples: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=size, split=split)
    with InDouble():
        loss_fn(model, batch).value.backward()
        right = gradient(model)
        for _ in range(2):
            step.backward(batch)
            found = gradient(model)
            assert float((found - right).norm() / right.norm()) < EXACT
    update = step(batch)
    assert update.samples == samples
    if size != "auto":
        assert update.micro_batches > 1


def tokens_of(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != -100).sum()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


@sizes
def test_packed_by_the_flattening_collator(size: Any) -> None:
    model = llama()
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
    batch = dict(collate([{"input_ids": torch.randint(3, 90, (n,)).tolist()} for n in (9, 4, 13, 2, 7)]))

    def loss_fn(model: Any, batch: Any) -> ga.Loss:
        return ga.Loss.mean(model(**batch, use_cache=False).loss, over=tokens_of(batch["labels"]))

    check(model, loss_fn, batch, size, ga.split_packed(), samples=5)


IMAGES_OF = [1, 0, 2, 1, 0]  # images of each sample
GRIDS = [(1, 4, 4), (1, 4, 8), (1, 4, 4), (1, 8, 4)]


def vision_language() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2,
                       "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3},
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    grids, rows = iter(GRIDS), []
    for images in IMAGES_OF:
        row = torch.randint(3, 80, (4,)).tolist()
        for _ in range(images):
            t, h, w = next(grids)
            row += [92, *[IMAGE] * (t * h * w // 4), 93]
        rows.append(torch.tensor([*row, *torch.randint(3, 80, (3,)).tolist()]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill((ids == 0) | (ids >= IMAGE), -100),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(sum(t * h * w for t, h, w in GRIDS), 12, dtype=torch.float64),
        "image_grid_thw": torch.tensor(GRIDS),
    }
    return transformers.Qwen2VLForConditionalGeneration(config).double(), batch


def images_of(batch: Any) -> Tensor:
    return (batch["input_ids"] == 92).sum(1)


def patches_of(batch: Any) -> Tensor:
    patches = batch["image_grid_thw"].prod(1).split(images_of(batch).tolist())
    return torch.stack([each.sum() for each in patches])


def vision_language_loss(model: Any, batch: Any) -> ga.Loss:
    given = {name: value for name, value in batch.items() if len(value)}  # samples without an image have no patches
    return ga.Loss.mean(model(**given, use_cache=False).loss, over=tokens_of(batch["labels"]))


@sizes
def test_zero_to_two_images_a_sample(size: Any) -> None:
    model, batch = vision_language()
    split = ga.split_by_samples(axes={"pixel_values": patches_of, "image_grid_thw": images_of})
    check(model, vision_language_loss, batch, size, split, samples=5)


@sizes
def test_images_packed_by_cost(size: Any) -> None:
    model, batch = vision_language()
    axes = {"pixel_values": patches_of, "image_grid_thw": images_of}
    split = ga.split_by_cost(lambda batch: batch["attention_mask"].sum(1), 40, axes=axes)
    check(model, vision_language_loss, batch, size, split, samples=5)


def log_likelihood(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def preference(model: Any, batch: Any) -> ga.Loss:
    chosen, rejected = log_likelihood(model, batch).chunk(2)
    losses = -F.logsigmoid(0.1 * (chosen - rejected))
    return ga.Loss.mean(losses.mean(), over=len(losses))


def pair_of(batch: Any) -> Tensor:
    return torch.arange(len(batch["input_ids"]) // 2).repeat(2)


def preference_batch() -> dict[str, Tensor]:
    """Chosen rows first, then the rejected ones, as TRL's collator lays them out."""
    rows = [torch.randint(3, 90, (n,)) for n in (9, 5, 7, 12, 6, 8, 8, 5, 10, 7)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask * (torch.arange(ids.shape[1]) > 2)}


@sizes
def test_preferences(size: Any) -> None:
    check(llama(), preference, preference_batch(), size, ga.split_by_samples(groups=pair_of), samples=10)


@sizes
def test_preferences_by_trls_own_collator(size: Any) -> None:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    collate = trainer.DataCollatorForPreference(pad_token_id=0)
    parts = ("prompt", "chosen", "rejected")
    examples = [{f"{part}_ids": torch.randint(3, 90, (n + i,)).tolist() for i, part in enumerate(parts)}
                for n in (3, 5, 4, 6, 2)]  # fmt: skip
    batch = collate(examples)
    if "completion_mask" not in batch:
        pytest.skip("another layout than [chosen; rejected]")
    check(llama(), preference, batch, size, ga.split_by_samples(groups=pair_of), samples=10)


@sizes
def test_group_relative_advantages(size: Any) -> None:
    prompts, completions = 3, 3
    rows = [torch.randint(3, 90, (n,)) for n in (9, 5, 7, 12, 6, 8, 8, 5, 10)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (ids != 0).long()
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": mask * (torch.arange(ids.shape[1]) > 2),
        "rewards": torch.randn(len(rows), dtype=torch.float64),
        "prompt": torch.arange(prompts).repeat_interleave(completions),
    }

    def loss_fn(model: Any, batch: Any) -> ga.Loss:
        rewards = batch["rewards"].reshape(-1, completions)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        return ga.Loss.sum(
            -(log_likelihood(model, batch) * advantages.flatten()).sum(), over=batch["completion_mask"].sum()
        )

    check(llama(), loss_fn, batch, size, ga.split_by_samples(groups=lambda batch: batch["prompt"]), samples=9)
