"""The models and optimizers of a run, and the parameters that both have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from gradaccum.window import guards


class Parameters:
    """Models and their optimizers.

    Args:
        model: one module or a sequence of them.
        optimizer: one optimizer or a sequence of them; their parameters must be the models'.

    Attributes:
        models: all of them.
        optimizers: all of them.
        named: every parameter of the models by its qualified name, frozen ones too.
        optimized: every parameter of the optimizers.

    Raises:
        ParameterError: optimizers and models do not belong together, or nothing is trainable.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], optimizer: Optimizer | Sequence[Optimizer]) -> None:
        self.models: list[nn.Module] = guards.as_sequence(model, nn.Module, name="model")
        self.optimizers: list[Optimizer] = guards.as_sequence(optimizer, Optimizer, name="optimizer")
        self.find()

    def find(self) -> None:
        """Looks for the parameters anew."""
        self.named = guards.named_parameters(self.models)
        guards.check_parameters(self.named, self.optimizers)
        self.optimized: list[nn.Parameter] = [
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def has_changed(self) -> bool:
        """Whether the optimizers have been given other parameters since."""
        held = sum(len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)
        return held != len(self.optimized)
