"""Transformers' Trainer, masked language modelling: the stock gradient is four times too large, the exact one is not.

-from transformers import Trainer
+from gradaccum.integrations.transformers import ExactTrainer
"""

import copy
import tempfile

import torch
from torch import Tensor

try:
    import transformers
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments
except ImportError:
    print("needs transformers and accelerate: pip install '.[transformers]'")
    raise SystemExit from None

from gradaccum.integrations.transformers import ExactTrainer

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
WORDS, POSITIONS, BATCH = 50, 12, 8

# 19 texts of unequal length; a third of the words of each is to be guessed.
texts = []
for _ in range(19):
    mask = torch.arange(POSITIONS) < torch.randint(3, POSITIONS + 1, ())
    words = torch.randint(4, WORDS, (POSITIONS,)) * mask
    hidden = mask & (torch.rand(POSITIONS) < 0.33)
    hidden[0] = True
    texts.append({"input_ids": words.masked_fill(hidden, 3), "attention_mask": mask.long(),
                  "labels": words.where(hidden, -100)})  # fmt: skip

config = BertConfig(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForMaskedLM(config)


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def gradients(trainer_class: type) -> list[Tensor]:
    kept = Gradients()
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=0.0,
        max_grad_norm=0.0, num_train_epochs=1, train_sampling_strategy="sequential", report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trainer_class(copy.deepcopy(model), args, train_dataset=texts, callbacks=[kept])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return kept.seen


stock, exact = gradients(Trainer), gradients(ExactTrainer)
for number, start in enumerate(range(0, len(texts), BATCH)):
    batch = {key: torch.stack([text[key] for text in texts[start : start + BATCH]]) for key in texts[0]}
    model.zero_grad()
    model(**batch).loss.backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    print(f"batch of {len(batch['labels'])}: stock {stock[number].norm() / whole.norm():.3f} of the gradient, "
          f"exact {exact[number].norm() / whole.norm():.6f}")  # fmt: skip
    torch.testing.assert_close(exact[number], whole, rtol=1e-4, atol=1e-6)
