"""For which parameters gradients are added up in place: the option ``fused``."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

from gradaccum.errors import ParameterError

FusedOption = Literal["auto"] | bool


class Limits(NamedTuple):
    """Where adding in place pays, on one kind of device.

    Attributes:
        min_elements: of the parameter; below, the hook takes longer than the addition that it saves.
        max_rows: tokens, or whatever the rows are, that the parameter saw in one micro-batch; above, the product takes
            so much longer than the addition that nothing is to be gained.
    """

    min_elements: int
    max_rows: float


class Choice(NamedTuple):
    """Which parameters' gradients are added up in place, on the CPU (``host``) and elsewhere (``device``)."""

    host: Limits
    device: Limits

    def may_pay(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter can be taken at all."""
        return parameter.dim() in (2, 3) and parameter.numel() >= self._limits(parameter).min_elements

    def pays(self, parameter: nn.Parameter, num_rows: int) -> bool:
        """Whether a parameter is taken in a micro-batch in which it sees this many rows."""
        return num_rows <= self._limits(parameter).max_rows

    def _limits(self, parameter: nn.Parameter) -> Limits:
        return self.host if parameter.device.type == "cpu" else self.device


_WHEREVER_RIGHT = Choice(host=Limits(0, float("inf")), device=Limits(0, float("inf")))

# On the CPU measured: four layers of 512 x 512 came out even at 4 to 2,048 rows (0.98 to 1.17 of the time), four of
# 1,024 x 1,024 at 0.74 of it with 4 rows and 0.92 to 0.97 with 32 to 512. On a device measured with an H100 under bf16
# autocast: layers of up to 2,048 x 2,048 took 0.94 to 1.55 of the time at 256 to 16,384 rows, since it is the host that
# takes it, and the host does more for each parameter; 4,096 x 4,096 came out at 0.84 to 1.37, and only 8,192 x 8,192
# won at every number of rows (0.60 to 0.97).
_WHERE_IT_PAYS = Choice(host=Limits(1 << 19, 2048), device=Limits(1 << 26, 16384))


def choice_of(fused: FusedOption) -> Choice | None:
    """Checks the option ``fused`` of both ways to train; None for no parameters.

    Raises:
        ParameterError: it is none of "auto", True and False.
    """
    if fused == "auto":
        return _WHERE_IT_PAYS
    if fused is True:
        return _WHEREVER_RIGHT
    if fused is False:
        return None
    raise ParameterError(
        f'fused={fused!r}: weight gradients are added up in place where that pays ("auto"), wherever it is right '
        "(True), or nowhere (False). Their sum is the same."
    )
