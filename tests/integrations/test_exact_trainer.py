"""Transformers' Trainer as it is and made exact, side by side: the stock one is seen to be wrong."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradaccum as ga

pytest.importorskip("transformers")

import transformers
from transformers import Trainer

import trainers
from gradaccum.integrations import exact as exact_any
from gradaccum.integrations.transformers import ExactMixin, ExactTrainer, exact
from ranks import results_of
from trainers import BERT, LLAMA, Ran, errors, texts, train, whole

EXACT = 1e-6  # fp32 against float64: sums of some hundred numbers, each 6e-8 off
WRONG = 0.02
MEASURED = "5.23.0"  # which the stock trainer's errors are known of


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **options))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=trainers.WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(head: str, **options: Any) -> nn.Module:
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**BERT, **options))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=trainers.WORDS, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


# The model, the kind of its labels, and how wrong the stock Trainer is: (at least, at most).
HEADS: dict[str, tuple[Any, str, tuple[float, float]]] = {
    "causal LM, Llama": (llama, "words", (0.0, EXACT)),
    "causal LM, GPT-2": (gpt2, "words", (WRONG, 1.0)),
    "masked LM": (lambda: bert("MaskedLM"), "words", (2.0, 5.0)),
    "one label": (lambda: bert("SequenceClassification", num_labels=3), "class", (2.0, 5.0)),
    "regression": (lambda: bert("SequenceClassification", num_labels=1), "number", (2.0, 5.0)),
    "several labels": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        "several",
        (2.0, 5.0),
    ),
    "tags": (lambda: bert("TokenClassification", num_labels=3), "tags", (2.0, 5.0)),
    "T5": (t5, "words", (2.0, 5.0)),
}


def beside_stock(model: nn.Module, rows: Any, folder: Path, **options: Any) -> tuple[Ran, Ran]:
    """Trained as it is, and exactly."""
    return train(Trainer, model, rows, folder, **options), train(ExactTrainer, model, rows, folder, **options)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, tmp_path: Path) -> None:
    make, labels, (least, most) = HEADS[head]
    model, rows = make(), texts(labels)
    expected = whole(model, rows)
    stock, made = beside_stock(model, rows, tmp_path)
    assert max(errors(made, expected)) < EXACT
    if transformers.__version__ == MEASURED:
        assert least <= max(errors(stock, expected)[:2]) <= most, "the stock Trainer has changed"
    assert [log["loss"] for log in made.logs] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    assert made.events == stock.events
    assert made.trainer.state.global_step == stock.trainer.state.global_step == 3
    assert [sorted(log) for log in made.logs] == [sorted(log) for log in stock.logs]


def test_router_losses_over_the_batch(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4, output_router_logits=True,
        router_aux_loss_coef=0.7, experts_implementation="eager",
    )  # fmt: skip
    model, rows = transformers.Qwen3MoeForCausalLM(config), texts()
    expected = whole(model, rows)
    stock, made = beside_stock(model, rows, tmp_path)
    assert max(errors(made, expected)) < EXACT
    assert max(errors(stock, expected)) > WRONG
    assert [log["loss"] for log in made.logs] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    micro = train(ExactTrainer, model, rows, tmp_path, options={"router_loss": "micro"})
    assert EXACT < max(errors(micro, expected)) < 0.5


def test_label_smoothing(tmp_path: Path) -> None:
    model, rows = bert("TokenClassification", num_labels=3), texts("tags")
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    expected = whole(model, rows, lambda model, batch: smoother(model(**batch), batch["labels"]))
    made = train(ExactTrainer, model, rows, tmp_path, label_smoothing_factor=0.1)
    assert max(errors(made, expected)) < EXACT


@pytest.mark.parametrize(("function", "labels"), [(trainers.weighted, "class"), (trainers.divided, "tags")])
def test_a_loss_function_of_ones_own(function: Any, labels: str, tmp_path: Path) -> None:
    head = "SequenceClassification" if labels == "class" else "TokenClassification"
    model, rows = bert(head, num_labels=3), texts(labels)
    expected = whole(model, rows, lambda model, batch: function(model(**batch), batch["labels"]))
    stock, made = beside_stock(model, rows, tmp_path, options={"compute_loss_func": function})
    assert max(errors(made, expected)) < EXACT
    assert (max(errors(stock, expected)) > WRONG) == (function is trainers.weighted)


def test_terms_over_different_things(tmp_path: Path) -> None:
    """Question answering: positions out of range are left out of one of two means."""

    class Tagged(ExactTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            terms = {
                "tags": ga.Loss.mean(outputs.loss, over=(inputs["labels"] != -100).sum()),
                "size": ga.Loss.mean(outputs.logits.square().mean(), over=len(outputs.logits)),
            }
            return (terms, outputs) if return_outputs else terms

    def loss_of(model: Any, batch: Any) -> Any:
        outputs = model(**batch)
        return outputs.loss + outputs.logits.square().mean()

    model, rows = bert("TokenClassification", num_labels=3), texts("tags")
    weights = lambda inputs: {"tags": (inputs["labels"] != -100).sum(), "size": len(inputs["labels"])}  # noqa: E731
    made = train(Tagged, model, rows, tmp_path, options={"weights": weights})
    assert max(errors(made, whole(model, rows, loss_of))) < EXACT


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_a_stream_and_its_short_last_window(tmp_path: Path) -> None:
    model, rows = bert("SequenceClassification", num_labels=3), texts("class")
    expected = whole(model, rows)
    made = train(ExactTrainer, model, Stream(rows), tmp_path, max_steps=6)
    assert max(errors(made, [*expected, *expected])) < EXACT


def test_micro_batches_are_cut_further_and_layers_see_the_batch(tmp_path: Path) -> None:
    model, rows = bert("SequenceClassification", num_labels=3), texts("class")
    expected = whole(model, rows)
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    made = train(ExactTrainer, model, rows, tmp_path, options={"micro_batch_size": 3}, **sizes)
    assert max(errors(made, expected)) < EXACT
    made = train(ExactTrainer, model, rows, tmp_path, options={"batch_norm": "exact"})
    assert max(errors(made, expected)) < EXACT


def test_memory_that_runs_out_changes_no_batch(tmp_path: Path) -> None:
    """`auto_find_batch_size`: at most 3 rows fit, and the update is that of 8."""
    model, rows = bert("SequenceClassification", num_labels=3), texts("class")
    expected = whole(model, rows)
    failures: list[int] = []

    def refuse(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            failures.append(len(kwargs["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    made = train(
        ExactTrainer,
        model,
        rows,
        tmp_path,
        options={"check": "off"},
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    assert failures
    assert max(errors(made, expected)) < EXACT
    assert made.trainer.args.auto_find_batch_size


def test_clipping_and_a_resumed_run(tmp_path: Path) -> None:
    model, rows = bert("MaskedLM"), texts()
    options = {"learning_rate": 0.05, "max_grad_norm": 0.5, "num_train_epochs": 2, "optim": "adamw_torch"}
    first = train(ExactTrainer, model, rows, tmp_path, save_strategy="steps", save_steps=2, **options)
    resumed = train(
        ExactTrainer, model, rows, tmp_path, save_strategy="no", resume=str(tmp_path / "checkpoint-2"), **options
    )
    before, after = first.trainer.model.state_dict(), resumed.trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    options["optim"] = "sgd"  # Adam makes steps of rounding errors where the gradient is 0 (biases of keys)
    made = train(ExactTrainer, model, rows, tmp_path, **options)
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    stock = train(Trainer, model, rows, tmp_path, **options, **sizes)
    for name, one in stock.trainer.model.state_dict().items():
        torch.testing.assert_close(made.trainer.model.state_dict()[name], one, rtol=1e-5, atol=1e-6)
    assert [log["grad_norm"] for log in made.logs] == pytest.approx([log["grad_norm"] for log in stock.logs], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("head", ["causal LM, Llama", "masked LM"])
def test_gradient_checkpointing(head: str, tmp_path: Path) -> None:
    make, labels, _ = HEADS[head]
    model, rows = make(), texts(labels)
    made = train(ExactTrainer, model, rows, tmp_path, gradient_checkpointing=True)
    assert max(errors(made, whole(model, rows))) < EXACT


def test_autocast(tmp_path: Path) -> None:
    """As far from float64 as the stock Trainer's whole batches are: what bf16 rounds."""
    model, rows = bert("MaskedLM"), texts()
    expected = whole(model, rows)
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    rounding = max(errors(train(Trainer, model, rows, tmp_path, bf16=True, **sizes), expected))
    stock, made = beside_stock(model, rows, tmp_path, bf16=True)
    assert max(errors(made, expected)) < 2 * rounding < WRONG
    assert max(errors(stock, expected)) > 2.0


