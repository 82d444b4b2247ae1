"""Trainers derived from transformers': TRL's and sentence-transformers', and LoRA; 2 x 4 beside the same at 8 x 1."""

import contextlib
import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga

pytest.importorskip("transformers")

import transformers

import trainers
from gradaccum.integrations.transformers import ExactMixin, ExactTrainer
from trainers import LLAMA, Gradients, error, texts, train, whole

EXACT, WRONG = 2e-6, 0.02  # both sides fp32

pytestmark = pytest.mark.filterwarnings("ignore")  # of these libraries' own


def exact_of(cls: type) -> type:
    return type(f"Exact{cls.__name__}", (ExactMixin, cls), {})


def cut_in(size: int, cls: type) -> Any:
    """The exact class, with micro-batches of at most so many rows."""
    return lambda **given: exact_of(cls)(micro_batch_size=size, **given)


class Sees(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[Gradients] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({n: p.grad.detach().double().clone() for n, p in named if p.grad is not None})


ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optim": "sgd",
    "save_strategy": "no", "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False,
    "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
}  # fmt: skip


def run(cls: Any, config: Any, folder: Path, size: tuple[int, int], *, options: Any = None, **trainer: Any) -> Any:
    """Gradients of an epoch and what was logged; ``size`` is rows a device and accumulation steps."""
    sizes = {"per_device_train_batch_size": size[0], "gradient_accumulation_steps": size[1]}
    sees = Sees()
    args = config(output_dir=str(folder), **{**ARGUMENTS, **sizes, **(options or {})})
    trainer["model"] = copy.deepcopy(trainer["model"])
    if "loss" in trainer:
        trainer["loss"] = trainer["loss"](trainer["model"])
    made = cls(args=args, callbacks=[sees], **trainer)
    made.remove_callback(transformers.PrinterCallback)
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    return sees.gradients, [log for log in made.state.log_history if "loss" in log]


def furthest(made: list[Gradients], expected: list[Gradients]) -> float:
    assert len(made) == len(expected)
    return max(error(one, other) for one, other in zip(made, expected, strict=True))


def beside_stock(name: str, cls: Any, config: Any, folder: Path, expected: list[Gradients], **given: Any) -> Any:
    """Logs of the exact trainer at 2 x 4, whose gradients are those expected; and how far the stock one's are from it.

    ``pytest -rP`` shows both.
    """
    stock, _ = run(cls, config, folder, (2, 4), **given)
    made, logs = run(exact_of(cls), config, folder, (2, 4), **given)
    off = furthest(made, expected), furthest(stock, expected)
    print(f"{name}: stock {off[1]:.1e}, exact {off[0]:.1e}")
    assert off[0] < EXACT
    return logs, off[1]


