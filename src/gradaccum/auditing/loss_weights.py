r"""What is each micro-batch's share of the whole batch's loss? Solved from gradients, not read off a signature.

    grad L  =  \sum_j  a_j * grad l_j            a_j: the share of micro-batch j

If shares a_j exist, the loss is a mean (or a sum) over something, and comparing them with counts tells over what:
rows, targets that are not ignored, class weights, a mask. If shares exist that fit no count, or none exist at all,
samples meet in the loss itself: it is a function of the whole batch.

Two places to look at gradients. On the model's *outputs* the model does not matter: the whole batch's outputs are put
in the model's place, cut into rows, and the shares solved one micro-batch at a time. Where that cannot be (the model
computes the loss itself, or is called in parts) on the *parameters*, by least squares, with the layers that couple
samples made harmless first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.auditing.bench import Gradients, value_of
from gradaccum.auditing.gradients import Runs
from gradaccum.auditing.in_double import no_modes
from gradaccum.auditing.pieces import Piece, pieces, whole
from gradaccum.auditing.task import Without
from gradaccum.losses.loss import Loss
from gradaccum.losses.meaning import means_in

# What is left of a gradient that shares do not explain, in float64: rounding leaves 1e-14, a coupled loss 1e-2.
_EXPLAINED = 1e-7
# Shares are compared with counts to this part: class weights in float32 add up to 1e-7.
_SAME = 1e-6
_MOST_COORDINATES = 1 << 20
_IGNORED = (-100, -1, 0)

A_SUM, SAMPLES = "a plain sum", "a mean over samples"
MEAN, COUPLED, UNKNOWN = "mean", "coupled", "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFinding:
    """What the loss is.

    Attributes:
        kind: "mean" where each micro-batch has a share; "coupled" where there is none; "unknown" where it could not be
            seen.
        shares: of each micro-batch in the whole; None where there are none.
        over: what the shares are proportional to, in words; "" where to nothing that is known.
        instead: what to return in place of the loss.
        taken: how the library takes it, in words.
        residual: what shares leave unexplained, of the gradient.
        pull: the whole batch's gradient on the outputs, where it was seen.
    """

    kind: str
    shares: tuple[float, ...] | None = None
    over: str = ""
    instead: str = ""
    taken: str = ""
    residual: float = 0.0
    pull: tuple[Tensor, ...] | None = None


def find(runs: Runs, sizes: Sequence[int], without: Without) -> LossFinding:
    """Finds out what the loss is, with other faults taken out."""
    try:
        seen = _on_outputs(runs, sizes, without)
    except Exception:  # noqa: BLE001  # a loss function that writes into outputs, or calls parts of the model as well
        seen = None
    if seen is None:
        seen = _on_parameters(runs, sizes, without)
    if seen is None:
        return LossFinding(kind=UNKNOWN)
    shares, residual, values, pull = seen
    if residual > _EXPLAINED:
        return LossFinding(kind=COUPLED, residual=residual, pull=pull)
    over, instead = _meaning(runs, sizes, shares, values)
    if not over:
        return LossFinding(kind=COUPLED, shares=shares, residual=residual, pull=pull)
    return LossFinding(
        kind=MEAN, shares=shares, over=over, instead=instead, taken=values[0].taken, residual=residual, pull=pull
    )


_Seen = tuple[tuple[float, ...], float, list["Counts"], tuple[Tensor, ...] | None]


@dataclass(frozen=True, slots=True)
class Counts:
    """What one micro-batch's loss shows of itself.

    Attributes:
        means: what its graph says that means were taken over: the count, the words, what to return instead.
        declared: the count it was returned with; None where there was none.
        taken: how the library takes it, in words.
        is_inside: whether the model computes the loss, where no criterion can be put in its place.
    """

    means: tuple[tuple[float, str, str], ...]
    declared: float | None
    taken: str
    is_inside: bool = False


def _on_outputs(runs: Runs, sizes: Sequence[int], without: Without) -> _Seen | None:
    task = runs.task
    loss_fn = task.loss_fn
    assert loss_fn is not None
    if len(task.models) != 1:
        return None
    recorder = _Recorder()
    with runs.running(without) as bench:
        bench.begin(whole(task.rows))
        with recorder.recording(runs):
            value = value_of(loss_fn(task.model, bench.batch()), task.rows)
        made = recorder.returned
        if len(made) != 1 or not _is_cut_by_rows(made[0], task.rows):
            return None
        leaves = [tensor for tensor in tree.tensors(made[0]) if tensor.is_floating_point() and tensor.requires_grad]
        if not leaves:
            return None
        pull = _gradients_on(value, leaves)
        if pull is None or not any(part.abs().sum() > 0 for part in pull):
            return None
        if _reaches_around(value, task.models):
            return None
        shares: list[float] = []
        counts: list[Counts] = []
        apart = size = 0.0
        for piece in pieces(sizes):
            own = _cut(made[0], piece)
            mine = [tensor for tensor in tree.tensors(own) if tensor.is_floating_point() and tensor.requires_grad]
            bench.begin(piece)
            with recorder.answering(runs, own):
                loss = loss_fn(task.model, bench.cut(piece))
            part = value_of(loss, piece.rows)
            got = _gradients_on(part, mine)
            if got is None:
                return None
            counts.append(_counts(loss, part))
            g = torch.cat([one.reshape(-1).double() for one in got])
            w = torch.cat([one[piece.start : piece.stop].reshape(-1).double() for one in pull])
            square = (g @ g).item()
            share = (g @ w).item() / square if square > 0 and math.isfinite(square) else 0.0
            g = g if math.isfinite(square) else torch.zeros_like(g)
            shares.append(share)
            apart += (w - share * g).square().sum().item()
            size += w.square().sum().item()
        residual = math.sqrt(apart / size) if size else 0.0
        return tuple(shares), residual, counts, tuple(part.clone() for part in pull)


def _on_parameters(runs: Runs, sizes: Sequence[int], without: Without) -> _Seen | None:
    """Least squares over the parameters' gradients, at as many coordinates as are cheap to keep."""
    run = runs.whole(without)
    whole_gradients = run.gradients
    is_inside = any(output.dim() == 0 for output in run.outputs)
    names = [name for name, gradient in whole_gradients.items() if gradient is not None]
    expected = _sampled(whole_gradients, names)
    each: list[Tensor] = []
    counts: list[Counts] = []
    for gradients, seen in runs.each(sizes, without, _counts):
        each.append(torch.nan_to_num(_sampled(gradients, names)))
        counts.append(replace(seen, is_inside=is_inside))
    if len(expected) < 2 * len(each) or not expected.norm() > 0:
        return None
    columns = torch.stack(each, dim=1)
    scale = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    solved = torch.linalg.lstsq(columns / scale, expected, driver="gelsd").solution / scale
    residual = ((expected - columns @ solved).norm() / expected.norm()).item()
    return tuple(solved.tolist()), residual, counts, None


