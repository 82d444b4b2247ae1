"""A batch that is a list of micro-batches, ready as they are: a Trainer's window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from gradaccum import tree
from gradaccum.errors import BatchError, WindowError
from gradaccum.types import Rows, Split


def split_as_given(samples: Callable[[Any], int] | None = None) -> Split:
    """The batch is a list of micro-batches, each of which runs as it is: none is cut, and none are joined.

    Samples are counted where they can be seen in every micro-batch. Where they cannot, the losses must be `Loss`, and
    ``Update.samples`` is None.

    Args:
        samples: ``samples(micro_batch)`` returns how many samples it has.

    Raises:
        WindowError: ``samples`` is not callable.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> train_step = ga.TrainStep(
        ...     model,
        ...     torch.optim.SGD(model.parameters()),
        ...     lambda model, x: model(x).square().mean(),
        ...     split=ga.split_as_given(),
        ... )
        >>> update = train_step([torch.randn(4, 3), torch.randn(1, 3), torch.randn(2, 3)])
        >>> update.micro_batches, update.samples
        (3, 7)
    """
    if samples is not None and not callable(samples):
        raise WindowError(
            f"samples={samples!r}: it counts the samples of a micro-batch. Pass a function, such as lambda "
            "micro_batch: len(micro_batch['labels'])."
        )
    return _AsGiven(samples or tree.rows_or_none)


@dataclass(frozen=True, slots=True)
class _AsGiven:
    count: Callable[[Any], int | None]
    unit = "ready micro-batches"
    joins_rows = False

    def rows(self, batch: Any) -> int:
        return sum(self._counts(batch))

    def largest(self, batch: Any) -> int:
        return 1

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        pieces = [slice(*ends) for ends in pairwise(accumulate(self._counts(batch), initial=0))]
        pieces = [piece for piece in pieces if piece.start < piece.stop]
        if not pieces:
            raise BatchError(
                "The batch has 0 samples in its micro-batches, so there is no gradient to make an update from. Leave "
                "empty batches out."
            )
        return pieces

    def cut(self, batch: Any, rows: Rows) -> Any:
        return batch[self._index(batch, rows)]

    def samples(self, batch: Any, rows: Rows) -> int | None:
        return self.count(batch[self._index(batch, rows)]) if self._is_counted(batch) else None

    def _index(self, batch: Any, rows: Rows) -> int:
        first = rows.start if isinstance(rows, slice) else int(rows[0])
        return next(i for i, stop in enumerate(accumulate(self._counts(batch))) if first < stop)

    def _is_counted(self, batch: Any) -> bool:
        return all(self.count(micro_batch) is not None for micro_batch in batch)

    def _counts(self, batch: Any) -> list[int]:
        """The samples of each micro-batch; 1 each where they cannot be seen."""
        if not isinstance(batch, (list, tuple)):
            raise BatchError(
                f"ga.split_as_given() takes a list of micro-batches, and the batch is a {type(batch).__name__}. Pass "
                "[first, second, ...], or leave split= out for a batch that is to be cut."
            )
        counts = [self.count(micro_batch) for micro_batch in batch]
        known = [count for count in counts if count is not None]
        return known if len(known) == len(counts) else [1] * len(counts)
