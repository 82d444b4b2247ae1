r"""What is each micro-batch's share of the whole batch's loss? Solved from gradients, not read off a signature.

    grad L  =  \sum_j  a_j * grad l_j            a_j: the share of micro-batch j

If shares a_j exist, the loss is a mean (or a sum) over something, and comparing them with counts tells over what:
rows, targets that are not ignored, class weights, a mask. If shares exist that fit no count, or none exist at all,
samples meet in the loss itself: it is a function of the whole batch.

Two places to look at gradients. On the model's *outputs* the model does not matter: the whole batch's outputs are put
in the place of a micro-batch's, cut into rows, and the shares solved one micro-batch at a time. Where that cannot be
(the model computes the loss itself, or is called in parts) on the *parameters*, by least squares, with the layers that
couple samples isolated first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.auditing.audit_run import Run, Runs, Substitutions, loss_value
from gradaccum.auditing.in_double import no_modes
from gradaccum.checking.compare import Gradients, flat
from gradaccum.checking.pieces import Piece, whole
from gradaccum.losses.loss import Loss
from gradaccum.losses.meaning import means_in

# What is left of a gradient that shares do not explain, in float64: rounding leaves 1e-14, a coupled loss 1e-2.
_EXPLAINED = 1e-7
# Shares are compared with counts to this part: class weights in float32 add up to 1e-7.
_SAME = 1e-6
_MOST_COORDINATES = 1 << 20
_IGNORED = (-100, -1, 0)

A_SUM, SAMPLES, WHAT_IT_SAYS = "a plain sum", "samples", "what it says"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFinding:
    """What the loss is."""

    is_coupled: bool  # whether samples meet in it; otherwise it is a mean or a sum over something
    shares: tuple[float, ...] | None = None  # of each micro-batch in the whole
    over: str = ""  # what the shares are proportional to, in words; "" where to nothing that is known
    instead: str = ""  # what to return in place of the loss
    taken: str = ""  # how the library takes it, in words
    residual: float = 0.0  # what shares leave unexplained, of the gradient
    output_gradients: tuple[Tensor, ...] | None = None  # the whole batch's on the outputs, where it was seen

    @property
    def is_taken_rightly(self) -> bool:
        """Whether the library gives each micro-batch the share that it has."""
        is_plain = (self.over, self.taken) in ((SAMPLES, f"a mean over {SAMPLES}"), (A_SUM, A_SUM))
        return not self.is_coupled and (is_plain or self.over == WHAT_IT_SAYS)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What one micro-batch's loss shows of itself."""

    means: list[tuple[float, str, str]]  # of its graph: what they were taken over, in words, and what to return instead
    declared: float | None  # the count it was returned with
    taken: str  # how the library takes it, in words
    is_inside: bool  # whether the model computes it, where no criterion can be put in its place


_Solved = tuple[LossFinding, list[_Counts]]  # with shares and what they leave unexplained, but no meaning yet


def find_loss_shares(runs: Runs, cut: Sequence[Piece], substitutions: Substitutions) -> LossFinding | None:
    """Returns what the loss is, with other suspects taken out; None where it cannot be seen."""
    if runs.task.loss_fn is None:
        return None
    try:
        solved = _solve_on_outputs(runs, cut, substitutions)
    except Exception:  # noqa: BLE001  # a loss function that writes into outputs, or calls parts of the model as well
        solved = None
    solved = solved or _solve_on_parameters(runs, cut, substitutions)
    if solved is None:
        return None
    found, counts = solved
    if found.residual > _EXPLAINED:
        return replace(found, shares=None)
    assert found.shares is not None
    over, instead = _meaning(runs.task.batch, cut, found.shares, counts)
    return replace(found, is_coupled=not over, over=over, instead=instead, taken=counts[0].taken)


class _CutOutputs:
    """Forward hook that cuts the graph behind the models' outputs."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []  # stand for the outputs of the last forward, those that had a graph
        self.served: Iterator[Tensor] | None = None  # rows of the whole batch's outputs, in place of a piece's own

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return tree.map_leaves(output, self._cut)

    def _cut(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.requires_grad:
            return leaf
        leaf = (leaf if self.served is None else next(self.served)).detach().clone().requires_grad_()
        self.leaves.append(leaf)
        return leaf


def _solve_on_outputs(runs: Runs, cut: Sequence[Piece], substitutions: Substitutions) -> _Solved | None:
    task, rows = runs.task, runs.task.rows
    hook = _CutOutputs()
    with runs.running(substitutions) as run:
        for model in task.models:  # the hooks go with all attributes of the modules
            model.register_forward_hook(hook)
        _, value = _forward(run, whole(rows))
        outputs = hook.leaves
        if not outputs or not all(one.dim() and one.shape[0] == rows and rows not in one.shape[1:] for one in outputs):
            return None
        parameters = [one for model in task.models for one in model.parameters() if one.requires_grad]
        of_whole, around = _gradients(value, outputs), _gradients(value, parameters)
        if any(one.any() for one in around) or not any(one.any() for one in of_whole):
            return None  # the loss depends on parameters other than through the outputs, or on nothing
        shares: list[float] = []
        counts: list[_Counts] = []
        unexplained = 0.0
        for piece in cut:
            hook.served, hook.leaves = iter([output[piece.where] for output in outputs]), []
            loss, value = _forward(run, piece)
            own = torch.cat([flat(one) for one in _gradients(value, hook.leaves)]).nan_to_num(0.0, 0.0, 0.0)
            expected = torch.cat([flat(one[piece.where]) for one in of_whole])
            square = (own @ own).item()
            shares.append((own @ expected).item() / square if square > 0 else 0.0)
            unexplained += (expected - shares[-1] * own).square().sum().item()
            counts.append(_counts(run, loss, value))
        residual = math.sqrt(unexplained / sum(flat(one).square().sum().item() for one in of_whole))
        on_outputs = tuple(one.clone() for one in of_whole)
        found = LossFinding(is_coupled=True, shares=tuple(shares), residual=residual, output_gradients=on_outputs)
        return found, counts


def _forward(run: Run, piece: Piece) -> tuple[Any, Tensor]:
    """What the loss function returns for a piece, and the number that it stands for."""
    loss = run.call(piece, run.cut(piece))
    return loss, loss_value(loss, piece.rows)


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [one.detach() for one in found]


def _solve_on_parameters(runs: Runs, cut: Sequence[Piece], substitutions: Substitutions) -> _Solved | None:
    """Least squares over the parameters' gradients, at as many coordinates as are cheap to keep."""
    gradients = runs.whole(substitutions).gradients
    names = [name for name, gradient in gradients.items() if gradient is not None]
    expected = _sampled(gradients, names)
    each: list[Tensor] = []
    counts: list[_Counts] = []
    with runs.running(substitutions) as run:
        for piece in cut:
            loss, value = _forward(run, piece)
            counts.append(_counts(run, loss, value))
            each.append(_sampled(run.gradients(value), names).nan_to_num(0.0, 0.0, 0.0))
    if len(expected) < 2 * len(each) or not expected.norm() > 0:
        return None
    columns = torch.stack(each, dim=1)
    scale = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    shares = torch.linalg.lstsq(columns / scale, expected, driver="gelsd").solution / scale
    residual = ((expected - columns @ shares).norm() / expected.norm()).item()
    return LossFinding(is_coupled=True, shares=tuple(shares.tolist()), residual=residual), counts


