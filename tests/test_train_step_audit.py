"""`TrainStep.audit`: the step as it is configured, and left as it was."""

from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga
import zoo

SIZE = 4


def step_of(model: nn.Module, loss_fn: Any = zoo.classes, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(model, torch.optim.Adam(model.parameters()), loss_fn, micro_batch_size=SIZE, **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_norm": "exact"},
    {"batch_norm": "exact", "activations": "recompute"},
    {"batch_norm": "frozen"},
    {"batch_norm": ga.GhostBatch(2)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_the_steps_own(options: dict[str, Any]) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)) for _ in range(2)))
    report = step_of(model, **options).audit(zoo.vectors())
    assert report.exact == bool(options), str(report)
    assert {culprit.kind for culprit in report.culprits} == (set() if options else {"batch-norm"})


def test_a_loss_over_the_batch() -> None:
    model = zoo.mlp()
    optimizer = torch.optim.Adam(model.parameters())
    in_parts = ga.TrainStep(model, optimizer, zoo.contrastive, micro_batch_size=SIZE)
    assert [culprit.kind for culprit in in_parts.audit(zoo.pairs()).culprits] == ["coupled-loss"]
    whole = ga.TrainStep(
        model, optimizer, forward=zoo.outputs, batch_loss=zoo.contrastive_of, micro_batch_size=SIZE, kept_graphs=1
    )
    assert whole.audit(zoo.pairs()).exact


def test_weights_and_accumulate_dtype() -> None:
    model = zoo._TOKENS()
    assert step_of(model, zoo.two_terms, weights=zoo.two_counts).audit(zoo.sequences()).exact
    half = zoo.mlp().to(torch.bfloat16)
    one = ga.TrainStep(half, torch.optim.SGD(half.parameters()), zoo.classes, micro_batch_size=1)
    wide = ga.TrainStep(
        half, torch.optim.SGD(half.parameters()), zoo.classes, micro_batch_size=1, accumulate_dtype=torch.float32
    )
    batch = zoo.half_vectors()
    rounded, summed = one.audit(batch).own_error, wide.audit(batch).own_error
    assert rounded is not None
    assert summed is not None
    assert summed < rounded


def test_auto_takes_the_present_size() -> None:
    model, batch = zoo.mlp(), zoo.vectors()
    train_step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), zoo.classes)
    assert train_step.audit(batch).micro_batch_sizes == (7, 6)  # nothing is known yet
    size = train_step(batch).micro_batch_size
    assert size is not None
    report = train_step.audit(batch)
    assert max(report.micro_batch_sizes) <= size
    assert report.exact


def test_training_goes_on_as_without_it() -> None:
    def trained(*, audits: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = zoo.mlp(nn.BatchNorm1d(8), nn.Dropout(0.5))
        train_step = step_of(model, batch_norm="exact")
        for _ in range(3):
            batch = zoo.vectors()
            if audits:
                assert train_step.audit(batch).exact
            train_step(batch)
        return [tensor.clone() for tensor in model.state_dict().values()]

    assert all(torch.equal(*pair) for pair in zip(trained(audits=False), trained(audits=True), strict=True))
