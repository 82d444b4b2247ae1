"""``gradaccum demo``: a linear regression trained on whole batches, by the textbook loop and by this library.

It is the experiment by which gradient accumulation is usually shown to work: a linear layer from zeros, plain SGD, no
shuffling, a batch of 40 against 10 x 4. `examples/00_tutorial.py` is the same in straight lines.

The measure is the whole batch in float64. Nothing in float32 can hit it: each way is some distance away by rounding
alone, the whole batch too. So the library is held to two bounds, at every update:

- In float64, gradients and parameters are within `FLOAT64_BOUND`. An error of method is 10 orders of magnitude larger.
- In float32, parameters are within `FLOAT32_BOUND` times the number of updates, as the whole batch's own are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

import gradaccum as ga
from gradaccum.report.plots import Mark, Panel, Series, draw
from gradaccum.report.terminal import Cell, Row, Table, Tone, console, print_table, print_text

EPOCHS, BATCH_SIZE, ACCUM_ITER = 3, 40, 4

# Relative. One rounding is 2^-53 = 1.1e-16, and an update's gradient is a sum of up to 2,000 terms: in another order it
# differs by about sqrt(2,000) roundings, 5e-15, if nothing cancels; by 100 times that where most of it does.
FLOAT64_BOUND = 1e-12
# Relative. An update rounds the gradient and the new parameter, each by at most 2^-24 of it. These add up at worst
# where training is stable, that is, where it does not magnify a difference.
FLOAT32_BOUND = 2.0**-23

LEGEND = (
    "tutorial: the loss as the published tutorial prints it, batch means added up and divided by 1,000 samples: a "
    "fortieth of the mean. Its own figures, of data that it does not seed, are 0.54340577, 0.19144142, 0.06752514 for "
    "40 and 0.54340576, 0.19144139, 0.06752512 for 10 x 4.",
    "off by: |a - b| / |b| from the whole batch trained in float64, at the worst update. What the whole batch itself "
    "is off by is the rounding of float32.",
    '"same": the parameters are as close to the whole batch as rounding to float32 allows. "exact": the same, and in '
    "float64 gradients and parameters are within 1e-12 of it at every update.",
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained on. A sample is ``x [tokens, 2]`` and ``y [tokens, 1]``, of one token where it is no sequence."""

    title: str
    text: str
    samples: Sequence[Batch]
    is_tutorial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """How trainings of one task went, by their names."""

    task: Task
    tokens: Tensor  # of each update's batch [updates]
    losses: dict[str, Tensor]  # means over them, with the parameters that the batch met [updates]
    off: dict[str, Tensor]  # relative distance of gradients and parameters from the measure [updates, 2]

    def is_exact(self) -> bool:
        """Returns whether the library is the whole batch up to rounding, in float32 and in float64."""
        return self.is_same(OURS) and bool((self.off[OURS_IN_FLOAT64] <= FLOAT64_BOUND).all())

    def is_same(self, name: str) -> bool:
        """Returns whether parameters in float32 are as close to the measure as rounding allows."""
        off = self.off[name][:, 1]
        return bool((off <= FLOAT32_BOUND * len(off)).all())  # so that a NaN is not close


def run_demo(*, plot: Path | None) -> bool:
    """Trains, prints tables and a verdict, and draws a picture if asked to; returns whether the library was exact."""
    terminal, comparisons = console(), [compare(task) for task in tasks()]
    for comparison in comparisons:
        print_table(terminal, table(comparison))
    for paragraph in LEGEND:
        print_text(terminal, paragraph, Tone.QUIET)
    terminal.print()
    is_exact, text = verdict(comparisons)
    print_text(terminal, text, Tone.GOOD if is_exact else Tone.BAD)
    if plot is not None:
        draw(panels(comparisons), plot)
        print_text(terminal, f"Picture: {plot}", Tone.QUIET)
    return is_exact