def _sampled(gradients: Gradients, names: Sequence[str]) -> Tensor:
    present = [gradient for name in names if (gradient := gradients[name]) is not None]
    step = max(1, -(-sum(one.numel() for one in present) // _MOST_COORDINATES))
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(flat(one)[::step].cpu() for one in present)])


def _counts(run: Run, loss: Any, value: Tensor) -> _Counts:
    declared, taken = None, f"a mean over {SAMPLES}"
    if isinstance(loss, Loss):
        declared = None if loss.weight is None else float(loss.weight)
        taken = A_SUM if loss.weight is None else "a mean over the count it was returned with"
    elif isinstance(loss, Mapping):
        taken = "terms with the counts they were returned with"
    with no_modes():
        found = [(float(mean.count), mean.what, mean.instead) for mean in means_in(value)]
    is_inside = any(output.requires_grad and output.dim() == 0 for output in run.outputs)
    return _Counts(found, declared, taken, is_inside)


def _meaning(batch: Any, cut: Sequence[Piece], shares: Sequence[float], counts: list[_Counts]) -> tuple[str, str]:
    """What shares are proportional to, and what to return instead; empty where to nothing that is known."""
    if all(abs(share - 1) <= _SAME for share in shares):
        return A_SUM, "return ga.Loss.sum(loss)"
    if abs(sum(shares) - 1) > _SAME:
        return "", ""

    def fits(candidate: Sequence[float]) -> bool:
        total = sum(candidate)
        pairs = zip(shares, candidate, strict=True)
        return total > 0 and all(abs(share - count / total) <= _SAME for share, count in pairs)

    told = [one.declared or 0.0 for one in counts]
    of_loss = [
        (WHAT_IT_SAYS, "", told),
        (
            SAMPLES,
            "return the loss as a plain tensor, which is taken as a mean over samples",
            [piece.rows for piece in cut],
        ),
    ]
    of_graph = (
        (means[0][1], f"return {_assigned(means[0][2])}", [count for count, _, _ in means])
        for means in zip(*(one.means for one in counts), strict=False)
    )
    of_batch = _counts_of_batch(batch, cut)
    candidates = chain(of_loss, *((of_batch, of_graph) if counts[0].is_inside else (of_graph, of_batch)))
    return next(((words, instead) for words, instead, candidate in candidates if fits(candidate)), ("", ""))


def _assigned(instead: str) -> str:
    """The way a guard words it, after "return"."""
    return instead.removeprefix("criterion = ").replace(" and criterion(", "(") if " and " in instead else instead


def _counts_of_batch(batch: Any, cut: Sequence[Piece]) -> Iterator[tuple[str, str, list[float]]]:
    """Counts that a loss may be taken over, from what is in the batch: labels that are not ignored, then masks."""
    rows = sum(piece.rows for piece in cut)
    columns = [
        (path, [leaf[piece.where] for piece in cut])
        for path, leaf in tree.named_leaves(batch, "micro_batch")
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows and not leaf.is_complex()
    ]
    for ignored in _IGNORED:
        for path, parts in columns:
            if parts[0].is_floating_point() or parts[0].dtype == torch.bool:
                continue
            counts = [float((part != ignored).sum()) for part in parts]
            yield f"entries of {path} that are not {ignored}", _over(f"({path} != {ignored})"), counts
            if parts[0].dim() > 1:  # the model predicts the next token, and the first one is predicted from nothing
                counts = [float((part[:, 1:] != ignored).sum()) for part in parts]
                words = f"entries of {path}, after the first of each sample, that are not {ignored}"
                yield words, _over(f"({path}[:, 1:] != {ignored})"), counts
    for path, parts in columns:
        yield f"the sum of {path}", _over(path), [float(part.sum()) for part in parts]


def _over(summed: str) -> str:
    return f"return ga.Loss.mean(loss, over={summed}.sum())"