def words() -> Any:
    """A tokenizer of whole words, w4 to w28."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, trainers.WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentences(number: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (number,), generator=generator)
    return [
        " ".join(f"w{i}" for i in torch.randint(4, trainers.WORDS, (int(n),), generator=generator)) for n in lengths
    ]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {
        **LLAMA,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


# ----------------------------------------------------------------------------------------------------------------- TRL
def trl_and_data(columns: dict[str, list[str]]) -> tuple[Any, Any]:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    return trl, datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_supervised_finetuning(packing: bool, tmp_path: Path) -> None:
    trl, data = trl_and_data({"text": sentences(19)})
    options = {"max_length": 16, "packing": packing}
    if packing:
        options["packing_strategy"] = "wrapped"  # without flash attention
    given = {"model": llama(), "train_dataset": data, "processing_class": words(), "options": options}
    expected, logs = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, (8, 1), **given)
    name = "SFT, packed" if packing else "SFT"
    made_logs, _ = beside_stock(name, trl.SFTTrainer, trl.SFTConfig, tmp_path, expected, **given)
    assert [log["loss"] for log in made_logs] == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    assert [log["num_tokens"] for log in made_logs] == [log["num_tokens"] for log in logs]  # a check counts nothing
    made, _ = run(cut_in(3, trl.SFTTrainer), trl.SFTConfig, tmp_path, (8, 1), **given)
    assert furthest(made, expected) < EXACT


def test_preferences_whose_pairs_stay_together(tmp_path: Path) -> None:
    columns = {"prompt": sentences(19), "chosen": sentences(19, 1), "rejected": sentences(19, 2)}
    trl, data = trl_and_data(columns)
    given = {
        "model": llama(),
        "ref_model": llama(hidden_act="relu"),
        "train_dataset": data,
        "processing_class": words(),
    }
    expected, logs = run(trl.DPOTrainer, trl.DPOConfig, tmp_path, (8, 1), **given)
    made_logs, _ = beside_stock("DPO", trl.DPOTrainer, trl.DPOConfig, tmp_path, expected, **given)
    assert [log["loss"] for log in made_logs] == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    made, _ = run(cut_in(6, trl.DPOTrainer), trl.DPOConfig, tmp_path, (8, 1), **given)
    assert furthest(made, expected) < EXACT


@pytest.mark.parametrize("centered", [None, 0.5])
def test_rewards(centered: float | None, tmp_path: Path) -> None:
    trl, data = trl_and_data({"chosen": sentences(19, 1), "rejected": sentences(19, 2)})
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "max_position_embeddings": 64}, num_labels=1, pad_token_id=0)
    given = {
        "model": transformers.LlamaForSequenceClassification(config),
        "train_dataset": data,
        "processing_class": words(),
        "options": {"center_rewards_coefficient": centered},
    }
    expected, _ = run(trl.RewardTrainer, trl.RewardConfig, tmp_path, (8, 1), **given)
    name = f"Reward, centered {centered}"
    beside_stock(name, trl.RewardTrainer, trl.RewardConfig, tmp_path, expected, **given)
    made, _ = run(cut_in(4, trl.RewardTrainer), trl.RewardConfig, tmp_path, (8, 1), **given)
    assert furthest(made, expected) < EXACT


def test_trainers_that_generate_are_refused(tmp_path: Path) -> None:
    trl, data = trl_and_data({"prompt": sentences(4)})
    for name in ("GRPO", "RLOO"):
        with pytest.raises(ga.UnsupportedError, match="generates answers inside of _prepare_inputs"):
            exact_of(getattr(trl, f"{name}Trainer"))(
                model=llama(),
                args=getattr(trl, f"{name}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                train_dataset=data,
                processing_class=words(),
            )


# ----------------------------------------------------------------------------------------------- sentence-transformers
LOSSES = "MultipleNegativesRankingLoss", "CoSENTLoss", "CosineSimilarityLoss"  # the last is a mean over pairs


@pytest.mark.parametrize("name", LOSSES)
def test_sentence_embeddings(name: str, tmp_path: Path) -> None:
    sbert, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    config = transformers.BertConfig(**trainers.BERT)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    words().save_pretrained(tmp_path / "bert")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    layers = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(8)]
    model = sbert.SentenceTransformer(modules=layers, device="cpu")
    columns: dict[str, Any] = {"one": sentences(19, 1), "other": sentences(19, 2)}
    if name != "MultipleNegativesRankingLoss":
        columns["label"] = [i % 7 / 7 for i in range(19)]
    given = {
        "model": model,
        "train_dataset": datasets.Dataset.from_dict(columns),
        "loss": lambda model: getattr(losses, name)(model),
    }
    arguments = sbert.SentenceTransformerTrainingArguments
    expected, logs = run(sbert.SentenceTransformerTrainer, arguments, tmp_path, (8, 1), **given)
    made_logs, off = beside_stock(name, sbert.SentenceTransformerTrainer, arguments, tmp_path, expected, **given)
    assert [log["loss"] for log in made_logs] == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    assert off > WRONG  # of a mean over pairs in the last window alone, of 2 + 1


# ---------------------------------------------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_low_rank_adapters(head: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**trainers.BERT, num_labels=3))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros, of which lora_A has no gradient
                parameter.copy_(torch.randn_like(parameter))
    rows = texts("words" if head == "MaskedLM" else "class")
    expected = [gradients for gradients, _ in whole(model, rows)]
    made = train(ExactTrainer, model, rows, tmp_path)
    assert furthest(made.gradients, expected) < EXACT
    stock = train(transformers.Trainer, model, rows, tmp_path)
    off = furthest(made.gradients, expected), furthest(stock.gradients, expected)
    print(f"LoRA, {head}: stock {off[1]:.1e}, exact {off[0]:.1e}")
    assert off[1] > 1.0
