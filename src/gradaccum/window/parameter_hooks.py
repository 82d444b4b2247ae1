"""Hooks on parameters: they run once a micro-batch, on a part of the gradient.

An optimizer in the backward (``register_post_accumulate_grad_hook``, as LOMO and layer-wise methods have it) would step
with each micro-batch's part. A tensor hook that clamps would clamp each part, and the parts do not add up to the
clamped whole. Hooks that only look, and masks and factors, which are linear, are right as they are.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from gradaccum.errors import GradAccumWarning, MisuseError
from gradaccum.window.closures import Uses, is_torchs, place_of, uses_of
from gradaccum.window.guards import user_stack_level

_REMEDY = (
    "Remove the hook, and pass what is to be done with the batch's gradient as before_step=function, which is called "
    "once an update, right before the optimizer steps."
)
_CLAMPING = frozenset(("clamp", "clamp_", "clamp_min", "clamp_max", "clip", "clip_", "nan_to_num", "nan_to_num_")) | {
    *("sign", "sign_", "tanh", "round", "renorm", "clip_grad_norm_", "clip_grad_value_")
}


_hooks_of = operator.attrgetter("_post_accumulate_grad_hooks", "_backward_hooks")


class ParameterHooks:
    """Looks at the hooks of the parameters that train, once each.

    Attributes:
        warns: whether hooks that seem to clamp are worth a warning; not where that was measured.
    """

    def __init__(self) -> None:
        self.warns = True
        self._known: dict[int, Any] = {}  # by id, and held, so that an id stays that hook's
        self._versions: list[tuple[str, nn.Parameter, int, Any]] = []

    def look(self, named: Sequence[tuple[str, nn.Parameter]], *, is_whole: bool = False) -> None:
        """Before a window's first backward; ``is_whole`` says that it has no other, so that nothing is added up.

        Raises:
            MisuseError: a hook steps, or changes the parameter or its gradient.
        """
        self._versions = []
        for name, parameter in named:
            after, each = _hooks_of(parameter)
            if (not after and not each) or not parameter.requires_grad:
                continue
            for hook in list((after or {}).values()):
                if not is_torchs(hook):
                    self._look_at_step(name, hook)
                    self._versions.append((name, parameter, parameter._version, hook))
            for hook in list((each or {}).values()):
                if not is_whole and not is_torchs(hook):
                    self._look_at_clamp(name, hook)

    def check(self) -> None:
        """After a backward: no parameter was changed in it.

        Raises:
            MisuseError: one was.
        """
        for name, parameter, version, hook in self._versions:
            if parameter._version != version:
                raise _stepping(name, hook)

    def _look_at_step(self, name: str, hook: Any) -> None:
        if self._is_new(hook) and _steps(uses_of(hook)):
            self._known.pop(id(hook))  # refused each time
            raise _stepping(name, hook)

    def _look_at_clamp(self, name: str, hook: Any) -> None:
        if not self.warns or not self._is_new(hook):
            return
        uses = uses_of(hook)
        if uses.attributes & _CLAMPING or ("norm" in uses.attributes and uses.computes):
            warnings.warn(
                f"The hook {place_of(hook)} on {name!r} runs on each micro-batch's share of the gradient, before the "
                "shares are added up. If it clamps or normalises, the sum is not what it would make of the batch's "
                f"gradient. {_REMEDY}",
                GradAccumWarning,
                stacklevel=user_stack_level(),
            )

    def _is_new(self, hook: Any) -> bool:
        is_new = id(hook) not in self._known
        self._known[id(hook)] = hook
        return is_new


def _steps(uses: Uses) -> bool:
    """Whether the code of a hook steps, or changes a gradient or a parameter in place."""
    in_place = any(
        first in ("grad", "data", "param", "parameter", "p") and second.endswith("_") and not second.endswith("__")
        for first, second in uses.chains
    )
    return bool({"step", "zero_grad"} & uses.attributes) or "grad" in uses.stored or in_place


def _stepping(name: str, hook: Any) -> MisuseError:
    return MisuseError(
        f"The hook {place_of(hook)} on {name!r} steps, or changes the parameter or its gradient, in the backward. It "
        "runs once a micro-batch, on a part of the batch's gradient: parameters would move in the middle of a window, "
        f"and the optimizer would step with what is left. {_REMEDY} The update itself is the optimizer's."
    )
