"""The gradient noise scale, measured while training from the accumulator's own norms.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), appendix A.1. A mean gradient
over n samples has  E ||g_n||^2 = ||G||^2 + S / n,  where G is the true gradient and S the trace of the covariance of
one sample's. Two sizes give both: the first micro-batch of n samples, and the window of N:

    S       = ( ||g_n||^2 - ||g_N||^2 ) / ( 1/n - 1/N )
    ||G||^2 = ||g_N||^2 - S / N

Each is unbiased, though the window contains the micro-batch: expectations add up, whatever depends on what. Their ratio
S / ||G||^2, the noise scale in samples, is not unbiased, and one window's is of little use. So S and ||G||^2 are
averaged apart, over about the last 200 windows, and only then divided.

What it costs: one norm, of the sum of gradients after the first backward. The window's is the one that clipping takes.
Nothing is read from the device until somebody reads ``update.noise_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import StateError
from gradaccum.losses.normaliser import Number
from gradaccum.sync.ranks import Ranks

_KEPT = 0.995  # of both averages, from window to window: 400 windows count as much as one plain mean of them


class NoiseScale:
    """Measures the noise scale of one window after another; see the top of the file."""

    def __init__(self) -> None:
        self._noise: Tensor | None = None  # the averages of S and of ||G||^2, both times the same factor
        self._signal: Tensor | None = None
        self._first: Tensor | None = None

    def begin(self) -> None:
        """A window begins."""
        self._first = None

    @property
    def is_due(self) -> bool:
        """Whether the window's first micro-batch has still to be measured."""
        return self._first is None

    def measure_first(self, norm: Tensor, *, samples: int | None, share: Number | None) -> None:
        """Takes note of the first micro-batch.

        Args:
            norm: 0-d, of the gradient that it has added.
            samples: its rows; None where they could not be seen, and nothing is measured.
            share: what its mean gradient was multiplied by to be added; None of a sum, which is not divided.
        """
        if not samples:
            self._first = torch.zeros_like(_wide(norm)).expand(3)
            return
        mean = _wide(norm) / (samples if share is None else share)
        self._first = torch.stack([mean.square(), torch.full_like(mean, 1.0 / samples), torch.ones_like(mean)])

    def add_up(self, ranks: Ranks) -> None:
        """Adds up what all processes have measured: each one's first micro-batch is one measurement more."""
        first = torch.zeros(3, dtype=torch.float64) if self._first is None else self._first
        self._first = first.to(ranks.device, copy=True)
        ranks.add_up(self._first)

    def measure_whole(self, norm: Tensor | None, *, samples: int | None, is_sum: bool) -> None:
        """Takes note of the window's gradient; ``is_sum`` where it is not divided, so not a mean over its samples."""
        if self._first is None or norm is None or not samples:
            return
        squares, inverses, times = self._first.unbind()
        whole = (_wide(norm) / (samples if is_sum else 1)).square().to(squares)
        size = inverses / times - 1.0 / samples  # 1/n - 1/N
        noise = (squares / times - whole) / size
        signal = whole - noise / samples
        # A window of a single micro-batch says nothing, and neither does one whose gradient is not finite. On the
        # device, so that nothing waits for it.
        says = (size > 1e-9 / samples) & torch.isfinite(noise) & torch.isfinite(signal)
        before = torch.zeros_like(noise) if self._noise is None else self._noise
        self._noise = torch.where(says, _KEPT * before + noise, before)
        before = torch.zeros_like(signal) if self._signal is None else self._signal
        self._signal = torch.where(says, _KEPT * before + signal, before)

    def reader(self) -> Callable[[], float | None]:
        """What reads the noise scale of now, later."""
        noise, signal = self._noise, self._signal
        return lambda: _ratio(noise, signal)

    def state_dict(self) -> dict[str, float]:
        """The averages so far; waits for the device."""
        return {
            name: 0.0 if average is None else average.item()
            for name, average in (("noise", self._noise), ("signal", self._signal))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on averaging from a state.

        Raises:
            StateError: it is none.
        """
        if not all(isinstance(state.get(name), float) for name in ("noise", "signal")):
            raise StateError(
                f"The state of the noise scale is {dict(state)!r}, and needs the averages 'noise' and 'signal'. Load "
                "what state_dict() of an Accumulator or a TrainStep with noise_scale=True returned."
            )
        self._noise, self._signal = (torch.tensor(state[name], dtype=torch.float64) for name in ("noise", "signal"))


def _wide(norm: Tensor) -> Tensor:
    """In fp64 where the device has it: S is a difference of squares."""
    return norm.float() if norm.device.type == "mps" else norm.double()


def _ratio(noise: Tensor | None, signal: Tensor | None) -> float | None:
    if noise is None or signal is None:
        return None
    above, below = noise.item(), signal.item()
    if above == 0 and below == 0:  # no window has said anything yet
        return None
    return max(above, 0.0) / below if below > 0 else math.inf
