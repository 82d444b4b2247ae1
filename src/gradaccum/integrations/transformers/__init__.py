"""Transformers' ``Trainer`` whose updates are the whole batch's.

| file | idea |
| --- | --- |
| `exact_trainer.py` | the mixin: a window is collected, and handed to `TrainStep.backward` as a whole |
| `trainer_loss.py` | one micro-batch's loss as the Trainer and its subclasses compute it, and what it is a mean over |
| `trainer_windows.py` | the loader's micro-batches of one update as a batch, and how it is cut |
| `router_losses.py` | load-balancing losses of mixtures of experts, over the whole batch |
| `trainer_support.py` | what is refused at construction, and whether the installed Trainer is the one that is known |

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
