"""Which dimension of each draw holds the samples, seen by running the loss on two and on three rows.

One draw is told from another by its number within a forward. The dimension that grows with the rows is that of the
samples, whether they come first or not (recurrent layers have time first), and whether each has one entry or several
(heads folded into the batch). A draw that does not grow belongs to no sample: one lambda, one permutation of positions,
a mask of positions. The rows are the batch's first two, with the second one twice for three, so padding that is trimmed
is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gradaccum import tree
from gradaccum.randomness.keyed_mode import KeyedMode, MathAttention, Piece, Signature, Window
from gradaccum.types import Split
from gradaccum.window.snapshot import Buffers

Layouts = dict[Signature, int | None]
_Seen = list[tuple[Signature, tuple[int, ...], Any]]


def find_layouts(
    run_one: Callable[[Any], Any], split: Split, batch: Any, *, models: Sequence[nn.Module], device: torch.device
) -> tuple[Layouts, set[str]] | None:
    """The dimension of the samples of each draw in a forward; None where the loss cannot be run on so few rows.

    It is run twice without a graph; buffers are put back, and the CPU's random state is left to the caller.

    Returns:
        The layouts; and in words what cannot be the same however the batch is cut.
    """
    last = min(1, tree.rows(batch) - 1)
    buffers = Buffers.of(models)
    versions = {id(buffer): buffer._version for _, _, buffer, _, _ in buffers.places if buffer is not None}
    seen: list[_Seen] = []
    try:
        for rows in ([0, last], [0, last, last]):
            index = torch.tensor(rows)
            window = Window(name=(0, 0), layouts={}, notes=set(), seen=[])
            piece = Piece(1, index.to(device))
            micro_batch = tree.to_device(split.cut(batch, index), device)
            window.begin(piece)
            math = nullcontext() if device.type == "cpu" else MathAttention()
            with torch.no_grad(), KeyedMode(window, piece), math:
                run_one(micro_batch)
            seen.append(window.seen or [])
    except Exception:  # noqa: BLE001 - a split of pairs, say; what is really wrong is raised by the forward itself
        return None
    finally:
        torch.clear_autocast_cache()  # it holds casts of the parameters that have no graph
        _put_back(buffers, versions)
    return compare_draws(*seen)


def compare_draws(of_two: _Seen, of_three: _Seen) -> tuple[Layouts, set[str]]:
    """The layouts from what two rows drew and what three did.

    Example:
        >>> from gradaccum.randomness.draw_layouts import compare_draws
        >>> dropout, depth = (0, "bernoulli_", 3), (1, "rand", 0)
        >>> of_two = [(dropout, (7, 2, 4), None), (depth, (), None)]
        >>> compare_draws(of_two, [(dropout, (7, 3, 4), None), (depth, (), None)])
        ({(0, 'bernoulli_', 3): 1, (1, 'rand', 0): None}, set())
    """
    layouts: Layouts = {}
    notes: set[str] = set()
    others = {signature: (shape, limits) for signature, shape, limits in of_three}
    for signature, shape, limits in of_two:
        if signature not in others:
            continue
        shape_of_three, limits_of_three = others[signature]
        differ = [dim for dim, (two, three) in enumerate(zip(shape, shape_of_three, strict=True)) if two != three]
        growing = [dim for dim in differ if shape[dim] * 3 == shape_of_three[dim] * 2]
        layouts[signature] = growing[0] if growing else None
        name = f"torch.{signature[1].strip('_')}"
        if limits != limits_of_three:
            notes.add(f"{name} over the rows of a micro-batch, which finds no partners outside of it")
        elif len(differ) > len(growing[:1]):
            notes.add(
                f"{name} of shape {shape} for 2 rows and {shape_of_three} for 3, of which no part is one sample's"
            )
    return layouts, notes


def _put_back(buffers: Buffers, versions: dict[int, int]) -> None:
    """Puts buffers back that have changed; BatchNorm's kernels change them without counting a version."""
    for module, name, buffer, copied, _ in buffers.places:
        module._buffers[name] = buffer
        if buffer is None or copied is None:
            continue
        if buffer._version != versions[id(buffer)] or not torch.equal(buffer, copied):
            with torch.no_grad():
                buffer.copy_(copied)
