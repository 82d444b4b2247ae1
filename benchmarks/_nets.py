"""Five networks, each with a trait that decides how it is made to fit; ways.py plans them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _resnet import small
from torch import nn

import gradaccum as ga

_WORDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """``batch(rows)`` is what the model is trained with by ``loss_fn``, in batches of ``rows`` samples."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss_fn: Callable[[Any, Any], ga.Loss]
    rows: int


def tokens_loss(model: Any, batch: Any) -> ga.Loss:
    loss = model(**batch).loss
    return loss if isinstance(loss, ga.Loss) else ga.Loss.mean(loss, over=batch["labels"][:, 1:].numel())


def targets_loss(model: Any, batch: Any) -> ga.Loss:
    return ga.Loss.mean(model(**batch).loss, over=batch["labels"].numel())


def pictures_loss(model: Any, batch: Any) -> ga.Loss:
    return ga.Loss.mean(F.cross_entropy(model(batch[0]), batch[1]), over=len(batch[1]))


def words(vocabulary: int, length: int) -> Callable[[int], Any]:
    return lambda rows: {name: torch.randint(vocabulary, (rows, length)) for name in ("input_ids", "labels")}


def pictures(rows: int) -> Any:
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=16_000, n_embd=64, n_layer=2, n_head=2, n_positions=128, **_WORDS)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=512, max_position_embeddings=1024, **sizes, **_WORDS)
    )


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=1000, **sizes, **_WORDS))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "batched_mm"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=4000, **sizes, **experts, **_WORDS))


NETS = {
    "GPT-2 shape, large vocabulary": Net(make=gpt2, batch=words(16_000, 128), loss_fn=tokens_loss, rows=8),
    "long context": Net(make=llama, batch=words(512, 1024), loss_fn=tokens_loss, rows=2),
    "ResNet": Net(make=small, batch=pictures, loss_fn=pictures_loss, rows=32),
    "T5": Net(make=t5, batch=words(1000, 64), loss_fn=targets_loss, rows=16),
    "mixture of experts": Net(make=mixtral, batch=words(4000, 64), loss_fn=tokens_loss, rows=8),
}
