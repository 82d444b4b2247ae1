"""What is audited."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradaccum.fit.workload import Workload
from gradaccum.whole_batch.runners import Combine
from gradaccum.window.weights import WeightsFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Workload):
    """A workload, of two rows at least, that is audited.

    Attributes:
        combine: how outputs become the whole batch's.
        weights: counts what plain means of the loss are taken over; None where the user did not say.
    """

    combine: Combine = "concat"
    weights: WeightsFunction | None

    def modules(self) -> dict[str, nn.Module]:
        """Every module by its qualified name, a model itself by its class's."""
        found: dict[str, nn.Module] = {}
        for i, model in enumerate(self.models):
            prefix = f"{i}." if len(self.models) > 1 else ""
            for name, module in model.named_modules():
                found[prefix + (name or type(module).__name__)] = module
        return found
