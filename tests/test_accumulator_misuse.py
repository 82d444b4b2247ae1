"""What would make an update of your own loop another than the batch's: an error with the line and the way out."""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from pairs import assert_no_gradients, line_here

# An error in the loop's body is on its way when Python lets go of the loop, and then its half window is warned of too.
pytestmark = pytest.mark.filterwarnings("ignore::gradaccum.DiscardedWindowWarning")


class Setup:
    """A model in training, with everything that could be called by hand."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.accumulator = ga.Accumulator(
            self.model, self.optimizer, scheduler=self.scheduler, **{"micro_batches": 3, **options}
        )

    def loss(self, x: Tensor) -> Any:
        return ga.Loss.mean(self.model(x).pow(2).mean(), over=len(x))

    def train(
        self,
        stream: Iterable[Any],
        loss: Callable[[Any], Any] | None = None,
        *,
        after: Callable[[int], object] = lambda done: None,
    ) -> None:
        """One pass; ``after(n)`` runs in the loop's body when the n-th micro-batch is done."""
        for done, micro_batch in enumerate(self.accumulator.over(stream), start=1):
            self.accumulator.backward((loss or self.loss)(micro_batch))
            after(done)


def stream(*rows: int) -> list[Tensor]:
    return [torch.randn(n, 3) for n in rows]


# -------------------------------------------------------------------------------------------------------- calls by hand


