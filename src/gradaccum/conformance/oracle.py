"""The whole batch in float64, and the same training by a loop with a known mistake.

The whole batch is one forward, one backward and one step, in plain torch: slow and obviously right. A trainer whose
parameters are not the whole batch's is compared with loops that each have one mistake or two (`Rule`). Where they come
out equal, what the trainer does is known; where none does, nothing is claimed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gradaccum.conformance.scenarios import BATCH, MICRO_BATCH, Scenario, Trained, flat

EXACT = 1e-6
"""Up to this the error is rounding: float32 has 6e-8 of each number, and no mistake of accumulation is so small."""
SAME = 1e-6
"""So near has a loop with a known mistake to come to a trainer for its mistake to be the trainer's."""

Tail = Literal["step", "drop", "carry", "leak"]
Divisor = Literal["number", "seen", "none"]
_TEXTS = {
    "number": "each micro-batch's loss is divided by the number of micro-batches in a full window",
    "seen": "each micro-batch's loss is divided by the number of micro-batches in its window, which is a mean of means",
    "none": "the micro-batches' losses are added up and divided by nothing",
    "step": "",
    "drop": "the incomplete last window is thrown away",
    "carry": "the incomplete last window is carried into the next epoch, and what is left at the end is lost",
    "leak": "the gradient of an epoch's incomplete last window stays, and is added to the next epoch's first window",
}
_SHARES = {
    "number": "each process's loss is right for its own share, and the processes' losses are averaged",
    "none": "each process's loss is right for its own share, and the processes' losses are added up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a loop over micro-batches does with them."""

    divisor: Divisor = "number"
    tail: Tail = "step"
    schedule: Literal["update", "micro-batch", "window"] = "update"  # window: also where the update was skipped
    loses_gradient: bool = False  # when it is stopped inside of a window
    counts_updates: bool = False  # trains until it has made as many as the whole batch
    by_share: bool = False  # what is divided is not each micro-batch's loss, but that of a process's whole share

    def __str__(self) -> str:
        texts = [(_SHARES if self.by_share else _TEXTS)[self.divisor], _TEXTS[self.tail]]
        if self.schedule == "micro-batch":
            texts.append("the schedule advances with each micro-batch")
        if self.schedule == "window":
            texts.append("the schedule advances for an update that was skipped")
        if self.loses_gradient:
            texts.append("the gradient of the window that was open when it was stopped is lost")
        if self.counts_updates:
            texts.append("training goes on until the updates are made that are missing for it")
        return "; ".join(text for text in texts if text)


def whole_batch(scenario: Scenario, dtype: torch.dtype = torch.float64) -> Trained:
    """Trained as one would with memory for the whole batch; a batch without a finite gradient makes no update."""
    model, optimizer, scheduler = scenario.start(dtype)
    losses: list[float] = []
    for _ in range(scenario.epochs):
        for batch in scenario.loader(scenario.batch, dtype):
            loss = scenario.loss(model, batch)
            loss.backward()
            limit = math.inf if scenario.clip_norm is None else scenario.clip_norm
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            if torch.isfinite(norm):
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return Trained(parameters=flat(model.parameters()), losses=tuple(losses))


def error_of(scenario: Scenario, made: Trained, right: Trained | None = None) -> float:
    """How far a training is from the whole batch's: of the way that the parameters went, or of the losses' size.

    ``|p - P| / |P - start|`` for parameters p, and the whole batch's P. For losses the largest difference, divided by
    the whole batch's largest loss.
    """
    right = whole_batch(scenario) if right is None else right
    if scenario.compares == "losses":
        return _loss_error(made.losses, right.losses)
    way = (right.parameters - flat(scenario.model.parameters())).norm()
    return float((made.parameters - right.parameters).norm() / way)


def reason(scenario: Scenario, made: Trained) -> str | None:
    """The mistake that gives just this result, or None where no known one does."""
    if scenario.compares == "losses":
        return _reason_of_losses(scenario, made)
    if not torch.isfinite(made.parameters).all():
        return "a gradient that is not finite was applied"
    start = flat(scenario.model.parameters())
    if torch.equal(made.parameters, start):
        return "no update was made"
    way = (made.parameters - start).norm()
    for rule in _rules(scenario):
        if (made.parameters - by_rule(scenario, rule).parameters).norm() <= SAME * way:
            return str(rule)
    return None


def by_rule(scenario: Scenario, rule: Rule) -> Trained:
    """Trained by a loop over micro-batches with the mistakes of a rule."""
    model, optimizer, scheduler = scenario.start()
    size = BATCH if rule.by_share else MICRO_BATCH
    batches, in_full = list(scenario.loader(size)), scenario.batch // size
    missing = scenario.epochs * math.ceil(len(batches) / in_full)
    in_window = seen = epoch = 0  # seen: over all epochs
    while missing > 0 if rule.counts_updates else epoch < scenario.epochs:
        epoch += 1
        for index, batch in enumerate(batches):
            length = min(in_full, len(batches) - index // in_full * in_full)
            loss = scenario.loss(model, batch)
            (loss / {"number": in_full, "seen": length, "none": 1}[rule.divisor]).backward()
            in_window += 1
            seen += 1
            if seen == scenario.stop_after and rule.loses_gradient:
                optimizer.zero_grad()
            if scheduler is not None and rule.schedule == "micro-batch":
                scheduler.step()
            is_last = index + 1 == len(batches)
            if in_window % in_full and not (is_last and rule.tail == "step"):
                continue
            missing -= 1
            if missing < 0 and rule.counts_updates:
                break
            limit = math.inf if scenario.clip_norm is None else scenario.clip_norm
            is_finite = torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), limit))
            if is_finite:
                optimizer.step()
            if scheduler is not None and (rule.schedule == "window" or (rule.schedule == "update" and is_finite)):
                scheduler.step()
            optimizer.zero_grad()
            in_window = 0
        if rule.tail == "drop":
            optimizer.zero_grad()
        if rule.tail in ("drop", "leak"):
            in_window = 0
    return Trained(parameters=flat(model.parameters()), losses=None)


