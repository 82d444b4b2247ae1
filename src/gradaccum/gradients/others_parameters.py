"""Parameters of other models that a window's losses go through: they have to stay as they are until it closes.

In a GAN the generator's loss goes through the discriminator. If the discriminator's optimizer steps while the
generator's window is open, the micro-batches after it are of another discriminator than those before, and the sum is
the gradient of no batch at all. Seen is that the parameters have moved (`Tensor._version`, 0.05 us each); values of a
few of them tell a step from a change that was undone (weights swapped for an evaluation).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradaccum.errors import MisuseError

_MAX_KEPT = 4
_MAX_ELEMENTS = 4096


class OthersParameters:
    """Those that the losses of one window have reached."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """A window begins."""
        if self._versions:
            self._versions, self._kept = {}, {}

    def note(self, leaves: Iterable[Tensor]) -> None:
        """The window's losses have reached these."""
        new = [leaf for leaf in leaves if id(leaf) not in self._versions]
        self._versions.update((id(leaf), (leaf, leaf._version)) for leaf in new)
        small = sorted((leaf for leaf in new if leaf.numel() <= _MAX_ELEMENTS), key=torch.Tensor.numel, reverse=True)
        for leaf in small[: _MAX_KEPT - len(self._kept)]:
            self._kept[id(leaf)] = leaf, leaf.detach().clone()

    def check(self) -> None:
        """Checks that none has changed since it was reached.

        Raises:
            MisuseError: one has.
        """
        changed = [leaf for leaf, version in self._versions.values() if leaf._version != version]
        if not changed:
            return
        kept = [self._kept[id(leaf)] for leaf in changed if id(leaf) in self._kept]
        if kept and all(torch.equal(leaf.detach(), before) for leaf, before in kept):
            self._versions.update((id(leaf), (leaf, leaf._version)) for leaf in changed)
            return
        raise MisuseError(
            f"{len(changed)} parameters of another model, which this window's losses go through, were changed between "
            "two of its micro-batches: the other model's optimizer has stepped. The micro-batches before and after it "
            "saw two different models, and their sum would be the gradient of neither. Call the backward() whose loss "
            "goes through the other model first, and the other model's own last, both of them with losses computed "
            "before either: loss_g = ...; loss_d = ...; generator.backward(loss_g); discriminator.backward(loss_d)."
        )
