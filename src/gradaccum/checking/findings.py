"""What a look found, in words: who is to blame for a difference, and what can be done about it.

a layer     a module's outputs depend on who shares its micro-batch, though its inputs do not     a warning
a state     forwards leave another buffer, parameter or attribute behind, or the loss function    a warning
a backward  values add up and the gradients that the loss hands out agree, parameters' do not     a warning
the loss    nothing of these                                                                      an error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.checking.look_run import Draw, Look, Side
from gradaccum.checking.loss_fault import loss_fault
from gradaccum.checking.module_outputs import Recording, are_gradients_alike, first_difference
from gradaccum.errors import GradAccumError
from gradaccum.window.plan_line import NOT_CHECKED

_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a look found.

    Attributes:
        evidence: for the plan line.
        error: to be raised: the loss does not add up.
        warning: to be given: a layer, a state or a backward depends on how the batch is cut.
        is_value_off: no gradient differs, and the value of the loss does: by chance perhaps, as another cut may show.
    """

    evidence: str
    error: GradAccumError | None = None
    warning: str | None = None
    is_value_off: bool = False

    @property
    def is_fault(self) -> bool:
        """Whether there is an error or a warning."""
        return self.error is not None or self.warning is not None

    @property
    def severity(self) -> int:
        """Of several findings the largest counts."""
        return 3 if self.error else 2 if self.warning else int(self.evidence.startswith(NOT_CHECKED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two sides that differ.

    Attributes:
        whole, parts: the sides.
        sizes: of the pieces, in atoms of the look.
        samples: the same in samples.
        off: how far the gradient of the pieces is from that of the rows together.
        state: what forwards left otherwise, with its relative error.
        tolerance: above which a difference is none of rounding.
        draw: how random numbers were drawn.
    """

    whole: Side
    parts: Side
    sizes: Sequence[int]
    samples: Sequence[int]
    off: float
    state: Mapping[tuple[int, str], float]
    tolerance: float
    draw: Draw

    @property
    def is_any(self) -> bool:
        """Whether there is a difference at all."""
        return self.off > self.tolerance or bool(self.state)

    @property
    def cut(self) -> str:
        """The cut in words."""
        return f"{sum(self.samples)} samples together and {' + '.join(map(str, self.samples))}"


def blame(look: Look, seen: Difference, recordings: tuple[Recording, Recording] | None) -> Finding:
    """Finds out who is to blame for a difference.

    Args:
        look: the rows at hand.
        seen: the difference.
        recordings: what modules returned, of the rows together and of the pieces; None where it could not be recorded.
    """
    found = _layer(look, seen, recordings)
    states = _by_module(seen.state)
    if found is not None:
        module = look.modules[found[0]]
        name = look.names[found[0]]
        if name in look.step.coupled_batch_norms():  # of which is warned already
            return Finding(evidence=f"{NOT_CHECKED} beyond BatchNorm: {name} depends on the micro-batch in any mode")
        if not states or isinstance(module, _BatchNorm):
            return _finding_of_layer(look, seen, found[0], found[1])
    if states:
        return _finding_of_state(look, seen, states)
    if recordings is not None and _is_in_the_backward(look, seen, recordings):
        return _finding_of_backward(look, seen)
    error = loss_fault(look, seen.whole, seen.parts, seen.sizes, seen.samples, seen.off, seen.tolerance, seen.draw)
    if error is None:
        return _finding_of_own_state(seen)
    return Finding(evidence="not exact: the loss does not add up", error=error)


def _layer(look: Look, seen: Difference, recordings: tuple[Recording, Recording] | None) -> tuple[int, float] | None:
    if recordings is None or not seen.off > seen.tolerance:
        return None
    whole, parts = recordings
    if not whole.forwards or len(parts.forwards) < len(seen.sizes):
        return None
    found = first_difference(
        whole.forwards[0], parts.forwards[: len(seen.sizes)], seen.samples, tolerance=10 * seen.tolerance
    )
    if found is None:
        return None
    module = look.modules.get(found[0])
    # A loss that is a module, with one number for each sample.
    is_loss = module is None or (
        found[0] not in look.own and not any(True for _ in (*module.parameters(), *module.buffers()))
    )
    return None if is_loss else found


def _is_in_the_backward(look: Look, seen: Difference, recordings: tuple[Recording, Recording]) -> bool:
    whole, parts = recordings
    adds_up = abs(seen.parts.loss - seen.whole.loss) <= seen.tolerance * max(abs(seen.whole.loss), 1e-30)
    if not adds_up or not whole.forwards or look.step.options.loss_fn is None:
        return False
    forwards = parts.forwards[: len(seen.sizes)]
    return are_gradients_alike(whole.forwards[0], forwards, seen.samples, tolerance=10 * seen.tolerance)


def _finding_of_layer(look: Look, seen: Difference, key: int, off: float) -> Finding:
    module, name = look.modules[key], look.names[key]
    kind = type(module).__name__
    text = (
        f"What {name} ({kind}) returns for a sample depends on the samples that share its micro-batch: on {seen.cut} "
        f"its outputs differ by {off:.2g} of their size, and the gradient by {seen.off:.2g}. The gradient is not the "
        f"whole batch's. {_remedy_of_layer(look, key)}"
    )
    return Finding(evidence=f"not exact: {name} ({kind}) sees the micro-batch", warning=text)


def _remedy_of_layer(look: Look, key: int) -> str:
    module = look.modules[key]
    if isinstance(module, _BatchNorm) and key not in look.own:
        return (
            "It is in training mode, and no part of the models that train here. Call .eval() on its network for this "
            'loss, or pass that network too: model=[model, other] with batch_norm="exact".'
        )
    if isinstance(module, _BatchNorm):
        return (
            "It has a forward of its own, which batch_norm= does not reach. Use nn.BatchNorm, GroupNorm or LayerNorm."
        )
    if key in look.own:
        return (
            "Statistics over the batch: with lockstep=True and x = ga.gather(x) before they are taken, they are those "
            "of the whole batch; per-sample layers (LayerNorm, GroupNorm) need none. If it is the loss that it makes, "
            "pass forward= and batch_loss=."
        )
    return (
        "It is no part of the models that train here. Use a per-sample layer in its place, or its .eval() mode; no "
        "option of the step reaches it."
    )


def _finding_of_state(look: Look, seen: Difference, states: Mapping[int, list[str]]) -> Finding:
    places = [f"{look.names[key]}.{name}" for key, names in states.items() for name in names]
    shown = ", ".join(places[:_MAX_SHOWN]) + (
        f" and {len(places) - _MAX_SHOWN} more" if len(places) > _MAX_SHOWN else ""
    )
    first = next(iter(states))
    kind = type(look.modules[first]).__name__
    changes = "change" if len(places) > 1 else "changes"
    gradient = f", and the gradient differs by {seen.off:.2g}" if seen.off > seen.tolerance else ""
    text = (
        f"{shown} (of {kind}) {changes} in every forward: once for a whole batch, and once for each micro-batch of it. "
        f"After {seen.cut} it is not the same{gradient}. {_remedy_of_state(look.modules[first])}"
    )
    return Finding(evidence=f"not exact: {places[0]} changes with every micro-batch", warning=text)


def _finding_of_own_state(seen: Difference) -> Finding:
    text = (
        "The loss function keeps something from one call to the next that is no module's buffer (a centre, an average, "
        "a queue, a counter): it moves once for a whole batch, and once for each micro-batch of it. On "
        f"{seen.cut} the gradient differs by {seen.off:.2g}. {_MOVED_ONCE}"
    )
    return Finding(evidence="not exact: what the loss function keeps moves with every micro-batch", warning=text)


_MOVED_ONCE = (
    "No option has a state advance once an update. Change it outside of the forward, once an update (after "
    "train_step(batch), with what the micro-batches have left), or not at all while training."
)


def _remedy_of_state(module: nn.Module) -> str:
    if isinstance(module, _BatchNorm):
        return (
            'batch_norm="exact" has it once an update for networks among the step\'s models; .eval() freezes it for '
            "others."
        )
    if "SpectralNorm" in type(module).__name__:
        return (
            "Spectral norm takes a step of power iteration in every forward in training mode. No option has it once an "
            "update: keep the network in .eval() mode for all forwards but one, or the update is another one than the "
            "whole batch's."
        )
    return _MOVED_ONCE


def _finding_of_backward(look: Look, seen: Difference) -> Finding:
    names = _worst_parameters(seen)
    hooked = [name for name, parameter in _named(look) if parameter._backward_hooks]
    hooks = f" Hooks on {', '.join(hooked[:_MAX_SHOWN])} see each micro-batch's gradient." if hooked else ""
    text = (
        f"The loss adds up, and what it hands to the models' outputs too, but the gradient of {', '.join(names)} does "
        f"not: on {seen.cut} it differs by {seen.off:.2g}.{hooks} Something in the backward adds to gradients, or "
        "changes them, without knowing which part of the batch it sees: a custom autograd.Function that injects a "
        "loss's gradient, or a hook that clamps. Return the injected term as a part of the loss, and do what is done "
        "to the batch's gradient right before the optimizer's step."
    )
    return Finding(evidence=f"not exact: the backward changes the gradient of {names[0]}", warning=text)


def _worst_parameters(seen: Difference) -> list[str]:
    errors: dict[str, float] = {}
    for name, expected in seen.whole.gradients.items():
        made = seen.parts.gradients.get(name)
        if expected is not None and made is not None:
            off = float(torch.linalg.vector_norm((made - expected).double()))
            if off > seen.tolerance * float(torch.linalg.vector_norm(expected.double())):
                errors[name] = off
    return sorted(errors, key=lambda name: -errors[name])[:_MAX_SHOWN] or ["the parameters"]


def _named(look: Look) -> list[tuple[str, nn.Parameter]]:
    return [pair for model in look.step.models for pair in model.named_parameters()]


def _by_module(state: Mapping[tuple[int, str], Any]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for key, name in state:
        found.setdefault(key, []).append(name)
    return found
