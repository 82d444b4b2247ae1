"""Who is to blame: suspects are found by their own marks, taken out together, and let in again one at a time.

    layers   replacing samples changes the outputs of others      taken out: they see one sample at a time
    set-up   the first forward writes parameters                   one forward runs before
    draws    something is drawn once for each forward             the same draw in all of them
    state    it advances with every forward                       put back before each
    loss     no shares, or not those that the library gives       its own shares; the whole batch's gradient on outputs
    backward twice the loss is not twice the gradient             nothing takes it out

The error of a culprit is the one it makes alone, all others taken out. A suspect that changes nothing is let go.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import nn

from gradaccum.auditing import coupling, culprits
from gradaccum.auditing.audit_run import AS_IT_IS, RunResult, Runs, Substitutions
from gradaccum.auditing.culprits import Culprit
from gradaccum.auditing.isolate_samples import is_batch_norm
from gradaccum.auditing.loss_shares import A_SUM, LossFinding, find_loss_shares
from gradaccum.auditing.try_remedies import CHANGES_CODE, Remedies, worked
from gradaccum.checking.compare import different_buffers, relative_error
from gradaccum.checking.isolate_state import copy_state
from gradaccum.checking.pieces import Piece
from gradaccum.checking.random_ops import ONCE, UNMATCHED
from gradaccum.errors import GradAccumError

# Layers judged one by one; more are judged together, a whole batch and its micro-batches being run for each.
_MOST_SINGLE = 8


_Seen = TypeVar("_Seen")


def find_culprits(
    runs: Runs,
    cut: Sequence[Piece],
    as_it_is: tuple[RunResult, RunResult],
    *,
    tolerance: float,
    not_checked: list[str],
) -> list[Culprit]:
    """Returns the culprits of a gradient that is not the whole batch's, the worst first.

    ``as_it_is`` are the runs that show it, whole and accumulated. What cannot be looked at (code that stumbles over
    replaced samples, say) is added to ``not_checked``.
    """
    modules = runs.task.modules()
    not_replayed = dict(runs.draws.not_replayed)
    written = _written_parameters(modules, *as_it_is, tolerance)
    drawing = Substitutions(same_draws=bool(not_replayed), starts_after_forward=bool(written))
    fails = "which layers couple samples: the forward fails when samples are replaced"
    coupled = attempted(lambda: coupling.coupled_modules(runs, cut[0], drawing), fails, not_checked) or {}
    layers = {name: is_norm or is_batch_norm(modules[name]) for name, is_norm in coupled.items() if name in modules}

    def run_both(substitutions: Substitutions) -> tuple[RunResult, RunResult, float]:
        accumulated, whole = runs.accumulated(cut, substitutions), runs.whole(substitutions)
        return whole, accumulated, relative_error(accumulated.gradients, whole.gradients)

    # In lockstep forwards run side by side, and there is no state between them to go back to.
    is_lockstep = runs.task.options.is_lockstep
    clean = replace(drawing, isolated_layers=frozenset(layers), resets_state=not is_lockstep)
    stuck: dict[str, bool] = {}  # layers that cannot be taken out: in lockstep all micro-batches meet in them
    if is_lockstep and not all(layers.values()):
        try:
            run_both(clean)
        except GradAccumError:
            stuck = {name: False for name, is_norm in layers.items() if not is_norm}
            layers = {name: True for name, is_norm in layers.items() if is_norm}
            clean = replace(clean, isolated_layers=frozenset(layers))
    loss = attempted(partial(find_loss_shares, runs, cut, clean), "what the loss is a mean over", not_checked)
    is_innocent = loss is not None and loss.is_taken_rightly
    if loss is not None and loss.is_coupled and loss.output_gradients is not None:
        clean = replace(clean, output_gradients=loss.output_gradients)
    elif loss is not None and not is_innocent:
        clean = replace(clean, loss_shares=loss.shares)

    rest = run_both(clean)[-1]
    is_unexplained = rest > tolerance
    background = rest if is_unexplained else 0.0
    remedies = Remedies(runs, cut, tolerance=tolerance, rest=rest)

    accused: list[Culprit] = []

    def judge(let_in: Substitutions, accuse: Callable[[float], Sequence[Culprit]]) -> None:
        """Runs with one suspect alone let in; names whoever it is, if that moves the gradient."""
        error = run_both(let_in)[-1] - background
        if error > tolerance:
            accused.extend(accuse(error))

    for names in [[name] for name in layers] if len(layers) <= _MOST_SINGLE else [list(layers)]:
        let_in = replace(clean, isolated_layers=clean.isolated_layers - set(names))
        judge(let_in, partial(_layers, {name: (modules[name], layers[name]) for name in names}))
    if any(culprit.kind == "batch-norm" for culprit in accused):
        norms = {name for name, is_norm in layers.items() if is_norm}
        accused = remedies.of_batch_norm(accused, replace(clean, isolated_layers=clean.isolated_layers - norms))
    if written:
        judge(replace(clean, starts_after_forward=False), partial(_set_up, modules, written, worked(rest, tolerance)))
    if not_replayed:
        judge(replace(clean, same_draws=False), partial(_draws, not_replayed))
    own_loss = replace(clean, loss_shares=None, output_gradients=None)
    if loss is not None and own_loss != clean:
        judge(own_loss, partial(_loss, loss, remedies, own_loss))
    moving = replace(clean, resets_state=False)
    whole, accumulated, error = run_both(moving)
    moved = error - background if error - background > tolerance else 0.0
    known = {*(name for name, is_norm in layers.items() if is_norm), *written}
    found = buffer_culprits(modules, whole, accumulated, moved=moved, tolerance=tolerance, known=known)
    accused += remedies.of_buffers(found, moving)
    if is_unexplained and stuck:
        accused += _layers({name: (modules[name], False) for name in stuck}, rest)
    elif is_unexplained and loss is not None and loss.is_coupled and own_loss == clean:
        accused += _loss(loss, remedies, own_loss, rest)  # nothing takes it out, so it is what is left
    elif is_unexplained or not accused:
        accused.append(_unexplained(runs, clean, is_innocent, rest if is_unexplained else run_both(AS_IT_IS)[-1],
                                    tolerance))  # fmt: skip
    return sorted(accused, key=lambda culprit: -culprit.error)


def _written_parameters(
    modules: Mapping[str, nn.Module], whole: RunResult, accumulated: RunResult, tolerance: float
) -> dict[str, list[str]]:
    """Parameters that forwards leave otherwise than the whole batch's does, by module."""
    found: dict[str, list[str]] = {}
    for where, name in different_buffers(accumulated.state, whole.state, tolerance):
        if name in modules[where]._parameters:
            found.setdefault(where, []).append(name)
    return found


