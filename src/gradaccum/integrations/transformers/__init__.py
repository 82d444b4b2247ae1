"""Transformers' ``Trainer`` whose updates are the whole batch's.

`ExactTrainer` needs transformers itself, so it is made when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradaccum.integrations.transformers.exact_trainer import ExactMixin, exact

if TYPE_CHECKING:
    from transformers import Trainer

    class ExactTrainer(ExactMixin, Trainer):
        """See `ExactMixin`."""


__all__ = ["ExactMixin", "ExactTrainer", "exact"]


def __getattr__(name: str) -> Any:
    if name != "ExactTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradaccum.integrations.transformers.trainer_support import trainer_class

    found = type("ExactTrainer", (ExactMixin, trainer_class()), {"__doc__": ExactMixin.__doc__, "__module__": __name__})
    globals()[name] = found
    return found