def tasks() -> list[Task]:
    """Returns the three that are shown."""
    lengths = torch.randint(1, 61, (1_000,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Task(
            title="1,000 samples",
            text="The tutorial: y = -2 x1 + 3.4 x2 + 4.2 + noise, a linear layer from zeros, mean-squared error, SGD "
            "at 0.01, no shuffling. 40 divides 1,000, so all micro-batches count alike.",
            samples=regression([1] * 1_000),
            is_tutorial=True,
        ),
        Task(
            title="957 samples",
            text="The same, but an epoch's last batch is 10 + 10 + 10 + 7. The textbook loop divides by 4 all the "
            "same, so that its last seven samples count too much.",
            samples=regression([1] * 957),
        ),
        Task(
            title="1,000 sequences",
            text="The same, but each sample is a sequence of 1 to 60 tokens, as in text, and the loss is a mean over "
            "tokens. The textbook loop takes a mean of means over unequal numbers of them.",
            samples=regression(lengths),
        ),
    ]


def regression(lengths: list[int]) -> list[Batch]:
    """Returns sequences of ``y = -2 x1 + 3.4 x2 + 4.2 + 0.01 noise``, where ``x`` and the noise are standard normal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 2, generator=generator)
    y = x @ torch.tensor([-2.0, 3.4]) + 4.2 + 0.01 * torch.randn(len(x), generator=generator)
    return list(zip(x.split(lengths), y[:, None].split(lengths), strict=True))


def textbook_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Batch], accum_iter: int
) -> None:
    """Trains by the loop that everybody writes; with ``accum_iter=1`` it is that of the whole batch."""
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader):
            loss = F.mse_loss(model(x), y) / accum_iter
            loss.backward()
            if (i + 1) % accum_iter == 0 or i + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()


def library(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Batch], accum_iter: int) -> None:
    """Trains by this library."""
    criterion = ga.criterion(F.mse_loss)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=accum_iter)
    for _ in range(EPOCHS):
        for x, y in accumulator.over(loader):
            accumulator.backward(criterion(model(x), y))


Way = tuple[Callable[[nn.Module, torch.optim.Optimizer, "DataLoader[Batch]", int], None], int]  # a loop, its accum_iter
WHOLE, TEXTBOOK, OURS, OURS_IN_FLOAT64 = "whole batch", "textbook loop", "gradaccum", "gradaccum in float64"
WAYS: dict[str, Way] = {WHOLE: (textbook_loop, 1), TEXTBOOK: (textbook_loop, ACCUM_ITER), OURS: (library, ACCUM_ITER)}
_MARKS = {WHOLE: Mark.REFERENCE, TEXTBOOK: Mark.BAD, OURS: Mark.GOOD, OURS_IN_FLOAT64: Mark.BEST}


def compare(task: Task) -> Comparison:
    """Trains every way in float32, and whole batches and the library in float64 too."""
    measure = train(task, WAYS[WHOLE], torch.float64)
    states = {name: train(task, way, torch.float32) for name, way in WAYS.items()}
    states[OURS_IN_FLOAT64] = train(task, WAYS[OURS], torch.float64)
    batches = EPOCHS * list(_loader(task, BATCH_SIZE, torch.float64))
    return Comparison(
        task=task,
        tokens=torch.tensor([len(y) for _, y in batches]),
        losses={name: _losses(batches, of[:, 1]) for name, of in states.items()},
        off={name: (of - measure).norm(dim=2) / measure.norm(dim=2) for name, of in states.items()},
    )


def train(task: Task, way: Way, dtype: torch.dtype) -> Tensor:
    """Returns the gradient that the optimizer was given and the parameters after it, in float64 ``[updates, 2, 3]``."""
    model = nn.Linear(2, 1, dtype=dtype)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen: list[Tensor] = []  # by hooks of the optimizer, so that the loops are as a user has them
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None]))
    )
    optimizer.register_step_post_hook(lambda *_: seen.append(parameters_to_vector(model.parameters()).detach()))
    loop, accum_iter = way
    loop(model, optimizer, _loader(task, BATCH_SIZE // accum_iter, dtype), accum_iter)
    return torch.stack(seen).double().view(-1, 2, 3)


def _loader(task: Task, batch_size: int, dtype: torch.dtype) -> DataLoader[Batch]:
    def collate(samples: list[Batch]) -> Batch:
        return torch.cat([x for x, _ in samples]).to(dtype), torch.cat([y for _, y in samples]).to(dtype)

    return DataLoader(task.samples, batch_size, collate_fn=collate)  # type: ignore[arg-type]


def _losses(batches: list[Batch], after: Tensor) -> Tensor:
    before = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
    pairs = zip(batches, before, strict=True)
    return torch.stack([F.mse_loss(x @ parameters[:2, None] + parameters[2], y) for (x, y), parameters in pairs])


def table(comparison: Comparison) -> Table:
    """Returns losses to ten digits, how far each way is off, and the verdicts."""
    tokens = comparison.tokens.view(EPOCHS, -1)
    totals = torch.stack([comparison.losses[name] for name in WAYS]).view(len(WAYS), EPOCHS, -1) * tokens
    losses = (totals.sum(2) / tokens.sum(1)).T.tolist()
    texts = [("batch", "40", "10 x 4", "10 x 4")]
    texts += [(f"loss, epoch {i}", *(f"{loss:.10f}" for loss in row)) for i, row in enumerate(losses, start=1)]
    if comparison.task.is_tutorial:
        texts += [(f"tutorial, epoch {i}", *(f"{one / 40:.8f}" for one in row)) for i, row in enumerate(losses, 1)]
    for i, what in enumerate(("gradients", "parameters")):
        texts.append((f"{what} off by", *(f"{comparison.off[name][:, i].max():.1e}" for name in WAYS)))
    texts.append(("in float64, both", "-", "-", f"{comparison.off[OURS_IN_FLOAT64].max():.1e}"))
    ends = ("batch", f"loss, epoch {EPOCHS}", f"tutorial, epoch {EPOCHS}", "in float64, both")
    rows = [
        Row(label=label, cells=tuple(Cell(text=text) for text in cells), ends_section=label in ends)
        for label, *cells in texts
    ]
    is_same, is_exact = comparison.is_same(TEXTBOOK), comparison.is_exact()
    judged = (
        Cell(text="-"),
        Cell(text="same" if is_same else "drifts", tone=Tone.GOOD if is_same else Tone.BAD),
        Cell(text="exact" if is_exact else "NOT EXACT", tone=Tone.GOOD if is_exact else Tone.BAD),
    )
    rows.append(Row(label="verdict", cells=judged))
    return Table(title=comparison.task.title, text=comparison.task.text, head="", columns=tuple(WAYS), rows=tuple(rows))


def verdict(comparisons: Sequence[Comparison]) -> tuple[bool, str]:
    """Returns whether the library was exact on every task, and a sentence that says so."""
    wrong = [one for one in comparisons if not one.is_exact()]
    if wrong:
        off = (f"{one.task.title}: off by {one.off[OURS].max():.0e} in float32" for one in wrong)
        return False, f"NOT EXACT. {'; '.join(off)}."
    worst = max(float(one.off[TEXTBOOK][:, 1].max()) for one in comparisons)
    return True, f"EXACT: every update is the whole batch's. The textbook loop is up to {worst:.1%} off."


def panels(comparisons: Sequence[Comparison]) -> list[list[Panel]]:
    """Returns a row of loss curves above a row of distances, with a column for each task."""
    label = "distance of the parameters from\nthe whole batch in float64"
    losses: list[Panel] = []
    distances: list[Panel] = []
    for one in comparisons:
        off = {name: off[:, 1] for name, off in one.off.items()}
        curves = _curves({name: one.losses[name] for name in WAYS})
        losses.append(Panel(title=one.task.title, series=curves, y_label="loss"))
        title = f"textbook loop {off[TEXTBOOK][-1]:.0e}, gradaccum {off[OURS][-1]:.0e}"
        distances.append(Panel(title=title, series=_curves(off), y_label=label, x_label="update", is_logarithmic=True))
    return [losses, distances]


def _curves(values: dict[str, Tensor]) -> tuple[Series, ...]:
    return tuple(Series(label=name, mark=_MARKS[name], values=tuple(of.tolist())) for name, of in values.items())