def buffer_culprits(
    modules: Mapping[str, nn.Module],
    whole: RunResult,
    accumulated: RunResult,
    *,
    moved: float,
    tolerance: float,
    known: Container[str] = (),
) -> list[Culprit]:
    """Returns modules whose state ends elsewhere than after the whole batch, other than those that are known already.

    ``moved`` is how far state that advances moves the gradient; 0 where it does not.
    """
    different = different_buffers(accumulated.state, whole.state, tolerance)
    if moved and all(where in known for where, _ in different):  # a sum over samples ends where the whole batch's does
        different = different_buffers(accumulated.state, copy_state(modules), tolerance)
    errors: dict[str, dict[str, float]] = {}
    for (where, name), error in different.items():
        if where not in known:
            errors.setdefault(where, {})[name] = error
    found: list[Culprit] = []
    for where, of_module in errors.items():
        error = moved or max(of_module.values())
        if is_batch_norm(modules[where]) and "running_mean" in of_module:
            found.append(culprits.BATCH_NORM.found(error, where, options=""))
            continue
        buffers = f"{', '.join(of_module)} of {type(modules[where]).__name__}"
        effect = (
            "so later micro-batches run through another network than the first."
            if moved
            else "so it ends elsewhere; the gradient is not affected."
        )
        remedy = culprits.ADVANCE_IN_EVAL
        found.append(culprits.BUFFER.found(error, where, buffers=buffers, effect=effect, remedy=remedy))
    return found


