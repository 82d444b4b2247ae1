"""Mistakes of the first day, each with what is said: an error or a warning that names the line to type.

Where something is only written differently (steps kept after an update, say), the update has to be right, and nothing
is said.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga
from pairs import assert_no_gradients

Batch = tuple[Tensor, Tensor]
CRITERION = nn.CrossEntropyLoss()


class Script:
    """What a beginner has: 40 samples in micro-batches of 5, a model, an optimizer, a loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu")
        self.x, self.y = torch.randn(40, 5).double(), torch.randint(3, (40,))
        self.loader = list(zip(self.x.split(5), self.y.split(5), strict=True))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def accumulator(self, *args: Any, **options: Any) -> ga.Accumulator:
        return ga.Accumulator(self.model, self.optimizer, *args, **options)

    def step(self, loss_fn: Any = None, **options: Any) -> ga.TrainStep:
        return ga.TrainStep(
            self.model, self.optimizer, loss_fn or (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])),
            **{"micro_batch_size": 8, **options},
        )  # fmt: skip

    def loop(self, body: Callable[[ga.Accumulator, int, Tensor, Tensor], Any], **options: Any) -> ga.Accumulator:
        accumulator = self.accumulator(**(options or {"batch_size": 20}))
        for i, (x, y) in enumerate(accumulator.over(self.loader)):
            body(accumulator, i, x, y)
        return accumulator


class Output(dict[str, Any]):
    """As the models of Hugging Face return it."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        super().__init__(loss=loss, logits=logits)
        self.loss, self.logits = loss, logits


class Mistake(NamedTuple):
    make: Callable[[Script], Any]
    kind: type[Exception]
    said: str


def _after(at: int, act: Callable[[Script], Any]) -> Callable[[Script], Any]:
    """The loop, with a call of one's own after the micro-batch of that number, from 1."""

    def make(script: Script) -> None:
        def body(accumulator: ga.Accumulator, i: int, x: Tensor, y: Tensor) -> None:
            accumulator.backward(script.loss(x, y))
            if i + 1 == at:
                act(script)

        script.loop(body)

    return make


def _of_loss(change: Callable[[Script, Tensor, Tensor], Any], **options: Any) -> Callable[[Script], Any]:
    """The loop, with something else in the place of the loss."""
    return lambda script: script.loop(lambda acc, i, x, y: acc.backward(change(script, x, y)), **options)


def _in_step(loss_fn: Callable[..., Any], **options: Any) -> Callable[[Script], Any]:
    return lambda script: script.step(loss_fn, **options)((script.x, script.y))


def _without_over(script: Script, **options: Any) -> None:
    accumulator = script.accumulator(**options)
    for x, y in script.loader[:6]:
        accumulator.backward(ga.criterion(CRITERION)(script.model(x), y))
    del accumulator
    gc.collect()


def _another_model(script: Script) -> None:
    accumulator = script.accumulator(batch_size=20)
    other = Script().model
    for x, y in accumulator.over(script.loader):
        accumulator.backward(F.cross_entropy(other(x), y))


def _both_backwards(script: Script, x: Tensor, y: Tensor) -> Tensor:
    loss = script.loss(x, y)
    loss.backward()
    return loss


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


LINE = r"test_common_mistakes\.py:\d+"
REMOVE = rf"was called at .*{LINE}, inside a window, after 1 of its micro-batches.*Remove the call"
SEEN = rf"pass clip_norm= .*\(Seen at .*{LINE}\.\)"
WRAP = r"def loss_fn\(model, micro_batch\): x, y = micro_batch; return criterion\(model\(x\), y\)"
EITHER = r"Pass exactly one: batch_size=, .* micro_batches="