def _sampled(gradients: Gradients, names: Sequence[str]) -> Tensor:
    flat: list[Tensor] = []
    total = sum(one.numel() for name in names if (one := gradients[name]) is not None)
    step = max(1, -(-total // _MOST_COORDINATES))
    for name in names:
        gradient = gradients[name]
        assert gradient is not None
        flat.append((gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)[::step].double().cpu())
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)


def _meaning(runs: Runs, sizes: Sequence[int], shares: Sequence[float], counts: Sequence[Counts]) -> tuple[str, str]:
    """What shares are proportional to, and what to return instead; empty where to nothing that is known."""
    task = runs.task
    if all(abs(share - 1) <= _SAME for share in shares):
        return A_SUM, "return ga.Loss.sum(loss)"
    total = sum(shares)
    if abs(total - 1) > _SAME:
        return "", ""

    def fits(count: Sequence[float]) -> bool:
        whole_count = sum(count)
        return whole_count > 0 and all(
            abs(share - one / whole_count) <= _SAME for share, one in zip(shares, count, strict=True)
        )

    declared = [one.declared for one in counts]
    if all(one is not None for one in declared) and fits([one or 0.0 for one in declared]):
        return "what it says", ""
    if fits(sizes):
        return "samples", "return the loss as a plain tensor, which is taken as a mean over samples"
    if counts[0].is_inside:
        for words, code, of_pieces in _counts_of_batch(task.batch, sizes):
            if fits(of_pieces):
                return words, f"return ga.Loss.mean(loss, over={code})"
    for i in range(min(len(one.means) for one in counts)):
        if fits([one.means[i][0] for one in counts]):
            return counts[0].means[i][1], f"return {_assigned(counts[0].means[i][2])}"
    for words, code, of_pieces in _counts_of_batch(task.batch, sizes):
        if fits(of_pieces):
            return words, f"return ga.Loss.mean(loss, over={code})"
    return "", ""


def _assigned(instead: str) -> str:
    """The way a guard words it, after "return"."""
    return instead.removeprefix("criterion = ").replace(" and criterion(", "(") if " and " in instead else instead


def _counts_of_batch(batch: Any, sizes: Sequence[int]) -> Iterator[tuple[str, str, list[float]]]:
    """Counts that a loss may be taken over, from what is in the batch: labels that are not ignored, then masks."""
    columns = [
        (path, leaf.split(list(sizes)))
        for path, leaf in tree.named_leaves(batch, "micro_batch")
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == sum(sizes) and not leaf.is_complex()
    ]
    for ignored in _IGNORED:
        for path, parts in columns:
            if parts[0].is_floating_point() or parts[0].dtype == torch.bool:
                continue
            said = f"entries of {path} that are not {ignored}"
            yield said, f"({path} != {ignored}).sum()", [float((part != ignored).sum()) for part in parts]
            if parts[0].dim() > 1:  # the model predicts the next token, and the first one is predicted from nothing
                counts = [float((part[:, 1:] != ignored).sum()) for part in parts]
                said = f"entries of {path}, after the first of each sample, that are not {ignored}"
                yield said, f"({path}[:, 1:] != {ignored}).sum()", counts
    for path, parts in columns:
        yield f"the sum of {path}", f"{path}.sum()", [float(part.sum()) for part in parts]


def _counts(loss: Any, value: Tensor) -> Counts:
    declared, taken = None, SAMPLES
    if isinstance(loss, Loss):
        declared = None if loss.weight is None else float(loss.weight)
        taken = A_SUM if loss.weight is None else "a mean over the count it was returned with"
    elif isinstance(loss, Mapping):
        taken = "terms with the counts they were returned with"
    with no_modes():
        found = [(float(mean.count), mean.what, mean.instead) for mean in means_in(value)]
    return Counts(tuple(found), declared, taken)


def _gradients_on(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor] | None:
    try:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    return [torch.zeros_like(leaf) if one is None else one.detach() for leaf, one in zip(leaves, found, strict=True)]


def _reaches_around(value: Tensor, models: Sequence[Any]) -> bool:
    """Whether the loss depends on parameters other than through the outputs: then outputs alone do not tell."""
    parameters = [one for model in models for one in model.parameters() if one.requires_grad]
    try:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return any(one is not None for one in found)


def _is_cut_by_rows(outputs: Any, rows: int) -> bool:
    """Whether all outputs with a gradient have one row for each sample."""
    tensors = [one for one in tree.tensors(outputs) if one.requires_grad]
    return bool(tensors) and all(
        one.dim() > 0 and one.shape[0] == rows and rows not in one.shape[1:] for one in tensors
    )


def _cut(outputs: Any, piece: Piece) -> Any:
    """The rows of a piece, as leaves."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        part = value[piece.start : piece.stop].detach().clone()
        return part.requires_grad_(value.requires_grad and part.is_floating_point())

    return tree.map_leaves(outputs, leaf)


class _Recorder:
    """Stands in the model's place: takes what it returns, with the graph cut behind it, or returns something else."""

    def __init__(self) -> None:
        self.returned: list[Any] = []

    @contextmanager
    def recording(self, runs: Runs) -> Iterator[None]:
        """The model runs, and its outputs become leaves."""

        def cut(module: Any, args: Any, output: Any) -> Any:
            made = tree.map_leaves(
                output,
                lambda leaf: (
                    leaf.detach().clone().requires_grad_(leaf.requires_grad)
                    if isinstance(leaf, Tensor) and leaf.is_floating_point()
                    else leaf
                ),
            )
            self.returned.append(made)
            return made

        handle = runs.task.models[0].register_forward_hook(cut)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def answering(self, runs: Runs, outputs: Any) -> Iterator[None]:
        """The model does not run, and returns these."""
        attributes = vars(runs.task.models[0])
        missing = object()
        before = attributes.get("forward", missing)
        attributes["forward"] = lambda *args, **kwargs: outputs
        try:
            yield
        finally:
            if before is missing:
                del attributes["forward"]
            else:
                attributes["forward"] = before
