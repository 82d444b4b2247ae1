"""Losses that couple the samples of a batch through their embeddings, as sentence-transformers' trainer has them.

Multiple negatives, CoSENT, batch-hard triplets: a micro-batch of two has one negative where the batch has 63, so a
weighted sum of micro-batches is another loss. But the loss is a function of the embeddings, which the loss module has
by itself, ``compute_loss_from_embeddings(embeddings, labels)``. The micro-batches' embeddings are put together and it
is called once, with the whole batch's (`TrainStep` with ``batch_loss``; gradient caching, Gao et al. 2021, arXiv
2101.06983). Under several processes the embeddings are those of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gradaccum.errors import LossError, UnsupportedError

_METHOD = "compute_loss_from_embeddings"


class EmbeddingLoss:
    """The embeddings of micro-batches, and the loss of a batch from all of them.

    Args:
        trainer: whose ``loss`` is meant.
        loss_of: runs one micro-batch's inputs through the Trainer's training step.

    Raises:
        UnsupportedError: the loss gathers over processes by itself.
    """

    combine = "concat"

    def __init__(self, trainer: Any, loss_of: Callable[[Any, Any], Any]) -> None:
        self._trainer = trainer
        self._loss_of = loss_of
        if getattr(trainer.loss, "gather_across_devices", False) and trainer.args.world_size > 1:
            raise UnsupportedError(
                f"{type(trainer.loss).__name__}(gather_across_devices=True) gathers the embeddings of "
                f"{trainer.args.world_size} processes, and here it is given those of all of them already: each would "
                "count several times. Leave gather_across_devices out; the loss is that of the global batch."
            )

    @staticmethod
    def is_in(trainer: Any) -> bool:
        """Whether the trainer's loss is a function of embeddings."""
        loss = getattr(trainer, "loss", None)
        return isinstance(loss, nn.Module) and callable(getattr(loss, _METHOD, None))

    def forward(self, batch: Any, training_step: Callable[..., Any]) -> dict[str, Any]:
        """A micro-batch's embeddings, one tensor for each column of texts, and its labels if there are any."""
        seen: list[tuple[Any, Any]] = []

        def noting(embeddings: Any, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            embeddings = list(embeddings)
            seen.append((embeddings, labels))
            return embeddings[0].sum() * 0.0  # for the Trainer to go on with

        loss: Any = self._trainer.loss
        object.__setattr__(loss, _METHOD, noting)
        try:
            self._loss_of(batch, training_step)
        finally:
            object.__delattr__(loss, _METHOD)
        if len(seen) != 1:
            raise LossError(
                f"{type(loss).__name__} called {_METHOD} {len(seen)} times for one micro-batch, so it is not known "
                "which embeddings its loss is of. Use ga.TrainStep with forward= and batch_loss=, or the trainer as it "
                "is with gradient_accumulation_steps=1."
            )
        ((embeddings, labels),) = seen
        return {"embeddings": embeddings} | ({"labels": labels} if isinstance(labels, Tensor) else {})

    def batch_loss(self, outputs: Mapping[str, Any], batch: Any) -> Tensor:
        """The loss of the whole batch."""
        with self._trainer.compute_loss_context_manager():
            found = getattr(self._trainer.loss, _METHOD)(outputs["embeddings"], outputs.get("labels"))
        return sum(found.values()) if isinstance(found, Mapping) else found  # type: ignore[return-value]