MISTAKES: dict[str, Mistake] = {
    # kept from the loop by hand
    "optimizer.step()": Mistake(_after(1, lambda s: s.optimizer.step()), ga.MisuseError, rf"step\(\) {REMOVE}"),
    "optimizer.zero_grad()": Mistake(_after(1, lambda s: s.optimizer.zero_grad()), ga.MisuseError, REMOVE),
    "model.zero_grad()": Mistake(_after(1, lambda s: s.model.zero_grad()), ga.MisuseError, rf"was cleared .*{SEEN}"),
    "clipping inside": Mistake(
        _after(1, lambda s: nn.utils.clip_grad_norm_(s.model.parameters(), 1e-3)), ga.MisuseError, SEEN
    ),
    "loss.backward() after": Mistake(
        _after(1, lambda s: s.loss(s.x, s.y).backward()), ga.MisuseError, rf"nor backward\(\): {SEEN}"
    ),
    "loss.backward() before": Mistake(_of_loss(_both_backwards), ga.MisuseError, "keep other backward.. calls out"),
    "criterion's backward()": Mistake(
        lambda s: ga.criterion(CRITERION)(s.model(s.x), s.y).backward(),
        ga.MisuseError,
        r"accumulator\.backward\(loss\)",
    ),
    "loss / 4": Mistake(
        _of_loss(lambda s, x, y: s.loss(x, y) / 4), ga.GradAccumWarning, r"divided by 4, .*Remove it: accumulator\.back"
    ),
    "scaler.scale(loss)": Mistake(
        _of_loss(lambda s, x, y: s.scaler.scale(s.loss(x, y))),
        ga.LossError,
        rf"{LINE} was multiplied by the scale .*scaler=scaler",
    ),
    # the loop
    "over() forgotten": Mistake(
        lambda s: _without_over(s, batch_size=20),
        ga.MisuseError,
        rf"{LINE}, outside of over.*accumulator\.over\(loader\)",
    ),
    "over() forgotten, micro-batches": Mistake(
        lambda s: _without_over(s, micro_batches=4),
        ga.DiscardedWindowWarning,
        r"2 micro-batches were accumulated and never applied.*accumulator\.over\(loader\).*accumulator\.flush\(\)",
    ),
    "backward forgotten": Mistake(
        lambda s: s.loop(lambda acc, i, x, y: s.loss(x, y)), ga.MisuseError, rf"{LINE} and backward\(\) was not called"
    ),
    # sizes and arguments
    "batch_size for a number of steps": Mistake(
        _of_loss(Script.loss, batch_size=4), ga.WindowError, "5 samples is larger than batch_size=4.*ga.TrainStep"
    ),
    "a batch that its parts do not make": Mistake(
        _of_loss(Script.loss, batch_size=12), ga.WindowError, "batch_size=12: .*divide 12, or pass micro_batches="
    ),
    "both sizes": Mistake(lambda s: s.accumulator(batch_size=20, micro_batches=4), ga.WindowError, EITHER),
    "neither size": Mistake(lambda s: s.accumulator(), ga.WindowError, EITHER),
    "a number by place": Mistake(lambda s: s.accumulator(4), ga.OptionError, "Write batch_size=4, .*micro_batches=4"),
    "accum_iter=": Mistake(lambda s: s.accumulator(accum_iter=4), ga.OptionError, "Write micro_batches=4"),
    "swapped": Mistake(
        lambda s: ga.Accumulator(s.optimizer, s.model, batch_size=20),
        ga.ParameterError,
        "model must be a torch Module",  # type: ignore[arg-type]
    ),
    "another model's optimizer": Mistake(
        lambda s: ga.Accumulator(s.model, Script().optimizer, batch_size=20),
        ga.ParameterError,
        r"model=\[first, second\]",
    ),
    "model made anew": Mistake(
        _another_model, ga.LossError, "a model that was made anew after the one that was passed"
    ),
    # losses
    "a sum": Mistake(
        _of_loss(lambda s, x, y: F.cross_entropy(s.model(x), y, reduction="sum")), ga.MeanError, r"ga\.Loss\.sum\(loss"
    ),
    "none": Mistake(
        lambda s: ga.criterion(nn.CrossEntropyLoss(reduction="none")),
        ga.UnknownLossError,
        r"ga\.Loss\.sum\(losses\.sum\(\)",
    ),
    "the class": Mistake(
        lambda s: ga.criterion(nn.CrossEntropyLoss), ga.UnknownLossError, r"criterion\(CrossEntropyLoss\("
    ),
    "(loss, logits)": Mistake(
        _in_step(lambda model, batch: (_loss(model, batch), model(batch[0]))),
        ga.LossError,
        "Return that one .return output.loss",
    ),
    "ModelOutput": Mistake(
        _in_step(lambda model, batch: Output(_loss(model, batch), model(batch[0]))),
        ga.LossError,
        r"Write: return output\.loss",
    ),
    "a dict with logits": Mistake(
        _in_step(lambda model, batch: {"loss": _loss(model, batch), "logits": model(batch[0])}),
        ga.LossError,
        r'\'logits\' cannot be a loss.*return output\["loss"\]',
    ),
    "a dict with an accuracy": Mistake(
        _in_step(lambda model, batch: {"loss": _loss(model, batch), "accuracy": torch.ones(())}),
        ga.LossError,
        r'\'accuracy\' cannot be a loss.*return output\["loss"\]',
    ),
    "a number": Mistake(_in_step(lambda model, batch: _loss(model, batch).item()), ga.LossError, r"before \.item\(\)"),
    "one for each sample": Mistake(
        _in_step(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")),
        ga.LossError,
        r"ga\.Loss\.sum\(losses\.sum\(\), over=losses\.numel\(\)\)",
    ),
    # TrainStep
    "a criterion for loss_fn": Mistake(lambda s: s.step(CRITERION), ga.LossError, WRAP),
    "loss_fn(batch)": Mistake(lambda s: s.step(lambda batch: batch), ga.LossError, WRAP),
    "loss_fn(batch, model)": Mistake(
        lambda s: s.step(lambda batch, model: batch), ga.LossError, "the other way round.*" + WRAP
    ),
    "train_step(x, y)": Mistake(lambda s: s.step()(s.x, s.y), ga.MisuseError, r"train_step\(\(x, y\)\)"),
    "a mask of [1, T]": Mistake(
        lambda s: s.step()((s.x, s.y, torch.ones(1, 4))), ga.BatchError, r"shape \(1, 4\).*axes=\{'2': None\}"
    ),
    "39 labels": Mistake(lambda s: s.step()((s.x, s.y[:39])), ga.BatchError, r"has 40 and batch\[1\] has 39"),
    "an empty batch": Mistake(lambda s: s.step()((s.x[:0], s.y[:0])), ga.BatchError, "Leave empty batches out"),
    "a loader": Mistake(
        lambda s: s.step()(DataLoader(TensorDataset(s.x, s.y))), ga.BatchError, "DataLoader.*Pass tensors whose index 0"
    ),
    "audit(model, loss_fn, x, y)": Mistake(
        lambda s: ga.audit(s.model, _loss, s.x, s.y),
        ga.WindowError,
        r"Write audit\(model, loss_fn, \(x, y\)\)",  # type: ignore[arg-type]
    ),
    # types of options
    "scheduler='cosine'": Mistake(
        lambda s: s.step(scheduler="cosine"), ga.ParameterError, "Pass a scheduler of torch.optim.lr_scheduler"
    ),
    "scaler=True": Mistake(lambda s: s.step(scaler=True), ga.OptionError, r"scaler=torch\.amp\.GradScaler\(\"cuda\"\)"),
    "clip_norm='1'": Mistake(lambda s: s.step(clip_norm="1"), ga.OptionError, r"Pass clip_norm=1\.0"),
    "weights=10": Mistake(lambda s: s.step(weights=10), ga.OptionError, "Pass weights=lambda batch"),
    **{
        f"{name}='no'": Mistake(
            lambda s, name=name: s.step(**{name: "no"}), ga.OptionError, f"{name}='no'.* True or False"
        )
        for name in ("progress", "lockstep", "persistent_gradients", "noise_scale", "collectives")
    },
}


@pytest.mark.filterwarnings("ignore::gradaccum.DiscardedWindowWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_is_told_with_what_to_type(name: str) -> None:
    mistake, script = MISTAKES[name], Script()
    if issubclass(mistake.kind, Warning):
        with pytest.warns(mistake.kind, match=mistake.said):
            mistake.make(script)
    else:
        with pytest.raises(mistake.kind, match=mistake.said):
            mistake.make(script)


# -------------------------------------------------------------------------------------------------- right, nothing said
def _kept_after_updates(script: Script) -> None:
    def body(accumulator: ga.Accumulator, i: int, x: Tensor, y: Tensor) -> None:
        accumulator.backward(script.loss(x, y))
        if (i + 1) % 4 == 0:
            script.optimizer.step()
            script.optimizer.zero_grad()

    script.loop(body)


def _pass_taken_once(script: Script) -> None:
    accumulator = script.accumulator(batch_size=20)
    both_epochs = accumulator.over(script.loader[:4])
    for _ in range(2):
        for x, y in both_epochs:
            accumulator.backward(script.loss(x, y))


def _logged(script: Script) -> None:
    """Everything that a loop does with a loss besides its backward."""
    running = 0.0
    criterion, accumulator = ga.criterion(CRITERION), script.accumulator(batch_size=20)
    for x, y in accumulator.over(script.loader):
        loss = criterion(script.model(x), y)
        running += loss.item() + float(loss) + loss.detach() + float(f"{loss:.3f}")
        accumulator.backward(0.5 * loss + loss / 2)
    assert running > 0


def _numpy(script: Script) -> None:
    for x, y in ((script.x[:20], script.y[:20]), (script.x[20:], script.y[20:])):
        script.step()((x.numpy(), y.numpy()))


FINE = {"steps kept after updates": _kept_after_updates, "logged": _logged, "numpy": _numpy, "reused": _pass_taken_once}


@pytest.mark.parametrize("name", FINE)
def test_is_right_without_a_word(name: str) -> None:
    script, whole = Script(), Script()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FINE[name](script)
    rows = [slice(0, 20), slice(0, 20)] if name == "reused" else [slice(0, 20), slice(20, 40)]
    for part in rows:
        whole.optimizer.zero_grad()
        whole.loss(whole.x[part], whole.y[part]).backward()
        whole.optimizer.step()
    for trained, expected in zip(script.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-12, atol=1e-14)
    assert_no_gradients(script.model)


def test_an_exception_of_ones_own_comes_through() -> None:
    script = Script()

    def fail(_: Script) -> None:
        raise LookupError("mine")

    with (
        pytest.raises(LookupError, match=r"\Amine\Z"),
        pytest.warns(ga.DiscardedWindowWarning, match="1 micro-batches") as told,
    ):
        _after(1, fail)(script)
    assert len(told) == 1
    assert_no_gradients(script.model)
