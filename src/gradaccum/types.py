"""The data that crosses the boundaries between stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import WindowError

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""Floating-point types of 16 bits."""

Activations = Literal["device", "host", "recompute"]
"""Where activations wait for the backward."""

Randomness = Literal["torch", "sample"]
"""Whether draws are torch's next numbers, or belong to samples."""

Rows = slice | Tensor
"""Which rows of a batch a micro-batch takes: a slice, or a 1-d tensor of indices."""


def num_rows(rows: Rows) -> int:
    """How many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


class Split(Protocol):
    """How a batch is cut into micro-batches. One of your own is honoured by training, `audit` and `plan`.

    Sizes are in a unit of its own (samples, sequences, a cost): an attribute ``unit`` names it in what is logged. What
    a sample is, it says too: `rows` and the rows of `plan` count them. The gradient is exact if every sample is in one
    micro-batch, and a micro-batch is what the batch would be with these samples alone.

    Example:
        Graphs in one batch, whose edges are numbers of nodes, are renumbered when they are cut:

        >>> class ByGraphs:
        ...     unit = "graphs"
        ...
        ...     def rows(self, batch):
        ...         return len(batch["y"])
        ...
        ...     def largest(self, batch):
        ...         return self.rows(batch)
        ...
        ...     def plan(self, batch, size, *, max_rows=None):
        ...         size = size if max_rows is None else min(size, max_rows)
        ...         return list(torch.arange(self.rows(batch)).split(size))
        ...
        ...     def cut(self, batch, rows):
        ...         nodes = torch.isin(batch["graph"], rows)  # those of these graphs
        ...         new_number = nodes.cumsum(0) - 1
        ...         edges = batch["edges"][:, nodes[batch["edges"][0]]]
        ...         graph = torch.searchsorted(rows, batch["graph"][nodes])
        ...         return {"x": batch["x"][nodes], "edges": new_number[edges], "graph": graph, "y": batch["y"][rows]}
        >>> batch = {
        ...     "x": torch.randn(5, 2),
        ...     "edges": torch.tensor([[0, 1, 3], [1, 0, 4]]),
        ...     "graph": torch.tensor([0, 0, 1, 1, 1]),
        ...     "y": torch.randn(2),
        ... }
        >>> split = ByGraphs()
        >>> [split.cut(batch, rows)["edges"].tolist() for rows in split.plan(batch, 1)]
        [[[0, 1], [1, 0]], [[1], [2]]]
    """

    def rows(self, batch: Any) -> int:
        """The number of samples of a batch. A split without it is asked for its plan."""
        ...

    def largest(self, batch: Any) -> int:
        """The largest size that makes sense for the batch."""
        ...

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        """The rows of each micro-batch, in the order they run; every row of the batch exactly once.

        Args:
            batch: at least one row.
            size: the largest size of a micro-batch, in the unit of `largest`.
            max_rows: the largest number of rows besides. What cannot be cut (a group, say) may be larger than both.
        """
        ...

    def cut(self, batch: Any, rows: Rows) -> Any:
        """The micro-batch of those rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is trained, for the command line: a function that takes no arguments returns one.

    Attributes:
        model: one module or a sequence of them, on the device they train on.
        loss_fn: ``loss_fn(model, micro_batch)``, as for `TrainStep`; None where there is a ``batch_loss``.
        batch: a whole batch, as it is trained with.
        optimizer: one or a sequence of them, of the models' parameters.
        micro_batch_size: samples that one forward sees.
        forward: ``forward(model, micro_batch)``, for a loss over the whole batch's outputs.
        batch_loss: ``batch_loss(outputs, batch)``.
        split: how the batch is cut, as for `TrainStep`; ``gradaccum audit`` looks at it.
        batch_norm: as for `TrainStep`; likewise.

    Example:
        >>> def job():
        ...     model = nn.Linear(8, 1)
        ...     return ga.Job(model, lambda model, x: model(x).square().mean(), torch.randn(64, 8))
    """

    model: nn.Module | Sequence[nn.Module]
    loss_fn: Callable[[Any, Any], Any] | None
    batch: Any
    optimizer: Optimizer | Sequence[Optimizer] | None = None
    micro_batch_size: int | None = None
    forward: Callable[[Any, Any], Any] | None = None
    batch_loss: Callable[[Any, Any], Any] | None = None
    split: Split | None = None
    batch_norm: Literal["micro", "exact", "frozen"] | GhostBatch = "micro"


@dataclass(frozen=True, slots=True)
class GhostBatch:
    """Groups of ``samples`` consecutive samples of a batch, for `TrainStep`'s ``batch_norm``.

    BatchNorm then takes its statistics over each group: rows 0 to n-1 of the batch, n to 2n-1, and so on. The gradient
    does not depend on the micro-batch size, since micro-batches hold whole groups. A last group that is shorter is a
    group of its own, unless it is of one sample: that joins the group before, because one has no variance.

    Attributes:
        samples: n, at least 2.

    Raises:
        WindowError: ``samples`` is not that.

    Example:
        >>> ga.GhostBatch(4).group_sizes(18), ga.GhostBatch(4).group_sizes(17)
        ([4, 4, 4, 4, 2], [4, 4, 4, 5])
    """

    samples: int

    def __post_init__(self) -> None:
        if type(self.samples) is not int or self.samples < 2:
            raise WindowError(
                f"ga.GhostBatch({self.samples!r}): BatchNorm's statistics are taken over groups of so many samples, an "
                "int of at least 2; a single one has no variance. For statistics of each sample use GroupNorm or "
                "InstanceNorm."
            )

    def group_sizes(self, rows: int) -> list[int]:
        """The groups that so many rows are made of."""
        full, rest = divmod(rows, self.samples)
        sizes = [self.samples] * full
        if rest == 1 and full:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """One optimizer update.

    What has to wait for the device (``loss``, ``losses``, ``noise_scale``, ``skipped`` of a fused optimizer) is
    computed when it is first read, so that an update that nobody looks at costs no synchronisation.

    Attributes:
        index: 1 for the first update; skipped ones count.
        loss: 0-d tensor on the device, detached: the whole batch's loss (the sum of the terms' means where there are
            several); NaN where the batch weighed nothing.
        losses: each named term's mean by name, 0-d tensors; empty for a single loss.
        weight: what the mean was taken over, in all: a number or a 0-d tensor; a mapping by name for terms with totals
            of their own; None for a plain sum.
        grad_norm: 0-d tensor, the gradient's 2-norm before clipping; None where neither ``clip_norm`` nor
            ``noise_scale`` asked for it.
        skipped: the gradient was not finite, or the batch weighed nothing: parameters and scheduler untouched.
        samples: rows of the batch; None where the library could not see them.
        micro_batches: how many the batch was run in.
        micro_batch_size: rows of the largest one; None where the library could not see them.
        seconds: wall time from the first micro-batch to the update, data loading included.
        data_seconds: this process's, since the update before, until data were there: in ``over()`` what its loader
            took; with `TrainStep` all that the loop did between two calls. None for a first update, and outside of a
            pass.
        waiting_seconds: of ``seconds``, what this process waited for messages and sums of others, but for what FSDP2
            exchanges inside of forwards and backwards; 0 on one process. Who waits least is who is waited for.
        compute_seconds: the rest of ``seconds``, without what a loader took in them.
        peak_bytes: largest memory allocated on the device during the update; None where nothing measured it.
        noise_scale: gradient noise scale in samples, averaged over about the last 200 updates; infinite where the
            averages show no gradient, only noise; None where ``noise_scale=True`` was not given, or nothing was seen.
    """

    index: int
    loss: Tensor = field(init=False)
    losses: dict[str, Tensor] = field(init=False)
    weight: float | Any  # the kind is the loss's own, so nobody has to ask which it is
    grad_norm: Tensor | None
    skipped: bool = field(init=False)
    samples: int | None
    micro_batches: int
    micro_batch_size: int | None
    seconds: float
    data_seconds: float | None = None
    compute_seconds: float | None = None
    waiting_seconds: float | None = None
    peak_bytes: int | None = None
    noise_scale: float | None = field(init=False)
    _later: dict[str, Callable[[], Any]] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        # Reached only while `name` has not been computed: afterwards the instance has it, and Python looks there first.
        later: dict[str, Callable[[], Any]] = self.__dict__.get("_later", {})
        if name not in later:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = later[name]()
        object.__setattr__(self, name, value)
        later.pop(name, None)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Everything computed: closures over device tensors can neither be pickled nor copied."""
        for name in list(self._later):
            getattr(self, name)
        return dict(self.__dict__)

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for any logger; waits for the device.

        Named terms and their weights appear as ``"losses/<name>"`` and ``"weight/<name>"``. What is None is left out.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> train_step = ga.TrainStep(
            ...     model, torch.optim.SGD(model.parameters()), lambda model, x: model(x).mean(), micro_batch_size=2
            ... )
            >>> sorted(train_step(torch.ones(4, 2)).as_dict())
            ['compute_seconds', 'index', 'loss', 'micro_batch_size', 'micro_batches', 'samples', 'seconds', 'skipped',
            'waiting_seconds', 'weight']
        """
        numbers: dict[str, float] = {}
        for name in self.__dataclass_fields__:
            value = None if name == "_later" else getattr(self, name)
            parts = (
                {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            for key, part in parts.items():
                if part is not None:
                    numbers[key] = part.item() if isinstance(part, Tensor) else part
        return numbers