def _layers(layers: Mapping[str, tuple[nn.Module, bool]], error: float) -> list[Culprit]:
    found: list[Culprit] = []
    for name, (module, is_norm) in layers.items():
        layer = type(module).__name__
        if is_norm:
            found.append(culprits.BATCH_NORM.found(error, name, options=""))
        elif getattr(module, "batch_first", True) is False:
            found.append(culprits.WRONG_AXIS.found(error, name, layer=layer, tried=CHANGES_CODE))
        else:
            found.append(culprits.COUPLING_LAYER.found(error, name, layer=layer, tried=CHANGES_CODE))
    return found


def _set_up(
    modules: Mapping[str, nn.Module], written: Mapping[str, Sequence[str]], tried: str, error: float
) -> list[Culprit]:
    return [
        culprits.SET_UP_BY_DATA.found(
            error, where, tensors=" and ".join(names), layer=type(modules[where]).__name__, tried=tried
        )
        for where, names in written.items()
    ]


def _draws(not_replayed: Mapping[tuple[str, str], str], error: float) -> list[Culprit]:
    found: list[Culprit] = []
    for place in dict.fromkeys(where for where, _ in not_replayed):
        parts: list[str] = []
        for why in (ONCE, UNMATCHED):
            draws = [what for (where, what), reason in not_replayed.items() if (where, reason) == (place, why)]
            parts += [f"{why}: {' and '.join(draws)}."] if draws else []
        found.append(culprits.RANDOM.found(error, place, draws=" ".join(parts), tried=CHANGES_CODE))
    return found


def _loss(loss: LossFinding, remedies: Remedies, own_loss: Substitutions, error: float) -> list[Culprit]:
    if not loss.is_coupled:
        over = loss.over if loss.over == A_SUM else f"a mean over {loss.over}"
        fault = culprits.WRONG_SHARES
        return [fault.found(error, over=over, taken=loss.taken, instead=loss.instead, tried=remedies.of_shares())]
    fault = culprits.LOSS_OF_PAIRS if loss.shares is None else culprits.LOSS_OF_SUMS
    found = fault.found(error, unexplained=f"{100 * loss.residual:.2g}%", tried=remedies.of_batch_loss(loss))
    return [remedies.of_coupled_loss(found, own_loss)]


def _unexplained(runs: Runs, clean: Substitutions, is_innocent: bool, error: float, tolerance: float) -> Culprit:
    """What is left: a backward that is not linear in the loss, or nothing that is known."""
    once, twice = runs.whole(clean).gradients, runs.whole(replace(clean, loss_scale=2.0)).gradients
    doubled = {name: None if one is None else 2 * one for name, one in once.items()}
    if relative_error(twice, doubled) > tolerance:
        off = {name: relative_error({name: twice[name]}, {name: one}) for name, one in doubled.items()}
        worst = max(off, key=lambda name: off[name])
        where = worst.rpartition(".")[0] or next(iter(runs.task.modules()))
        return culprits.INJECTED.found(error, where, tried=CHANGES_CODE)
    remedy = "" if is_innocent or runs.task.loss_fn is None else culprits.IF_IT_IS_THE_LOSS
    return culprits.UNEXPLAINED.found(error, remedy=remedy, tried=CHANGES_CODE)


def attempted(look: Callable[[], _Seen], what: str, not_checked: list[str]) -> _Seen | None:
    """Returns what a look at the model finds; None, and a line in ``not_checked``, where the model cannot run so."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # the user's code runs in a way that it was not made for
        not_checked.append(f"{what}: {(str(error) or repr(error)).splitlines()[0]}")
        return None
