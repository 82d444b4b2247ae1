"""Models that nobody here wrote, from a configuration and without weights: BERT, GPT-2, ResNet, CLIP."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradaccum as ga

transformers = pytest.importorskip("transformers")

ROWS, WORDS, CLASSES = 10, 50, 3
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {**TINY, "vocab_size": WORDS, "max_position_embeddings": 16}


def own_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def text() -> dict[str, Tensor]:
    ids = torch.randint(5, WORDS, (ROWS, 7))
    lengths = 3 + torch.arange(ROWS) % 5
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}


def labels() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def test_bert_is_exact() -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=CLASSES)).train()
    report = ga.audit(model, own_loss, {**text(), "labels": labels()}, 4)
    assert report.exact, str(report)  # dropout and all
    assert report.relative_error < 1e-12


def test_gpt_2_is_a_mean_over_labels_that_its_loss_does_not_tell() -> None:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    batch = text()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    [culprit] = ga.audit(model, own_loss, batch, 4).culprits
    assert (culprit.kind, culprit.where) == ("loss-weight", "the loss")
    assert culprit.remedy == "return ga.Loss.mean(loss, over=(micro_batch['labels'][:, 1:] != -100).sum())"

    def told(model: Any, micro_batch: Any) -> ga.Loss:
        return ga.Loss.mean(model(**micro_batch).loss, over=(micro_batch["labels"][:, 1:] != -100).sum())

    assert ga.audit(model, told, batch, 4).exact


def test_resnet_has_batch_norms_and_each_is_named() -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    model = transformers.ResNetForImageClassification(config).train()
    report = ga.audit(model, own_loss, {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": labels()}, 4)
    expected = {name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert len(expected) > 4
    assert {culprit.where for culprit in report.culprits} == expected
    assert {culprit.kind for culprit in report.culprits} == {"batch-norm"}
    model.eval()
    assert ga.audit(model, own_loss, {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": labels()}, 4).exact


def clip() -> Any:
    config = transformers.CLIPConfig(
        text_config={**SMALL, "bos_token_id": 1, "eos_token_id": 3},
        vision_config={**TINY, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).train()


def images_and_text() -> dict[str, Tensor]:
    return {"input_ids": text()["input_ids"], "pixel_values": torch.randn(ROWS, 3, 8, 8)}


def test_clip_compares_samples() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(**batch, return_loss=True).loss

    report = ga.audit(clip(), loss_fn, images_and_text(), 4)
    assert [(culprit.kind, culprit.where) for culprit in report.culprits] == [("coupled-loss", "the loss")]


def test_clip_in_two_passes_is_exact() -> None:
    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        made = model(**batch)
        return made.image_embeds, made.text_embeds

    def batch_loss(outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        one, other = outputs
        logits = one @ other.T * model.logit_scale.exp()  # a parameter that only the loss uses
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(one)))

    model = clip()
    report = ga.audit(model, batch=images_and_text(), forward=forward, batch_loss=batch_loss, micro_batch_size=4)
    assert report.exact, str(report)
    assert {one.name: one.verdict for one in report.parameters}["logit_scale"] in ("equal", "rounding")
