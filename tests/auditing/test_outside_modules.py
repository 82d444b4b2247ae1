"""Networks that the loss function holds on to: named, taken into account, and put back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
import zoo


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(zoo.FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def fooling(critic: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda generator, z: F.softplus(-critic(generator(z))).mean()


def test_a_batch_norm_of_a_discriminator_is_a_culprit_by_its_name() -> None:
    critic, generator, noise = discriminator(), nn.Linear(4, zoo.FEATURES), torch.randn(13, 4)
    fooling(critic)(generator, noise).backward()
    before = [one.clone() for one in critic.state_dict().values()]
    gradients = [one.grad for one in critic.parameters()]
    report = ga.audit(generator, fooling(critic), noise, 4)
    assert [(culprit.kind, culprit.where) for culprit in report.culprits] == [("batch-norm", "critic.1")]
    assert [one.name for one in report.parameters] == ["weight", "bias"]  # of the generator
    assert all(torch.equal(*pair) for pair in zip(before, critic.state_dict().values(), strict=True))
    assert all(one.grad is grad for one, grad in zip(critic.parameters(), gradients, strict=True))
    assert ga.audit(generator, fooling(critic.eval()), noise, 4).exact


def test_functions_hold_networks_in_many_ways() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.judge = discriminator()

        def loss_fn(self, generator: Any, z: Tensor, *, by: Any = None) -> Tensor:
            return fooling(by or self.judge)(generator, z)

    trainer, generator, noise = Trainer(), nn.Linear(4, zoo.FEATURES), torch.randn(13, 4)
    default = discriminator()

    def with_default(generator: Any, z: Tensor, by: nn.Module = default) -> Tensor:
        return fooling(by)(generator, z)

    unnamed = [discriminator()]
    for loss_fn, where in (
        (trainer.loss_fn, "judge.1"),
        (with_default, "by.1"),
        (lambda generator, z: fooling(unnamed[0])(generator, z), "Sequential.1"),
    ):
        [culprit] = ga.audit(generator, loss_fn, noise, 4).culprits
        assert culprit.where == where


def test_a_state_of_a_loss_is_a_culprit() -> None:
    class Centred(nn.Module):
        """Moves a centre with every forward, and does not ask for the mode."""

        def __init__(self) -> None:
            super().__init__()
            self.centre: Tensor
            self.register_buffer("centre", torch.zeros(zoo.CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            loss = (x - self.centre).square().mean()
            with torch.no_grad():
                self.centre.mul_(0.5).add_(0.5 * x.sum(0))
            return loss

    centred, model = Centred(), zoo.mlp()
    [culprit] = ga.audit(model, lambda model, batch: centred(model(batch[0])), zoo.vectors(), 4).culprits
    assert (culprit.kind, culprit.where) == ("buffer", "centred")
    assert "take what writes it out of forward" in culprit.remedy  # evaluation mode was tried
    assert not centred.centre.any()


def test_teachers_and_criteria_are_no_culprits() -> None:
    teacher, criterion = discriminator().eval(), nn.CrossEntropyLoss(weight=torch.ones(zoo.CLASSES))

    def distilled(model: Any, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1]) + (model(batch[0]) - teacher(batch[0])).square().mean()

    report = ga.audit(zoo.mlp(), distilled, zoo.vectors(), 4)
    assert report.exact, str(report)
