"""Models of Hugging Face with their own head in chunks, against the same model's logits in float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradaccum as ga
from oracle import EXACT
from ranks import results_of
from wrapping import full_tensor

transformers = pytest.importorskip("transformers")

VOCABULARY = 523
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name.startswith("GPT2"):
        options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0}
        tied = name == "GPT2"
        config = transformers.GPT2Config(vocab_size=VOCABULARY, attn_pdrop=0, tie_word_embeddings=tied, **options)
        return transformers.GPT2LMHeadModel(config).double()
    head_dim = {"head_dim": 8} if name in ("Gemma2", "Qwen3") else {}
    config = getattr(transformers, f"{name}Config")(**SMALL, **head_dim)
    return getattr(transformers, f"{name}ForCausalLM")(config).double()


def make_batch(rows: int = 5, length: int = 11, *, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=made)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=made)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def whole_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(value.grad).clone() for name, value in model.named_parameters()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).abs().max() <= EXACT, name


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen2", "Qwen3", "Mistral"])
def test_models(name: str) -> None:
    model, oracle, batch = make(name), make(name), make_batch()
    state = set(model.state_dict())
    expected = whole_loss(oracle, batch)
    expected.backward()
    with ga.chunked_head(model, size=7):
        assert set(model.state_dict()) == state
        loss = model(**batch).loss
    assert isinstance(loss, ga.Loss)
    assert loss.weight == (batch["labels"][:, 1:] != -100).sum()
    assert abs(loss.item() - expected.item()) <= EXACT
    loss.value.backward()
    assert_close(gradients(model), gradients(oracle))
    # Undone: the loss is the model's own again, in float32.
    own = model(**batch)
    assert isinstance(own.loss, Tensor)
    assert own.logits.shape == (5, 11, VOCABULARY)
    assert not {"_loss_function", "forward"} & (vars(model).keys() | vars(model.lm_head).keys())


def test_the_trainer_passes_a_number_of_items() -> None:
    model, batch = make("Llama").float(), make_batch()
    own = model(**batch, num_items_in_batch=17).loss
    with ga.chunked_head(model):
        loss = model(**batch, num_items_in_batch=17).loss
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, own)


def test_without_labels_nothing_changes() -> None:
    model, batch = make("Llama"), make_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    wanted = model(**inputs).logits
    with ga.chunked_head(model):
        assert torch.equal(model(**inputs).logits, wanted)
        outputs = model(**batch)
        with pytest.raises(ga.UnsupportedError, match=r"LlamaForCausalLM were used \(.argmax\).*without labels"):
            outputs.logits.argmax(-1)
        assert torch.equal(model(**inputs).logits, wanted)
        assert not hasattr(outputs.logits, "shape")


def test_one_head_and_a_window() -> None:
    model, oracle = make("GPT2"), make("GPT2")
    batch = make_batch(9)
    whole_loss(oracle, batch).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    with ga.chunked_head(model, size=5):
        step = ga.TrainStep(model, optimizer, lambda model, batch: model(**batch).loss, micro_batch_size=2)
        step(batch)
        copied = copy.deepcopy(model)
    assert_close(seen[0], gradients(oracle))
    # A copy is of its own: its head is not the model's.
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert abs(copied(**batch).loss.item() - torch.tensor(VOCABULARY).log()) <= 1e-6
    assert whole_loss(model, batch).item() != pytest.approx(copied(**batch).loss.item(), abs=1e-6)


def test_it_is_undone_after_an_error() -> None:
    model, batch = make("Llama"), make_batch()
    with pytest.raises(ZeroDivisionError), ga.chunked_head(model, size=9):
        raise ZeroDivisionError
    assert isinstance(model(**batch).loss, Tensor)


@pytest.mark.parametrize("name", ["Gemma2", "Cohere"])
def test_logits_that_are_changed_before_the_loss(name: str) -> None:
    model = make(name)
    with ga.chunked_head(model), pytest.raises(ga.UnsupportedError, match=f"logits of {name}ForCausalLM were used"):
        model(**make_batch())


def test_other_models() -> None:
    with pytest.raises(ga.UnsupportedError, match="a Linear, which has no output embeddings"):
        ga.chunked_head(nn.Linear(2, 2)).__enter__()
    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ga.UnsupportedError, match="LlamaForSequenceClassification, which has"):
        ga.chunked_head(transformers.LlamaForSequenceClassification(config)).__enter__()


def over_ranks(rank: int, world_size: int, how: str) -> dict[str, Tensor]:
    model = make("GPT2, untied" if how == "head apart" else "GPT2")
    if how == "head apart":
        fully_shard(model.lm_head)
    trained: Any = DistributedDataParallel(model) if how == "DDP" else fully_shard(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    seen: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    with ga.chunked_head(trained, size=7):
        step = ga.TrainStep(trained, optimizer, lambda model, batch: model(**batch).loss, micro_batch_size=2)
        step(make_batch(5 - rank, seed=rank))
    return seen[0]


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "head apart"])
def test_two_ranks(how: str) -> None:
    oracle = make("GPT2, untied" if how == "head apart" else "GPT2")
    shares = [make_batch(5 - rank, seed=rank) for rank in range(2)]
    whole_loss(oracle, {name: torch.cat([share[name] for share in shares]) for name in shares[0]}).backward()
    for found in results_of(over_ranks, 2, how, seconds=400.0):  # importing transformers takes its time
        assert_close(found, gradients(oracle))