BY_HAND: dict[str, tuple[int, str]] = {  # after which micro-batch, and what is said
    "optimizer.step": (2, r".*inside a window, after 2 of its micro-batches.*Remove the call"),
    "optimizer.zero_grad": (1, r".*inside a window, after 1 of its micro-batches.*throw away\. Remove the call"),
    "scheduler.step": (1, r".*which advances it once for each update.*Remove the call, or do not pass scheduler="),
    "scheduler.step between windows": (3, r".*passed to the accumulator, which advances it once"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_calls_by_hand_inside_a_window_or_a_pass(name: str) -> None:
    setup, (at, message) = Setup(), BY_HAND[name]
    owner, method = name.split()[0].split(".")

    def call(done: int) -> None:
        if done == at:
            getattr(getattr(setup, owner), method)()

    line = re.escape(f"{__file__}:{call.__code__.co_firstlineno + 2}") + r"\b"
    with pytest.raises(ga.MisuseError, match=rf"{owner}\.{method}\(\) was called at {line}{message}"):
        setup.train(stream(2, 2, 2), after=call)
    assert_no_gradients(setup.model)


@pytest.mark.parametrize("call", ["step", "zero_grad"])
@pytest.mark.parametrize("is_carried", [False, True])
def test_by_hand_in_a_window_that_is_open_outside_of_a_pass(is_carried: bool, call: str) -> None:
    setup = Setup(tail="carry")
    if is_carried:
        setup.train(stream(2))
    else:
        assert setup.accumulator.backward(setup.loss(torch.ones(2, 3))) is None
    line = re.escape(line_here(2)) + r"\b"
    with pytest.raises(ga.MisuseError, match=rf"optimizer\.{call}\(\) was called at {line}.* after 1 of its"):
        getattr(setup.optimizer, call)()
    if is_carried:
        setup.train(stream(2, 2))
    else:
        assert setup.accumulator.flush() is not None
    assert setup.accumulator.updates == 1
    setup.optimizer.step()


def test_between_windows_calls_by_hand_are_free() -> None:
    setup = Setup()
    setup.train(stream(2, 2, 2, 2, 2, 2), after=lambda done: setup.optimizer.zero_grad() if done == 3 else None)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    assert setup.scheduler.last_epoch == 2, "the library advances it"
    setup.scheduler.step()
    assert setup.accumulator.updates == 2


CHANGED: dict[str, tuple[Callable[[Setup], Any], str]] = {
    "model.zero_grad": (lambda setup: setup.model.zero_grad(), "was cleared between two micro-batches"),
    "clipping": (lambda setup: nn.utils.clip_grad_norm_(setup.model.parameters(), 1e-6), "was changed between two"),
    "a second backward": (lambda setup: setup.model(torch.ones(1, 3)).sum().backward(), "was changed between two"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_gradients_changed_inside_a_window_name_the_line_where_it_is_seen(name: str) -> None:
    change, message = CHANGED[name]
    setup = Setup()
    setup.accumulator.backward(setup.loss(torch.randn(2, 3)))
    change(setup)
    line = re.escape(line_here(2))
    with pytest.raises(ga.MisuseError, match=rf"{message}.*pass clip_norm=.*\(Seen at {line}\.\)"):
        setup.accumulator.backward(setup.loss(torch.randn(2, 3)))


def test_leftover_gradients_name_the_line_where_they_are_seen() -> None:
    setup = Setup()
    setup.model(torch.ones(2, 3)).sum().backward()
    line = re.escape(line_here(2))
    with pytest.raises(ga.MisuseError, match=rf"Call optimizer\.zero_grad\(\) .*\(Seen at {line}\.\)"):
        setup.accumulator.backward(setup.loss(torch.randn(2, 3)))
    step = ga.TrainStep(setup.model, setup.optimizer, lambda model, x: model(x).mean(), micro_batch_size=2)
    line = re.escape(line_here(2))
    with pytest.raises(ga.MisuseError, match=rf"have a \.grad .*\(Seen at {line}\.\)"):
        step(torch.randn(5, 3))


# ------------------------------------------------------------------------------------------ too often, too rarely, open
@pytest.mark.parametrize("at", [1, 3])
def test_backward_twice_for_one_micro_batch(at: int) -> None:
    setup = Setup()

    def again(done: int) -> None:
        if done == at:
            setup.accumulator.backward(setup.loss(torch.ones(1, 3)))

    line = re.escape(f"{__file__}:{again.__code__.co_firstlineno + 2}")
    with pytest.raises(ga.MisuseError, match=rf"backward\(\) was called at {line} a second time for one micro-batch"):
        setup.train(stream(2, 2, 2, 2), after=again)
    assert_no_gradients(setup.model)


@pytest.mark.parametrize("forgotten", [1, 2, 3, 4])
def test_backward_not_called_for_a_micro_batch(forgotten: int) -> None:
    setup = Setup()

    def train() -> None:
        for done, x in enumerate(setup.accumulator.over(stream(2, 2, 2, 5)), start=1):
            if done != forgotten:
                setup.accumulator.backward(setup.loss(x))

    rows = 5 if forgotten == 4 else 2
    message = (
        rf"micro-batch of {rows} samples was taken from over\(\) at .*misuse.py:\d+ and backward\(\) was not.*over=0"
    )
    with pytest.raises(ga.MisuseError, match=message):
        train()
    assert_no_gradients(setup.model)


def test_flush_inside_a_pass() -> None:
    setup = Setup()
    with pytest.raises(ga.MisuseError, match=rf"flush\(\) was called at {re.escape(line_here(1))}, inside a pass"):
        setup.train(stream(2, 2, 2), after=lambda done: setup.accumulator.flush())


def test_a_window_left_open_outside_of_a_pass() -> None:
    setup = Setup()
    setup.accumulator.backward(setup.loss(torch.ones(2, 3)))
    line = re.escape(line_here(2))
    with pytest.raises(ga.MisuseError, match=rf"open: 1 micro-batches .*begins at {line}, .*accumulator\.flush\(\)"):
        setup.accumulator.over(stream(2, 2))
    update = setup.accumulator.flush()
    assert update is not None
    assert (update.micro_batches, update.weight, update.samples) == (1, 2, None)
    setup.train(stream(2, 2, 2))
    assert setup.accumulator.updates == 2


def test_windows_outside_of_a_pass() -> None:
    setup = Setup()
    updates = [setup.accumulator.backward(setup.loss(torch.randn(n, 3))) for n in (1, 2, 3, 4, 5, 6)]
    assert [update and update.weight for update in updates] == [None, None, 6, None, None, 15]
    assert setup.accumulator.flush() is None


def test_what_cannot_be_counted_outside_of_a_pass() -> None:
    setup = Setup()
    with pytest.raises(ga.LossError, match=r"number of samples is not known.*outside of over\(\).*ga\.Loss\.mean"):
        setup.accumulator.backward(setup.model(torch.ones(2, 3)).mean())
    setup = Setup(micro_batches=None, batch_size=4)
    line = re.escape(line_here(2))
    with pytest.raises(ga.MisuseError, match=rf"backward\(\) was called at {line}, outside of over\(\)"):
        setup.accumulator.backward(setup.loss(torch.ones(2, 3)))


# ---------------------------------------------------------------------------------------------- losses that will not do

# What each message says is tested with the losses. The third argument is the number of the micro-batch, from 0.
UNUSABLE: dict[str, tuple[Callable[[nn.Module, Tensor, int], Any], str]] = {
    "vector": (lambda model, x, i: model(x).mean(1), r"The loss has shape \(2,\); .* needs a scalar.*ga\.Loss\.sum"),
    "detached": (
        lambda model, x, i: model(x).mean().detach(),
        r"The loss has no graph.*detached, .*whole model frozen",
    ),
    "term without a graph": (
        lambda model, x, i: {"a": model(x).mean(), "b": torch.ones(())},
        r"The term 'b' has no graph",
    ),
    "not the model's": (
        lambda model, x, i: torch.ones((), requires_grad=True) * 2,
        r"0 of 2 trainable parameters got a gradient.*was the model's output detached",
    ),
    "weights of their own": (
        lambda model, x, i: {"a": model(x).mean(), "b": ga.Loss.mean(model(x).mean(), over=7)},
        r"means over different things \('a' over 2, 'b' over 7\).*weights=lambda batch: \{\"a\": \.\.\.",
    ),
    "another term": (
        lambda model, x, i: {"a": model(x).mean(), **({"b": model(x).mean()} if i else {})},
        r"terms 'a', 'b', and earlier micro-batches of this window had 'a'.*over=0",
    ),
    "a sum after means": (
        lambda model, x, i: ga.Loss.sum(model(x).sum()) if i else model(x).mean(),
        r"One micro-batch returned a sum without `over`, another a loss that has a weight",
    ),
}


@pytest.mark.parametrize(("loss", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_losses_that_cannot_be_accumulated(loss: Callable[..., Any], message: str) -> None:
    setup, index = Setup(), itertools.count()
    with pytest.raises(ga.LossError, match=message):
        setup.train(stream(2, 2, 2), lambda x: loss(setup.model, x, next(index)))
    assert_no_gradients(setup.model)
    assert setup.accumulator.updates == 0
    setup.train(stream(2, 2, 2))
    assert setup.accumulator.updates == 1, "the window was discarded, and the next one is whole"


def test_an_error_that_the_loop_goes_on_after_has_discarded_its_window() -> None:
    setup = Setup(micro_batches=2)
    updates: list[ga.Update] = []
    for x in setup.accumulator.over(stream(1, 2, 3, 4)):
        try:
            update = setup.accumulator.backward(setup.loss(x) if len(x) != 2 else setup.model(x))
        except ga.LossError:
            assert_no_gradients(setup.model)
            continue
        if update:
            updates.append(update)
    assert [update.samples for update in updates] == [7], "of the third and the fourth, not of the first and the third"


def test_an_error_outside_of_a_pass_has_discarded_the_window() -> None:
    setup = Setup(micro_batches=2)
    setup.accumulator.backward(setup.loss(torch.ones(1, 3)))
    with pytest.raises(ga.LossError, match="needs a scalar"):
        setup.accumulator.backward(setup.model(torch.ones(2, 3)))
    assert_no_gradients(setup.model)
    assert setup.accumulator.flush() is None


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (1, r"was given as 3, and its micro-batches add up to 6, so its gradient would be 2 times what it should be"),
        (3, r"was given as 9, and its micro-batches add up to 6, so its gradient would be 0\.6667 times"),
        (0, r"gave a total of 0 for the loss, and one of its micro-batches weighs 2"),
    ],
)
def test_totals_that_are_not_those_of_the_loss(counted: int, message: str) -> None:
    setup = Setup(weights=lambda x: counted)
    with pytest.raises(ga.LossError, match=message):
        setup.train(stream(2, 2, 2), lambda x: ga.Loss.mean(setup.model(x).mean(), over=2))
    assert_no_gradients(setup.model)


def test_a_plain_mean_that_was_not_over_samples() -> None:
    setup, labels = Setup(), torch.tensor([0, 1, 1, -100, 0, -100])  # of two samples each: 2, 1 and 1 labels count
    micro_batches = list(zip(torch.randn(6, 3).split(2), labels.split(2), strict=True))
    message = (
        r"taken as a mean over samples, but .*are not ignored: 2, 1.* in micro-batches of 2, 2 samples.*Return the"
    )
    with pytest.raises(ga.MeanError, match=message):
        setup.train(micro_batches, lambda pair: F.cross_entropy(setup.model(pair[0]), pair[1]))
    assert_no_gradients(setup.model)
    assert setup.accumulator.updates == 0


# ------------------------------------------------------------------------------------------------------ at construction

# All sizes that are none, and both at a time, are tested with the sizes of windows.
BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no size": ({"micro_batches": None}, ga.WindowError, r"Pass exactly one: batch_size=.*or micro_batches="),
    "broken size": ({"micro_batches": 2.5}, ga.WindowError, r"micro_batches is 2\.5 .*whole number"),
    "unknown tail": ({"tail": "stop"}, ga.WindowError, r"tail='stop': .*\"step\".*\"drop\".*\"carry\""),
    "totals of what is to come": (
        {"tail": "carry", "weights": len},
        ga.UnsupportedError,
        r"weights= with tail=\"carry\".*Use tail=\"step\" or \"drop\"",
    ),
    "norm of 0": ({"clip_norm": 0.0}, ga.WindowError, r"clip_norm=0\.0.*Pass a positive norm"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_that_make_no_window(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Setup(**options)


def test_models_and_optimizers_that_do_not_belong_together() -> None:
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)

    def make(model: Any, optimizer: Any) -> ga.Accumulator:
        return ga.Accumulator(model, optimizer, micro_batches=2)

    with pytest.raises(ga.ParameterError, match=r"holds a parameter of shape \(1, 3\) that is none of the model's 2"):
        make(model, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ga.ParameterError, match=r"optimizer must be a torch Optimizer .* a function"):
        make(model, torch.optim.SGD.step)
    with pytest.raises(ga.ParameterError, match=r"model must be a torch Module or a non-empty sequence"):
        make([], torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ga.ParameterError, match=r"hold the same parameter of shape \(1, 3\); .*updated twice.*one optimizer"
    ):
        make(model, [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)])
    with pytest.raises(ga.UnsupportedError, match=r"LBFGS evaluates the loss several times.*train_step\.backward"):
        make(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ga.ParameterError, match=r"nothing to train: none of the 2 parameters.*requires_grad_\(\)"):
        make(model.requires_grad_(False), torch.optim.SGD(model.parameters(), lr=0.1))
