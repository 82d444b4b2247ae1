"""Who is to blame: suspects are found by their own marks, taken out together, and let in again one at a time.

    layers   replacing samples changes the outputs of others      taken out: they see one sample at a time
    draws    something is drawn once for each forward             the same draw in all of them
    buffers  they advance with every forward                      put back before each
    loss     no shares, or not those that the library gives       its own shares; the whole batch's gradient on outputs

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
from gradaccum.checking.compare import different_buffers, relative_error
from gradaccum.checking.pieces import Piece
from gradaccum.checking.random_ops import ONCE, UNMATCHED

# Layers judged one by one; more are judged together, a whole batch and its micro-batches being run for each.
_MOST_SINGLE = 8


_Seen = TypeVar("_Seen")


def find_culprits(runs: Runs, cut: Sequence[Piece], *, tolerance: float, not_checked: list[str]) -> list[Culprit]:
    """Returns the culprits of a gradient that is not the whole batch's, the worst first.

    What cannot be looked at (code that stumbles over replaced samples, say) is added to ``not_checked``.
    """
    modules = runs.task.modules()
    not_replayed = dict(runs.draws.not_replayed)
    drawing = Substitutions(same_draws=bool(not_replayed))
    fails = "which layers couple samples: the forward fails when samples are replaced"
    coupled = attempted(lambda: coupling.coupled_modules(runs, cut[0], drawing), fails, not_checked) or {}
    layers = {name: is_norm for name, is_norm in coupled.items() if name in modules}
    clean = replace(drawing, isolated_layers=frozenset(layers), reset_buffers=True)
    loss = attempted(partial(find_loss_shares, runs, cut, clean), "what the loss is a mean over", not_checked)
    if loss is not None and loss.is_coupled and loss.output_gradients is not None:
        clean = replace(clean, output_gradients=loss.output_gradients)
    elif loss is not None:
        clean = replace(clean, loss_shares=loss.shares)

    def run_both(substitutions: Substitutions) -> tuple[RunResult, RunResult, float]:
        accumulated, whole = runs.accumulated(cut, substitutions), runs.whole(substitutions)
        return whole, accumulated, relative_error(accumulated.gradients, whole.gradients)

    rest = run_both(clean)[-1]
    is_unexplained = rest > tolerance
    background = rest if is_unexplained else 0.0

    accused: list[Culprit] = []

    def judge(let_in: Substitutions, accuse: Callable[[float], Sequence[Culprit]]) -> None:
        """Runs with one suspect alone let in; names whoever it is, if that moves the gradient."""
        error = run_both(let_in)[-1] - background
        if error > tolerance:
            accused.extend(accuse(error))

    for names in [[name] for name in layers] if len(layers) <= _MOST_SINGLE else [list(layers)]:
        let_in = replace(clean, isolated_layers=clean.isolated_layers - set(names))
        judge(let_in, partial(_layers, {name: (modules[name], layers[name]) for name in names}))
    if not_replayed:
        judge(replace(clean, same_draws=False), partial(_draws, not_replayed))
    own_loss = replace(clean, loss_shares=None, output_gradients=None)
    if loss is not None and own_loss != clean:
        judge(own_loss, partial(_loss, loss))
    whole, accumulated, error = run_both(replace(clean, reset_buffers=False))
    moved = error - background if error - background > tolerance else 0.0
    accused += buffer_culprits(modules, whole, accumulated, moved=moved, tolerance=tolerance, known=layers)
    if is_unexplained and loss is not None and own_loss == clean:
        accused += _loss(loss, rest)  # nothing takes it out, so it is what is left
    elif is_unexplained or not accused:
        accused.append(culprits.UNEXPLAINED.found(rest if is_unexplained else run_both(AS_IT_IS)[-1]))
    return sorted(accused, key=lambda culprit: -culprit.error)


def buffer_culprits(
    modules: Mapping[str, nn.Module],
    whole: RunResult,
    accumulated: RunResult,
    *,
    moved: float,
    tolerance: float,
    known: Container[str] = (),
) -> list[Culprit]:
    """Returns modules whose buffers end elsewhere than after the whole batch, other than those that are known already.

    ``moved`` is how far buffers that advance move the gradient; 0 where they do not.
    """
    errors: dict[str, dict[str, float]] = {}
    for (where, name), error in different_buffers(accumulated.buffers, whole.buffers, tolerance).items():
        if where not in known:
            errors.setdefault(where, {})[name] = error
    found: list[Culprit] = []
    for where, of_module in errors.items():
        error = moved or max(of_module.values())
        if is_batch_norm(modules[where]):
            found.append(culprits.BATCH_NORM.found(error, where))
            continue
        buffers = f"{', '.join(of_module)} of {type(modules[where]).__name__}"
        effect = (
            "so later micro-batches run through another network than the first."
            if moved
            else "so it ends elsewhere; the gradient is not affected."
        )
        found.append(culprits.BUFFER.found(error, where, buffers=buffers, effect=effect))
    return found


def _layers(layers: Mapping[str, tuple[nn.Module, bool]], error: float) -> list[Culprit]:
    return [
        culprits.BATCH_NORM.found(error, name)
        if is_norm or is_batch_norm(module)
        else culprits.COUPLING_LAYER.found(error, name, layer=type(module).__name__)
        for name, (module, is_norm) in layers.items()
    ]


def _draws(not_replayed: Mapping[tuple[str, str], str], error: float) -> list[Culprit]:
    found: list[Culprit] = []
    for place in dict.fromkeys(where for where, _ in not_replayed):
        parts: list[str] = []
        for why in (ONCE, UNMATCHED):
            draws = [what for (where, what), reason in not_replayed.items() if (where, reason) == (place, why)]
            parts += [f"{why}: {' and '.join(draws)}."] if draws else []
        found.append(culprits.RANDOM.found(error, place, draws=" ".join(parts)))
    return found


def _loss(loss: LossFinding, error: float) -> list[Culprit]:
    if loss.is_coupled and loss.shares is not None:
        return [culprits.LOSS_OF_SUMS.found(error)]
    if loss.is_coupled:
        return [culprits.LOSS_OF_PAIRS.found(error, unexplained=f"{100 * loss.residual:.2g}%")]
    instead = loss.instead or "return ga.Loss.mean(value, over=n) with the n that the mean was taken over."
    over = loss.over if loss.over == A_SUM else f"a mean over {loss.over}"
    return [culprits.WRONG_SHARES.found(error, over=over, taken=loss.taken, instead=instead)]


def attempted(look: Callable[[], _Seen], what: str, not_checked: list[str]) -> _Seen | None:
    """Returns what a look at the model finds; None, and a line in ``not_checked``, where the model cannot run so."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # the user's code runs in a way that it was not made for
        not_checked.append(f"{what}: {(str(error) or repr(error)).splitlines()[0]}")
        return None
