"""The same global batches on any number of processes.

``DistributedSampler`` cuts the data into one stream for each process first, padded to equal length, and batches come
after: with another number of processes every batch is another, and some samples count twice. Here batches come first.
The order of an epoch is drawn from the seed and the epoch alone, a global batch is the next ``batch_size`` of it, and
each process takes its share of that. So a run may be resumed on more or fewer processes and trains with the same
batches in the same order; nothing is padded, and nothing left out unless asked for. Shares may be unequal, which the
update does not mind (`sync`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler, default_collate

from gradaccum import tree
from gradaccum.errors import StateError, WindowError

_FIXED = ("dataset_size", "batch_size", "seed", "shuffle", "drop_last")


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields this process's share of one global batch after another: ``DataLoader(dataset, batch_sampler=sampler)``.

    Args:
        dataset_size: samples in the dataset.
        batch_size: samples of a global batch, over all processes.
        rank: which share is this process's; that of the process group by default, or 0.
        world_size: how many shares; that of the process group by default, or 1.
        seed: of the order; the same on every process.
        shuffle: whether every epoch has an order of its own; otherwise it is the dataset's.
        drop_last: whether an epoch's incomplete last batch is left out. Otherwise it is yielded as it is.
        proportions: how much each process takes, in any unit, for devices of unequal speed: ``[2, 1]``; shares are
            rounded to whole samples. None for shares that differ by at most one.

    One iteration is what is left of an epoch; the next one begins a new epoch. A share can be empty, where a batch is
    smaller than the processes are many: see `collate`.

    Raises:
        WindowError: sizes below 1, no such rank, or proportions that are not one for each process.

    Example:
        >>> sampler = ga.GlobalBatchSampler(10, 4, rank=0, world_size=2, shuffle=False)
        >>> other = ga.GlobalBatchSampler(10, 4, rank=1, world_size=2, shuffle=False)
        >>> list(sampler), list(other)
        ([[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]])
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        proportions: Sequence[float] | None = None,
    ) -> None:
        has_group = dist.is_available() and dist.is_initialized()
        self.rank = (dist.get_rank() if has_group else 0) if rank is None else rank
        self.world_size = (dist.get_world_size() if has_group else 1) if world_size is None else world_size
        for name, value in (("dataset_size", dataset_size), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise WindowError(f"{name}={value!r}: it is a number of samples, an int of at least 1.")
        if not 0 <= self.rank < self.world_size:
            raise WindowError(
                f"rank={self.rank} of world_size={self.world_size}: ranks are 0 to {self.world_size - 1}. A wrong one "
                "would train with another process's samples. Leave both out under torchrun."
            )
        if drop_last and batch_size > dataset_size:
            raise WindowError(
                f"batch_size={batch_size} with drop_last=True: the {dataset_size} samples of the dataset make no whole "
                "batch, so an epoch would be empty. Use a smaller batch, or drop_last=False."
            )
        if proportions is not None and (
            len(proportions) != self.world_size or min(proportions) < 0 or not sum(proportions) > 0
        ):
            raise WindowError(
                f"proportions={list(proportions)}: one number for each of the {self.world_size} processes, none below "
                "0 and not all 0, says how much of a batch each takes: [2, 1] gives the first twice as much."
            )
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._ends = None if proportions is None else [*itertools.accumulate(proportions)]
        self._batches = 0

    def __len__(self) -> int:
        """Global batches of an epoch."""
        whole, rest = divmod(self.dataset_size, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def epoch(self) -> int:
        """The epoch of the batch that is yielded next; 0 for the first."""
        return self._batches // len(self)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        if self.shuffle:
            # Philox-like mixing is not needed: the Mersenne twister's own seeding separates neighbouring seeds.
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
            order = torch.randperm(self.dataset_size, generator=generator)
        else:
            order = torch.arange(self.dataset_size)
        while self.epoch == epoch:
            start = self._batches % len(self) * self.batch_size
            batch = order[start : start + self.batch_size]
            self._batches += 1  # before it is handed out: what is saved meanwhile counts it
            first, last = self._bounds(len(batch))
            yield batch[first:last].tolist()

    def collate(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate) -> Callable[..., Any]:
        """A ``collate_fn`` for the `DataLoader` that can also make a batch of zero rows, from an empty share.

        Args:
            dataset: whose first sample says what a batch looks like.
            collate_fn: what makes batches of samples.

        Example:
            >>> data = torch.utils.data.TensorDataset(torch.randn(5, 3))
            >>> sampler = ga.GlobalBatchSampler(5, 4, rank=1, world_size=2)
            >>> loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=sampler.collate(data))
            >>> [len(x) for x, in loader]
            [2, 0]
        """
        return functools.partial(_collate, dataset, collate_fn)  # no closure, which cannot be pickled for workers

    def state_dict(self, *, samples: int | None = None) -> dict[str, Any]:
        """Where training stands, in samples and updates, and what the batches are made from.

        Args:
            samples: how many have been trained with, ``train_step.samples``: a `DataLoader` with workers, and a pass of
                an `Accumulator`, have been given batches already that come later. None for all that were yielded.

        Raises:
            StateError: that is not where a batch ends, or more than has been yielded.
        """
        batches = self._batches if samples is None else self._batches_of(samples)
        if batches is None or batches > self._batches:
            raise StateError(
                f"{samples} samples are not where one of this sampler's batches of {self.batch_size} ended, after the "
                f"{self._batches} it has yielded. Training would go on with samples it has seen, or leave some out. "
                "Pass what was trained with from this sampler alone, or nothing where the loader has no workers."
            )
        epochs, rest = divmod(batches, len(self))
        state: dict[str, Any] = {name: getattr(self, name) for name in _FIXED}
        trained = epochs * self._epoch_samples + min(rest * self.batch_size, self._epoch_samples)
        return {**state, "updates": batches, "samples": trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict()`` was taken, on any number of processes.

        Raises:
            StateError: the state is of other data, another batch size or another order.
        """
        updates = state.get("updates")
        if type(updates) is not int or updates < 0:
            raise StateError(f"The state has no count of updates: it holds {', '.join(map(str, state)) or 'nothing'}.")
        for name in _FIXED:
            if state.get(name) != getattr(self, name):
                raise StateError(
                    f"The state was saved with {name}={state.get(name)!r}, and this sampler has "
                    f"{getattr(self, name)!r}. Its batches are others, so some samples would be trained with twice and "
                    "some never. Make it with what it was saved with; processes and their shares may change."
                )
        self._batches = updates

    def _bounds(self, count: int) -> tuple[int, int]:
        """Which of the batch's samples are this process's."""
        if self._ends is None:
            share, more = divmod(count, self.world_size)
            start = self.rank * share + min(self.rank, more)
            return start, start + share + (self.rank < more)
        ends = [0, *(round(count * end / self._ends[-1]) for end in self._ends)]
        return ends[self.rank], ends[self.rank + 1]

    def _batches_of(self, samples: int) -> int | None:
        epochs, rest = divmod(samples, self._epoch_samples)
        batches, left = divmod(rest, self.batch_size)
        return None if left else epochs * len(self) + batches

    @property
    def _epoch_samples(self) -> int:
        return len(self) * self.batch_size if self.drop_last else self.dataset_size


def _collate(dataset: Any, collate_fn: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return collate_fn(samples) if samples else tree.take(collate_fn([dataset[0]]), slice(0, 0))
