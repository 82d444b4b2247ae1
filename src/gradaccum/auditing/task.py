"""What is audited, and what may be taken out of it to see what difference that makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Without:
    """Faults that are taken out of a run, on both sides.

    Attributes:
        layers: names of modules that are made to see one sample at a time (BatchNorm: its running statistics).
        draws: what is drawn once for each forward is drawn alike in all of them.
        states: buffers start every forward as they started the first.
        shares: of the micro-batches' losses in the whole, in place of those that the library gives them.
        pull: the gradient on the model's outputs that the whole batch's loss has, in place of each micro-batch's own.
        nudge: no fault: by what part every parameter is moved, up or down, to see how far rounding may go.
    """

    layers: frozenset[str] = frozenset()
    draws: bool = False
    states: bool = False
    shares: tuple[float, ...] | None = None
    pull: tuple[Tensor, ...] | None = None
    nudge: float = 0.0


NOTHING = Without()
