"""What an exact Trainer refuses at construction, and whether the installed Trainer still is the one that is known.

A changed framework gives wrong gradients in silence, so what the mixin relies on is read off the installed version: the
signatures of three methods, and that the training loop calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradaccum.errors import UnsupportedError
from gradaccum.report import extra_needed

_METHODS: Mapping[str, tuple[str, ...]] = {
    "get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
}
_CALLS = (
    "self.get_batch_samples(",
    "self.training_step(",
    "self.current_gradient_accumulation_steps",
    "_set_sync_gradients(",
)
_GENERATE = frozenset({"GRPOTrainer", "RLOOTrainer", "DistillationTrainer", "GKDTrainer", "OnlineDPOTrainer"})
_PAIRS = frozenset({"DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer"})


def trainer_class() -> Any:
    """Transformers' ``Trainer``.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    with extra_needed("transformers", "An exact Trainer"):
        from transformers import Trainer
    return Trainer


def check_framework(trainer: Any = None) -> None:
    """Checks that the installed Trainer is called and calls as the mixin relies on.

    Args:
        trainer: the class; the installed one by default.

    Raises:
        UnsupportedError: it is not; the message names the method.
    """
    trainer = trainer_class() if trainer is None else trainer
    for name, expected in _METHODS.items():
        found = tuple(inspect.signature(getattr(trainer, name)).parameters) if hasattr(trainer, name) else ()
        if found[: len(expected)] != expected:
            raise UnsupportedError(
                f"transformers' Trainer.{name}({', '.join(found)}) is not the one that is known, "
                f"({', '.join(expected)}), so a window's loss could not be told apart from something else. {_KNOWN}"
            )
    loop = getattr(trainer, "_run_epoch", None) or trainer._inner_training_loop
    source = inspect.getsource(loop)
    missing = [call for call in _CALLS if call not in source]
    if missing:
        raise UnsupportedError(
            f"The loop of transformers' Trainer ({loop.__name__}) no longer has {missing[0]!r}, through which windows "
            f"are collected and run. Their gradients would be those of something else. {_KNOWN}"
        )


_KNOWN = "Known are transformers 5.0 to 5.24; use one of these, or TrainStep in a loop of your own."


def check_class(trainer: type) -> None:
    """Checks what is known of a subclass before it is constructed.

    Raises:
        UnsupportedError: it makes its batches inside of a window.
    """
    kinds = {base.__name__ for base in trainer.__mro__}
    if kinds & _GENERATE:
        raise UnsupportedError(
            f"{' and '.join(sorted(kinds & _GENERATE))} generates answers inside of _prepare_inputs and keeps them for "
            "several steps: what a window holds is not known when it is collected. Its gradient would be that of "
            "other samples. Use the trainer as it is."
        )


def check_trainer(trainer: Any) -> None:
    """Checks a constructed trainer.

    Raises:
        UnsupportedError: gradients cannot be made exact with it; the message says why.
    """
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    args = trainer.args
    reason = None
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        reason = f"{kind} keeps the gradients in memory of its own, divides them by itself, and cannot be weighted"
    elif getattr(trainer, "is_fsdp_enabled", False) and not _is_fsdp2(trainer):
        reason = "FSDP1 divides flat parameters by the number of processes in two steps of its own"
    elif args.n_gpu > 1:
        reason = f"DataParallel spreads each micro-batch over {args.n_gpu} devices in one process, with a mean on each"
    elif "lomo" in str(args.optim).lower():
        reason = f"{args.optim} steps inside of every backward, so nothing accumulates"
    elif type(trainer)._prepare_inputs is not trainer_class()._prepare_inputs and not _is_known(type(trainer)):
        reason = (
            f"{type(trainer).__name__} has a _prepare_inputs of its own, which may make other batches than the "
            "loader's inside of a window"
        )
    if reason is not None:
        raise UnsupportedError(
            f"An exact Trainer cannot be made of this one: {reason}. Its gradient would not be the whole batch's. Use "
            "the trainer as it is, with gradient_accumulation_steps=1; or DDP, FSDP2, or one device a process."
        )


def keeps_pairs(trainer: type) -> bool:
    """Whether its micro-batches are preferred answers and then the rejected ones, which belong together."""
    return bool({base.__name__ for base in trainer.__mro__} & _PAIRS)


def modules_besides(trainer: Any, model: Any) -> list[nn.Module]:
    """Modules that are trained besides the model: sentence-transformers' losses may have parameters of their own."""
    known = set(map(id, model.parameters()))
    losses = getattr(trainer, "loss", None)
    found = losses.values() if isinstance(losses, Mapping) else [losses]
    return [one for one in found if isinstance(one, nn.Module) and any(id(p) not in known for p in one.parameters())]


def _is_known(trainer: type) -> bool:
    return any(base.__module__.startswith("sentence_transformers.") for base in trainer.__mro__)


def _is_fsdp2(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return getattr(plugin, "fsdp_version", 1) == 2


def is_stream(trainer: Any) -> bool:
    """Whether the loader in training has no length, so that the loop does not know its last window."""
    try:
        len(trainer.callback_handler.train_dataloader)
    except (TypeError, NotImplementedError):
        return True
    return False
