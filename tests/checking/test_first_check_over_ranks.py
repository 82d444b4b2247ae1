"""Over several processes each looks at rows of its own, and all agree on what was found."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from ranks import results_of
from wrapping import sharded, wrapped

SHARES = ([7, 6], [13, 0], [0, 13])


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (13, 5), generator=generator)
    for row, length in enumerate(itertools.islice(itertools.cycle((1, 5, 2)), 13)):
        labels[row, length:] = -100
    return torch.randn(13, 5, 3, generator=generator, dtype=torch.float64), labels


def tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1]).nan_to_num()


def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ga.Loss:
    return ga.Loss.mean(tokens(model, batch), over=(batch[1] != -100).sum())


class Centred(nn.Module):
    """Only what rank 0 sees is centred: the others look at it in vain."""

    def __init__(self, *, is_centred: bool) -> None:
        super().__init__()
        self.head, self.is_centred = nn.Linear(3, 4).double(), is_centred

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(x)
        return scores - scores.mean(0) if self.is_centred else scores


def check_steps(rank: int, world_size: int, how: str) -> list[Any]:
    """For each way to share a batch: the evidence, the error of a loss that does not add up, a warning of rank 0's."""
    found: list[Any] = []
    for shares, size in zip(SHARES, (4, "auto", 4), strict=True):
        x, labels = (column.split(shares)[rank] for column in make_batch())
        own = x, labels
        torch.manual_seed(0)
        model = nn.Linear(3, 4).double()
        trained = sharded(model, world_size) if how == "FSDP2" else wrapped(model, how)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = ga.TrainStep(trained, optimizer, counted, micro_batch_size=size)  # type: ignore[arg-type]
        samples = step(own).samples
        found.append((step._accumulation.plan_line.evidence, samples))
        if how == "FSDP2":
            continue
        wrong = ga.TrainStep(trained, optimizer, tokens, micro_batch_size=size)  # type: ignore[arg-type]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ga.MeanError, match="does not add up"):
            wrong(own)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        centred = Centred(is_centred=rank == 0)
        one = ga.TrainStep(centred, torch.optim.SGD(centred.parameters(), lr=0.1), counted, micro_batch_size=size)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one(own)
        found.append([str(warning.message)[:30] for warning in caught])
    return found


@pytest.mark.parametrize("how", ["plain", "DDP"])
def test_all_processes_agree_on_what_was_found(how: str) -> None:
    first, second = results_of(check_steps, 2, how)
    evidence, told = ([one for one in found if isinstance(one, tuple)] for found in (first, second))
    assert evidence == told
    assert {samples for _, samples in evidence} == {13}
    assert all(text.startswith("exact (checked on ") for text, _ in evidence)
    warned, repeated = ([one for one in found if isinstance(one, list)] for found in (first, second))
    assert warned[:2] == [["What Centred (Centred) returns"]] * 2
    assert warned[2:] == [[]]  # with no rows on rank 0 there is nothing to see
    assert repeated == [[]] * 3  # the first process speaks for all


def test_sharded_models_are_not_looked_at_and_it_is_said() -> None:
    first, second = results_of(check_steps, 2, "FSDP2")
    assert first == second
    assert {text for text, _ in first} == {"not checked: forwards of a sharded model wait for other processes"}
