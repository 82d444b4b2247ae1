"""A window without an optimizer: for loops that run their backwards and steps themselves.

A trainer of somebody else's divides each loss by its number of accumulation steps, runs the backwards, clips and steps.
Two seams are enough to make that the whole batch's gradient, and neither replaces anything of the trainer's:

    weigh     a hook on the micro-batch's loss: its backward begins with  w_b / E  instead of  1 / steps
    settle    right before clipping and stepping:  .grad times  E / W

with w_b what the loss is a mean over, W their sum, and E what W is expected to be (`losses/normaliser`). The hook sets
the gradient that begins the backward; a factor that arrives from above is the trainer's and is dropped, but for a loss
scale, which the trainer takes out again. A hook adds no node to the graph, and none of torch's functions is replaced.
Over processes see `left_to_the_loop`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd import Function
from torch.distributed import DeviceMesh, ProcessGroup

from gradaccum.errors import LossError, MisuseError, ParameterError, StateError
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.meaning import SampleMeans, means_in
from gradaccum.losses.normaliser import SINGLE, Normaliser
from gradaccum.losses.terms import as_terms
from gradaccum.window.left_to_the_loop import left_to_the_loop, multiply_gradients
from gradaccum.window.run_counts import VERSION, check_state
from gradaccum.window.window_result import WindowResult, loss_of

_IN_STATE = ("windows", "last_total", "last_micro_batches", "sizes", "backwards", "sums", "gradients")
_ROUNDING = 1e-5  # of sums of fp32 class weights; a real mismatch is a whole item's weight


class Window:
    """The micro-batches of one update in a loop that runs its backwards and its steps itself; one window after another.

    Every process of a training has one, and calls `settle` for every update.

    Args:
        parameters: whose ``.grad`` is corrected: parameters, or a module or a sequence of modules.
        averaged: whether ``.grad`` has been averaged over the processes by the time of `settle`, as DDP and FSDP do it.
            None to find out, where there are several: from gradients that are the same on all of them.
        scaler: the ``torch.amp.GradScaler`` that the loop scales losses with, if it does.
        process_group: the processes that train together, a group or a mesh of them; the default group if None and
            there is one.

    Raises:
        ParameterError: there are no parameters.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> window = ga.Window(model.parameters())
        >>> x = torch.randn(13, 3)
        >>> for micro_batch in x.split(4):                      # 4 + 4 + 4 + 1
        ...     loss = window.weigh(model(micro_batch).mean())
        ...     (loss / 4).backward()                           # what the loop divides by does not matter
        >>> loss = window.settle()                              # .grad is that of model(x).mean()
        >>> optimizer.step()
        >>> loss.weight
        13
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | nn.Module | Iterable[nn.Module],
        *,
        averaged: bool | None = None,
        scaler: GradScaler | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        modules, named = _named(parameters)
        self._gradients = GradientSum(named)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._ranks = left_to_the_loop(modules, named, averaged=averaged, group=process_group)
        self._means = SampleMeans()
        self._normaliser: Normaliser | None = None
        self._settled = 0
        self._last_total: float = 0.0
        self._last_count = 1
        self._sizes: list[int | None] = []
        self._expected_backwards = self._backwards = 0

    @property
    def micro_batches(self) -> int:
        """How many losses have been weighed for the open window."""
        return len(self._sizes)

    def weigh(self, loss: Tensor | Loss, over: Weight | None = None, samples: int | None = None) -> Tensor:
        """Weighs a micro-batch's loss: its backward, whoever runs it, gives the micro-batch's share of the gradient.

        The loop may divide the result by any number before it runs the backward (its accumulation steps, say), and may
        scale it with the window's ``scaler``. Whatever else belongs to the loss (the coefficient of a term) is
        multiplied in before, since a factor that is multiplied in afterwards is undone.

        Args:
            loss: 0-d mean; or a `Loss`, which says itself what it is over.
            over: what it is a mean over: a number or a 0-d tensor. Where the micro-batch has none (0) it adds nothing.
            samples: rows of the micro-batch. Without ``over`` the loss is taken as the mean over these, and checked
                for that in the first window, as `Accumulator` does. Without both, what the loss is a mean over is read
                off its graph.

        Returns:
            The same tensor; one with the same value where the micro-batch adds nothing. Of ``Loss.sum``, the mean.

        Raises:
            LossError: not a 0-d tensor with a graph, or it cannot be seen what it is a mean over.
            MeanError: it is no mean over ``samples``.
        """
        try:
            return self._weighed(loss, over, samples)
        except BaseException as error:
            self._report(error)
            raise

    def _weighed(self, loss: Tensor | Loss, over: Weight | None, samples: int | None) -> Tensor:
        if isinstance(loss, Loss):
            found = loss if loss.is_mean or loss.weight is None else Loss(loss.value, loss.weight, is_mean=True)
        elif over is not None:
            found = Loss.mean(loss, over=over)
        elif samples is None and isinstance(loss, Tensor) and loss.dim() == 0:
            found = Loss.mean(loss, over=_read_off(loss))
        else:
            found = as_terms(loss, samples)[SINGLE]
            if self._means.is_looking and samples is not None:
                self._means.check_all(loss, samples, {})
        normaliser = self._opened(samples if samples is not None else _rows(found.weight))
        several = normaliser.seeds(as_terms(found, samples))
        rescale = normaliser.take_rescale()
        if rescale is not None:
            self._gradients.multiply(rescale)
        self._sizes.append(samples)
        root = found.root
        if not several:  # a mean over nothing: its backward would make NaN of 0 / 0
            return _Silent.apply(root) if root.requires_grad else root  # type: ignore[return-value]
        self._expected_backwards += 1
        root.register_hook(self._start(several[0][1]))
        return root

    def _start(self, seed: Tensor) -> Any:
        """The hook that begins a backward with ``seed``."""

        def start(arrived: Tensor) -> Tensor:
            if not self._backwards:
                self._gradients.check_empty()
            self._backwards += 1
            if self._scaler is not None:
                return seed * self._scaler.scale(torch.ones_like(seed))  # type: ignore[operator]
            if not self._settled and not torch.compiler.is_compiling() and arrived.abs().item() > 1:
                # A wait for the device, in the first window only. What the loop divides by is below 1.
                raise MisuseError(
                    f"The backward of a weighed loss began with {arrived.item():g} instead of 1 or a part of it, so "
                    "the loop multiplies its losses, most likely by a loss scale. What of it is to be kept cannot be "
                    "seen. Pass ga.Window(..., scaler=) the GradScaler; a coefficient of the loss is multiplied in "
                    "before weigh()."
                )
            return seed

        return start

    def settle(self) -> Loss:
        """Corrects ``.grad`` once, over processes too: it is the gradient of the whole window's mean afterwards.

        Called after the last backward, before gradients are clipped; a loss scale may have been taken out or not.

        Returns:
            The window's loss over all processes, detached: the mean and what it is over; NaN where that is nothing.

        Raises:
            MisuseError: nothing was weighed, or not every weighed loss has had one backward.
            RankError: another process failed or has gone, or is not settling this window.
        """
        if self._backwards != self._expected_backwards or (self._ranks is None and not self._sizes):
            error = MisuseError(
                f"settle() was called after {len(self._sizes)} losses were weighed, {self._expected_backwards} of them "
                f"with a weight, and {self._backwards} of their backwards ran. The gradient would be divided by what "
                "it does not have, or has twice. Run one backward for each loss from window.weigh(), and leave a "
                "window for good with window.discard()."
            )
            self._report(error)
            raise error
        normaliser = self._opened(0)
        result = WindowResult.of(self._sizes, normaliser.correction)
        if self._ranks is not None:
            result = self._ranks.settle(normaliser, [], sizes=self._sizes)
        if not normaliser.is_empty:
            if self._ranks is None:
                multiply_gradients(self._gradients.parameters, result.correction)
            else:
                self._ranks.correct(self._gradients.parameters, result.correction)
        loss = loss_of(normaliser)
        self._last_total = float(loss.weight) if isinstance(loss.weight, (int, float)) else 0.0
        self._last_count = max(len(self._sizes), 1)
        self._settled += 1
        self._means.window_closed()
        self._reset()
        return loss

    def discard(self) -> int:
        """Throws the open window away, with its gradients.

        Returns:
            How many losses had been weighed for it; 0 where none was open.
        """
        lost = len(self._sizes)
        if self._normaliser is not None:
            self._gradients.clear()
            self._means.window_discarded()
            self._reset()
        return lost

    def state_dict(self) -> dict[str, Any]:
        """The open window, gradients included, and what is known of the windows before; waits for the device.

        Over several processes each has a state of its own.

        Raises:
            StateError: a weighed loss has not had its backward.
        """
        if self._backwards != self._expected_backwards:
            raise StateError(
                f"{self._expected_backwards - self._backwards} weighed losses have not had their backward, so the "
                "window cannot be saved: its gradients are without them. Save after the backward."
            )
        return {
            "version": VERSION,
            "windows": self._settled,
            "last_total": self._last_total,
            "last_micro_batches": self._last_count,
            "sizes": list(self._sizes),
            "backwards": self._backwards,
            "sums": None if self._normaliser is None else self._normaliser.state_dict(),
            "gradients": None
            if self._normaliser is None
            else [None if p.grad is None else p.grad.detach().clone() for p in self._gradients.parameters],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the window of which ``state_dict()`` was taken, which takes the place of an open one.

        Raises:
            StateError: it is a state of other parameters, of another version, or none.
        """
        check_state(state, *_IN_STATE, of="a Window")
        gradients = state["gradients"]
        parameters = self._gradients.parameters
        shapes = None if gradients is None else [None if g is None else g.shape for g in gradients]
        if shapes is not None and (
            len(shapes) != len(parameters)
            or any(shape not in (None, p.shape) for shape, p in zip(shapes, parameters, strict=True))
        ):
            raise StateError(
                f"The state has gradients of {len(shapes)} parameters, and they are not those of this window's "
                f"{len(parameters)}. Load it into a window of the same parameters, in the same order."
            )
        self.discard()
        self._settled, self._last_total = state["windows"], state["last_total"]
        self._last_count, self._sizes = state["last_micro_batches"], list(state["sizes"])
        self._backwards = self._expected_backwards = state["backwards"]
        if gradients is None:
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        self._normaliser = Normaliser()
        self._normaliser.load_state_dict(state["sums"])

    def _opened(self, rows: int) -> Normaliser:
        if self._normaliser is None:
            expected = None
            if self._ranks is not None:
                expected = self._ranks.begin(
                    None,
                    update=self._settled + 1,
                    samples=rows,
                    pieces=0,
                    last_total=self._last_total,
                    is_done=False,
                )[1]
            self._normaliser = Normaliser(
                first_share=(1, self._last_count), at_least=self._last_total, expected=expected
            )
        return self._normaliser

    def _report(self, error: BaseException) -> None:
        if self._ranks is not None:
            self._ranks.report(error)

    def _reset(self) -> None:
        self._normaliser = None
        self._sizes = []
        self._backwards = self._expected_backwards = 0


class _Silent(Function):
    """The same value without a gradient: what is below gets none, not even zeros, and its hooks run all the same."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None


def _named(given: Any) -> tuple[list[nn.Module], list[tuple[str, nn.Parameter]]]:
    """The modules among what was given, and all parameters by name, each once."""
    entries = [given] if isinstance(given, (nn.Module, Tensor)) else list(given)
    modules = [entry for entry in entries if isinstance(entry, nn.Module)]
    found: dict[int, tuple[str, Any]] = {}
    for number, entry in enumerate(entries):
        named: list[tuple[str, Any]] = [(f"parameter {number}", entry)]
        if isinstance(entry, nn.Module):
            named = list(entry.named_parameters())
        for name, parameter in named:
            if not isinstance(parameter, Tensor):
                raise ParameterError(
                    f"ga.Window got a {type(parameter).__name__} among its parameters, which has no gradient. Pass "
                    "model.parameters(), or the model."
                )
            found.setdefault(id(parameter), (name, parameter))
    if not found:
        raise ParameterError(
            "ga.Window got no parameters, so there is no gradient to correct. Pass model.parameters(): an iterator "
            "that something else has read already is empty."
        )
    return modules, list(found.values())


def _rows(weight: Weight | None) -> int:
    """A first guess at what a window of several processes weighs, in whole items."""
    return int(weight) if isinstance(weight, (int, float)) else 0


def _read_off(loss: Tensor) -> Weight:
    """What a plain mean is over, by its graph.

    Raises:
        LossError: its graph says nothing, or several things.
    """
    counts = [mean.count for mean in means_in(loss)]
    if not counts:
        raise LossError(
            "It cannot be seen what this loss is a mean over (its graph ends in "
            f"{'nothing' if loss.grad_fn is None else loss.grad_fn.name()}), so its share of the gradient would be a "
            "guess. Say it: window.weigh(loss, over=n), with the number of samples or tokens, or the sum of class "
            "weights."
        )
    numbers = [float(count) for count in counts] if len(counts) > 1 else []
    if any(abs(number - numbers[0]) > _ROUNDING * max(number, numbers[0]) for number in numbers):
        raise LossError(
            f"This loss is a sum of means over {', '.join(f'{number:g}' for number in numbers)} items, and has no "
            "single weight: its share of the gradient would be right for one of them. Say which it is to have: "
            "window.weigh(loss, over=n)."
        )
    return counts[0]