def _rules(scenario: Scenario) -> Iterator[Rule]:
    """The simplest first; only those that can make a difference here."""
    rows = len(scenario.data[0])
    tails: tuple[Tail, ...] = ("step",) if rows % scenario.batch == 0 else ("step", "drop", "carry", "leak")
    schedules = ("update", "window", "micro-batch") if scenario.decay is not None else ("update",)
    losing = (False, True) if scenario.stop_after is not None else (False,)
    counting = (False, True) if scenario.is_stream else (False,)
    for counts, loses, schedule, tail, divisor in itertools.product(
        counting, losing, schedules, tails, ("number", "seen", "none")
    ):
        yield Rule(divisor=divisor, tail=tail, schedule=schedule, loses_gradient=loses, counts_updates=counts)  # type: ignore[arg-type]
    if scenario.processes > 1:
        yield from (Rule(divisor="number", by_share=True), Rule(divisor="none", by_share=True))


def _reason_of_losses(scenario: Scenario, made: Trained) -> str | None:
    assert made.losses is not None
    windows: list[list[float]] = []  # nothing moves here, so these are each update's
    model, *_ = scenario.start()
    in_full = scenario.batch // MICRO_BATCH
    for _ in range(scenario.epochs):
        each = [scenario.loss(model, batch).item() for batch in scenario.loader(MICRO_BATCH)]
        windows += [each[first : first + in_full] for first in range(0, len(each), in_full)]
    known = {
        "it is the last micro-batch's loss": [each[-1] for each in windows],
        "it is the mean of the micro-batches' losses": [sum(each) / len(each) for each in windows],
        "it is the sum of the micro-batches' losses, divided by their number in a full window": [
            sum(each) / in_full for each in windows
        ],
    }
    for text, losses in known.items():
        if _loss_error(made.losses, tuple(losses)) <= SAME:
            return text
    return None


def _loss_error(made: tuple[float, ...] | None, right: tuple[float, ...] | None) -> float:
    assert right is not None
    if made is None or len(made) != len(right):
        return math.inf
    return max(abs(one - other) for one, other in zip(made, right, strict=True)) / max(map(abs, right))
