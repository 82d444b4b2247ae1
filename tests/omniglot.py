"""Real images: 24 Greek characters by 20 drawers, from the examples' data."""

from pathlib import Path

import torch
from torch import Tensor

_BITS = Path(__file__).parents[1] / "examples" / "data" / "omniglot_greek.bits"
CHARACTERS, DRAWERS, SIDE = 24, 20, 28


def omniglot() -> Tensor:
    """``[24 characters, 20 drawers, 28, 28]``, 1.0 where there is ink."""
    packed = torch.frombuffer(bytearray(_BITS.read_bytes()), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(7, -1, -1)) & 1
    return bits.reshape(CHARACTERS, DRAWERS, SIDE, SIDE).to(torch.float64)