def test_a_loss_scale(tmp_path: Path) -> None:
    model, rows = bert("MaskedLM"), texts()
    expected = whole(model, rows)

    def with_scaler(trainer: Any) -> Any:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return trainer

    made = train(ExactTrainer, model, rows, tmp_path, wrap=with_scaler)
    scale = 256.0
    unscaled = [{name: one / scale for name, one in gradients.items()} for gradients in made.gradients]
    made.gradients = unscaled
    assert max(errors(made, expected)) < EXACT
    assert [log["loss"] for log in made.logs] == pytest.approx([loss for _, loss in expected], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- instances
def test_a_trainer_that_is_there(tmp_path: Path) -> None:
    model, rows = bert("MaskedLM"), texts()
    expected = whole(model, rows)
    for make in (exact, exact_any):
        made = train(Trainer, model, rows, tmp_path, wrap=make)
        assert max(errors(made, expected)) < EXACT
        assert isinstance(made.trainer, ExactMixin)
        assert exact(made.trainer) is made.trainer
    assert Trainer.training_step.__qualname__ == "Trainer.training_step"
    assert "compute_loss" not in made.trainer.__dict__
    assert "backward" not in made.trainer.accelerator.__dict__


def test_what_is_exact_is_audited(tmp_path: Path) -> None:
    made = train(ExactTrainer, bert("MaskedLM"), texts(), tmp_path)
    report = made.trainer.audit()
    assert report.exact, str(report)


# ------------------------------------------------------------------------------------------------------------ refusals
class Contrasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(trainers.WORDS, 8), nn.Embedding(trainers.WORDS, 8)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        scores = self.one(input_ids).mean(1) @ self.other(labels.clamp(min=0)).mean(1).T
        return {"loss": F.cross_entropy(scores, torch.arange(len(scores)))}


def test_a_loss_that_couples_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ga.LossError, match=r"(?s)2 samples together .* couples samples.* forward=forward, batch_loss="):
        train(ExactTrainer, Contrasting(), texts(), tmp_path)


