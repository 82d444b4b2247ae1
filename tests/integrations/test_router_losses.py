"""The load-balancing loss of transformers' mixtures of experts over the whole batch, also on two ranks.

Their causal LMs make float32 of the logits, in a model of float64 too; the same sums are exact to 1e-12 in
examples/18_balance_of_experts.py.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

pytest.importorskip("transformers")

import transformers

from oracle import SINGLE, assert_same_gradients, gradients_of
from ranks import results_of
from trainers import LLAMA, collated, texts

SHARED = {**LLAMA, "output_router_logits": True, "router_aux_loss_coef": 0.7, "experts_implementation": "eager"}
WRONG = 0.001


def qwen(**options: Any) -> nn.Module:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**SHARED, **sizes, **options}))


def mixtral(**options: Any) -> nn.Module:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SHARED, **sizes, **options}))


MODELS = {"Qwen3-MoE": qwen, "Mixtral": mixtral}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return MODELS[name]().double().train(), collated(texts())


def whole(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, float]:
    model = copy.deepcopy(model)
    loss = model(**batch).loss
    loss.backward()
    return gradients_of(model), loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_whole_batchs(name: str) -> None:
    model, batch = made(name)
    expected, loss = whole(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, **ga.balance_over_batch(model), micro_batch_size=4)
    assert step.backward(batch).item() == pytest.approx(loss, rel=SINGLE)
    assert_same_gradients(gradients_of(model), expected, tolerance=SINGLE)


def test_micro_batches_by_themselves_are_off() -> None:
    model, batch = made("Qwen3-MoE")
    expected, _ = whole(model, batch)
    rows = len(batch["labels"])
    for start in range(0, rows, 4):
        part = {name: value[start : start + 4] for name, value in batch.items()}
        counted = (part["labels"][:, 1:] != -100).sum() / (batch["labels"][:, 1:] != -100).sum()
        (model(**part).loss * counted).backward()  # right for the tokens
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(gradients_of(model), expected, tolerance=WRONG)


def on_ranks(rank: int, world_size: int) -> tuple[Any, float]:
    model, batch = made("Qwen3-MoE")
    wrapped = nn.parallel.DistributedDataParallel(model)
    step = ga.TrainStep(
        wrapped,
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        **ga.balance_over_batch(wrapped),
        micro_batch_size=4,
    )
    loss = step.backward({name: value[rank::world_size] for name, value in batch.items()})
    return gradients_of(model), loss.item()


def test_two_ranks() -> None:
    expected, loss = whole(*made("Qwen3-MoE"))
    for gradients, value in results_of(on_ranks, 2, seconds=300.0):
        assert value == pytest.approx(loss, rel=SINGLE)
        assert_same_gradients(gradients, expected, tolerance=SINGLE)


def test_without_a_balance() -> None:
    model = qwen(output_router_logits=False)
    with pytest.raises(ga.LossError, match=r"adds no load-balancing loss: output_router_logits=False.*weight_of"):
        ga.balance_over_batch(model)
    step = ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: ga.weight_of(model(**batch).loss),
        micro_batch_size=4,
    )  # what the message says to type
    batch = collated(texts())
    expected, _ = whole(model, batch)
    step.backward(batch)
    assert_same_gradients(gradients_of(model), expected, tolerance=SINGLE)
