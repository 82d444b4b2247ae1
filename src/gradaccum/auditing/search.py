"""Who is to blame: suspects are found by their own marks, taken out in turn, and convicted by what that changes.

    layers   replacing samples changes the outputs of others      made harmless: one sample at a time
    draws    something is drawn once for each forward             drawn alike in all of them
    states   buffers advance with every forward                   put back before each
    loss     no shares, or not those that the library gives       the shares it has; the whole batch's pull on outputs

The error of a culprit is the one it makes alone, all others taken out. A suspect that changes nothing is let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gradaccum.auditing import coupling, loss_weights, remedies
from gradaccum.auditing.gradients import Runs
from gradaccum.auditing.loss_weights import COUPLED, MEAN, UNKNOWN, LossFinding
from gradaccum.auditing.neutral import is_batch_norm
from gradaccum.auditing.report import Culprit
from gradaccum.auditing.states import differences
from gradaccum.auditing.task import Without
from gradaccum.auditing.verdicts import relative_error

# Layers judged one by one; more are judged together, a whole batch and its micro-batches being run for each.
_MOST_SINGLE = 8


def find(runs: Runs, sizes: Sequence[int], *, tolerance: float, not_checked: list[str]) -> list[Culprit]:
    """The culprits of a gradient that is not the whole batch's, the worst first.

    What cannot be looked at (code that stumbles over replaced samples, say) is added to ``not_checked``.
    """
    once, unmatched = list(runs.draws.once), list(runs.draws.unmatched)
    drawn = [*once, *unmatched]
    modules = runs.task.modules()
    around = Without(draws=bool(drawn))
    layers: dict[str, bool] = {}
    try:
        layers = {name: is_norm for name, is_norm in coupling.coupled_modules(runs, around).items() if name in modules}
    except Exception as failure:  # noqa: BLE001  # the user's code runs on samples that it was not made for
        not_checked.append(
            f"which layers couple samples: the forward fails when samples are replaced: {_said(failure)}"
        )
    clean = Without(layers=frozenset(layers), draws=bool(drawn), states=True)
    loss = LossFinding(kind=MEAN if runs.task.loss_fn is None else UNKNOWN)
    try:
        loss = loss if runs.task.loss_fn is None else loss_weights.find(runs, sizes, clean)
    except Exception as failure:  # noqa: BLE001  # the same, with layers that see one sample at a time
        not_checked.append(f"what the loss is a mean over: {_said(failure)}")
    clean = _without_loss(clean, loss)

    def error(without: Without) -> float:
        return relative_error(runs.accumulated(sizes, without).gradients, runs.whole(without).gradients)

    rest = error(clean)
    is_loss_in = loss.kind == COUPLED and clean.pull is None and clean.shares is None

    def alone(without: Without) -> float:
        return max(error(without) - (rest if rest > tolerance else 0.0), 0.0)

    found = _layers(runs, layers, clean, alone, tolerance)
    if drawn:
        moved = alone(replace(clean, draws=False))
        if moved > tolerance:
            found += [
                remedies.random(place, _at(place, once), _at(place, unmatched), moved)
                for place in dict.fromkeys(where for where, _ in drawn)
            ]
    found += buffers(runs, sizes, replace(clean, states=False), alone, tolerance, known=set(layers))
    moved = rest if is_loss_in else alone(replace(clean, shares=None, pull=None)) if runs.task.loss_fn else 0.0
    if moved > tolerance and loss.kind != UNKNOWN:
        found.append(remedies.loss(loss, moved))
    if (rest > tolerance and not is_loss_in) or not found:
        found.append(remedies.unexplained(rest if rest > tolerance else error(Without())))
    return sorted(found, key=lambda culprit: -culprit.error)


def buffers(
    runs: Runs,
    sizes: Sequence[int],
    without: Without,
    alone: Callable[[Without], float],
    tolerance: float,
    *,
    known: set[str],
) -> list[Culprit]:
    """Modules whose buffers end elsewhere than after the whole batch, other than those that are known already."""
    whole, accumulated = runs.whole(without), runs.accumulated(sizes, without)
    apart = {
        key: off
        for key, off in differences(whole.after, accumulated.after, tolerance=tolerance).items()
        if key[0] not in known
    }
    if not apart:
        return []
    moved = alone(without)
    modules = runs.task.modules()
    found: list[Culprit] = []
    for where in dict.fromkeys(where for where, _ in apart):
        names = [name for other, name in apart if other == where]
        off = max(apart[where, name] for name in names)
        if is_batch_norm(modules[where]):
            found.append(remedies.batch_norm(where, moved if moved > tolerance else off))
        else:
            said = f"{', '.join(names)} of {type(modules[where]).__name__}"
            is_moved = moved > tolerance
            found.append(remedies.buffer(where, said, moved if is_moved else off, moves_gradient=is_moved))
    return found


def _layers(
    runs: Runs, layers: Mapping[str, bool], clean: Without, alone: Callable[[Without], float], tolerance: float
) -> list[Culprit]:
    modules = runs.task.modules()
    single = len(layers) <= _MOST_SINGLE
    together = 0.0 if single or not layers else alone(replace(clean, layers=frozenset()))
    found: list[Culprit] = []
    for name in layers:
        moved = alone(replace(clean, layers=clean.layers - {name})) if single else together
        if moved > tolerance:
            module = modules[name]
            is_norm = layers[name] or is_batch_norm(module)
            found.append(
                remedies.batch_norm(name, moved) if is_norm else remedies.layer(name, type(module).__name__, moved)
            )
    return found


def _without_loss(clean: Without, loss: LossFinding) -> Without:
    if loss.kind == MEAN and loss.shares is not None:
        return replace(clean, shares=loss.shares)
    if loss.kind == COUPLED:
        if loss.pull is not None:
            return replace(clean, pull=loss.pull)
        if loss.shares is not None:
            return replace(clean, shares=loss.shares)
    return clean


def _said(failure: Exception) -> str:
    return (str(failure) or repr(failure)).splitlines()[0]


def _at(place: str, drawn: Sequence[tuple[str, str]]) -> list[str]:
    return [what for where, what in drawn if where == place]