class Hidden(torch.autograd.Function):
    """A mean over labels that count, as fused heads make it: nothing of it is in the graph."""

    @staticmethod
    def forward(ctx: Any, losses: Any, mask: Any) -> Any:
        ctx.save_for_backward(mask)
        return losses[mask].mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask / mask.sum(), None


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(trainers.WORDS, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        losses = F.cross_entropy(self.head(self.words(input_ids)).flatten(0, 1), labels.flatten(), reduction="none")
        return transformers.modeling_outputs.TokenClassifierOutput(loss=Hidden.apply(losses, labels.flatten() != -100))


@pytest.mark.parametrize("check", ["first", "off"])
def test_a_mean_that_nothing_shows_is_measured(check: str, tmp_path: Path) -> None:
    model, rows = Fused(), texts("tags")
    made = train(ExactTrainer, model, rows, tmp_path, options={"check": check})
    assert max(errors(made, whole(model, rows))) < EXACT


def test_constructions_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = bert("MaskedLM"), texts()
    with pytest.raises(ga.UnsupportedError, match="steps inside of every backward"):
        train(ExactTrainer, model, rows, tmp_path, wrap=lambda t: exact_with(t, optim="lomo"))
    with pytest.raises(ga.WindowError, match="router_loss='all'"):
        train(ExactTrainer, model, rows, tmp_path, options={"router_loss": "all"})

    for name, reason in (
        ("DEEPSPEED", "keeps the gradients in memory of its own"),
        ("MEGATRON_LM", "keeps the gradients in memory of its own"),
        ("XLA", "keeps the gradients in memory of its own"),
    ):
        with pytest.raises(ga.UnsupportedError, match=f"(?s){name} {reason}.* gradient_accumulation_steps=1"):
            train(Trainer, model, rows, tmp_path, wrap=lambda t, name=name: exact(as_if(t, distributed_type=name)))
    with pytest.raises(ga.UnsupportedError, match="FSDP1 divides flat parameters"):
        train(Trainer, model, rows, tmp_path, wrap=lambda t: exact(as_if(t, is_fsdp_enabled=True)))
    with pytest.raises(ga.UnsupportedError, match="DataParallel spreads each micro-batch over 2 devices"):
        train(Trainer, model, rows, tmp_path, wrap=lambda t: exact(as_if(t, _n_gpu=2)))

    class GRPOTrainer(Trainer):
        pass

    with pytest.raises(ga.UnsupportedError, match="generates answers inside of _prepare_inputs"):
        train(type("ExactGRPO", (ExactMixin, GRPOTrainer), {}), model, rows, tmp_path)

    class Prepares(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    with pytest.raises(ga.UnsupportedError, match="a _prepare_inputs of its own"):
        train(Prepares, model, rows, tmp_path, wrap=exact)
    with pytest.raises(ga.UnsupportedError, match=r"got a builtins.int"):
        exact_any(3)
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, batch: None)
    with pytest.raises(ga.UnsupportedError, match=r"Trainer.training_step\(self, model, batch\) is not the one"):
        train(ExactTrainer, model, rows, tmp_path)


def as_if(trainer: Any, **found: Any) -> Any:
    """The trainer as another machine would have made it: what is refused is read off these attributes."""
    for name, value in found.items():
        owner = (
            trainer if name == "is_fsdp_enabled" else trainer.args if name == "_n_gpu" else trainer.accelerator.state
        )
        setattr(owner, name, value)
    return trainer


def exact_with(trainer: Any, **arguments: Any) -> Any:
    stock = Trainer(model=trainer.model, args=copy.copy(trainer.args), train_dataset=trainer.train_dataset)
    for name, value in arguments.items():
        setattr(stock.args, name, value)
    return exact(stock)


def test_two_losses_for_one_micro_batch(tmp_path: Path) -> None:
    class Twice(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            super().training_step(model, dict(inputs), num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ga.LossError, match="computed 2 losses for one micro-batch of 2 rows"):
        train(Twice, bert("MaskedLM"), texts(), tmp_path, wrap=exact)


# ------------------------------------------------------------------------------------------------------- two processes
def on_a_rank(rank: int, world_size: int, folder: str, kind: str, number: int) -> Any:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}
    torch.manual_seed(0)
    model, rows = bert("MaskedLM"), texts(number=number)
    cls = Trainer if kind == "stock" else ExactTrainer
    ran = train(cls, model, rows, folder, gradient_accumulation_steps=2)
    return ran.gradients, [log["loss"] for log in ran.logs]


@pytest.mark.parametrize("number", [16, 17])
def test_two_processes(number: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = whole(bert("MaskedLM"), texts(number=number))
    for kind in ("stock", "exact"):
        for gradients, losses in results_of(on_a_rank, 2, str(tmp_path), kind, number, seconds=250):
            found = max(errors(Ran(gradients=gradients), expected))
            if kind == "exact":
                assert found < EXACT
                assert losses == pytest.approx([loss for _, loss in expected], rel=1e-5)
            else:
                assert found > WRONG
