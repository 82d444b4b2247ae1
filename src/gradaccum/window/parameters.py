"""The models and optimizers of a run, and the parameters that both have."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradaccum.errors import ParameterError, UnsupportedError

_MAX_SHOWN = 3
_WRAPPERS = ("accelerate.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


class Parameters:
    """Models and their optimizers, each one or a sequence of them; the optimizers' parameters must be the models'.

    Attributes:
        named: every parameter of the models by its qualified name, frozen ones too.
        optimized: every parameter of the optimizers.

    Raises:
        ParameterError: optimizers and models do not belong together, or nothing is trainable.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], optimizer: Optimizer | Sequence[Optimizer]) -> None:
        self.models: list[nn.Module] = as_sequence(model, nn.Module, name="model")
        self.optimizers: list[Optimizer] = [
            unwrapped(one) for one in as_sequence(optimizer, Optimizer, name="optimizer")
        ]
        self.find()

    def find(self) -> None:
        """Looks for the parameters anew."""
        self.named = named_parameters(self.models)
        check_parameters(self.named, self.optimizers)
        self.optimized = self._held()

    def has_changed(self) -> bool:
        """Whether the optimizers have been given other parameters since."""
        held = self._held()
        return len(held) != len(self.optimized) or not all(map(operator.is_, held, self.optimized))

    def _held(self) -> list[nn.Parameter]:
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        return list(itertools.chain.from_iterable(groups))


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a framework's wrapper steps; one of another kind is refused.

    Raises:
        ParameterError: a wrapper that is not known, or one that scales losses.
    """
    kind, inner = type(optimizer), getattr(optimizer, "optimizer", None)
    if not isinstance(inner, Optimizer):
        inner = None
    if inner is not None and any(base.__module__.startswith(_WRAPPERS) for base in kind.__mro__):
        if getattr(optimizer, "scaler", None) is not None:
            raise ParameterError(
                f"{kind.__name__} holds a GradScaler, which would scale what is scaled here too. Pass "
                "optimizer=optimizer.optimizer and scaler=optimizer.scaler."
            )
        return unwrapped(inner)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # Optimizer.__init__ was never run
        raise ParameterError(
            f"{kind.__name__} wraps {'an optimizer' if inner is None else 'a ' + type(inner).__name__} and has none of "
            "the hooks of a torch optimizer, by which steps made by hand are seen. Pass the optimizer inside of it"
            + (": optimizer.optimizer." if inner is not None else ".")
        )
    return optimizer


def named_parameters(models: Sequence[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of all models once, shared ones under their first name."""
    if len(models) == 1:
        return list(models[0].named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            found.setdefault(id(parameter), (f"{i}.{name}", parameter))
    return list(found.values())


def check_parameters(named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
    """That the optimizers train parameters of the models, each at most once, and at least one.

    Raises:
        ParameterError: they do not.
    """
    own = {id(parameter) for _, parameter in named}
    owned_by: dict[int, int] = {}
    trainable = 0
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in own:
                    raise ParameterError(
                        f"Parameter group {j} of {type(optimizer).__name__} holds a parameter of shape "
                        f"{tuple(parameter.shape)} that is none of the model's {len(own)}. Its gradient would be "
                        "neither normalised nor cleared. Pass every model that the optimizer trains: model=[first, "
                        "second]; a parameter that belongs to a loss goes into an nn.Module of its own."
                    )
                if owned_by.setdefault(id(parameter), i) != i:
                    raise ParameterError(
                        f"Two of the optimizers hold the same parameter of shape {tuple(parameter.shape)}; it would be "
                        "updated twice from one gradient. Give each parameter to one optimizer."
                    )
                trainable += parameter.requires_grad
    if not trainable:
        raise ParameterError(
            f"There is nothing to train: none of the {len(owned_by)} parameters of the optimizer requires a gradient. "
            "Every update would leave the model as it is. Call parameter.requires_grad_() on those to train, before "
            "the optimizer is made."
        )


def as_sequence(one_or_many: Any, kind: type, *, name: str) -> list[Any]:
    """The argument as a list, whether it was one object or a sequence of them."""
    many = [one_or_many] if isinstance(one_or_many, kind) else one_or_many
    if not isinstance(many, (list, tuple)) or not many or not all(isinstance(one, kind) for one in many):
        raise ParameterError(
            f"{name} must be a torch {kind.__name__} or a non-empty sequence of them, and is {_described(one_or_many)}."
        )
    return list(many)


def _described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of " + (
            ", ".join(type(one).__name__ for one in value[:_MAX_SHOWN]) or "nothing"
        )
    return f"a {type(value).__name__}"


def refuse_closures(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that evaluate the loss several times in one update."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                "LBFGS evaluates the loss several times for one update, and the batch is gone after the first. With "
                "the whole batch in hand: def closure(): optimizer.zero_grad(); return "
                "train_step.backward(batch).value, and optimizer.step(closure)."
            )


def refuse_data_parallel(models: Sequence[nn.Module]) -> None:
    """Refuses models that other processes would be waited for with, where only this one runs them."""
    for model in models:
        for module in model.modules():
            name = type(module).__name__
            if name in ("DistributedDataParallel", "FullyShardedDataParallel") or name.startswith("FSDP"):
                raise UnsupportedError(
                    f"The model is wrapped in {name}, whose forward and backward wait for other processes, and here "
                    "one process looks at it by itself. Pass the plain module, before it is wrapped."
                )
