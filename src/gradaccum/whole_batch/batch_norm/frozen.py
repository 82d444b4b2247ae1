"""Running statistics normalise, and stay; weights and biases of the layers train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from gradaccum.errors import UnsupportedError
from gradaccum.whole_batch.batch_norm.find import batch_norms


@contextmanager
def frozen(models: Iterable[nn.Module]) -> Iterator[None]:
    """While held, BatchNorm layers are in evaluation mode, and nothing else is: not what a layer holds besides.

    Raises:
        UnsupportedError: a layer has no running statistics.
    """
    layers = batch_norms(models)
    without = [layer for layer in layers if layer.running_mean is None]
    if without:
        raise UnsupportedError(
            f'batch_norm="frozen" normalises with running statistics, and {len(without)} of {len(layers)} BatchNorm '
            "layers have none (track_running_stats=False): they would go on with each micro-batch's own. Use "
            'batch_norm="exact".'
        )
    training = [layer for layer in layers if layer.training]
    try:
        for layer in training:
            layer.training = False
        yield
    finally:
        for layer in training:
            layer.training = True
