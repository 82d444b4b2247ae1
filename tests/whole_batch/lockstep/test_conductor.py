"""Nothing waits for ever, whatever ends a run early; every test has a deadline, and leaves no thread (conftest)."""

import _thread
import copy
import gc
import signal
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.whole_batch.batch_norm.exact import Exact
from gradaccum.whole_batch.lockstep.conductor import Abandoned, Conductor, Member
from normed import Batch, ResNet, buffers_of, classes_loss, make_batches, make_network, sgd, trained
from oracle import assert_same_gradients, parameters_of, whole_batches
from scarce import Memory, Scarce

SECONDS = 30.0  # after which a test that should be over in one is interrupted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Interrupts a test that hangs."""
    timer = threading.Timer(SECONDS, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
    timer.join()


def assert_no_thread_of_lockstep() -> None:
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gradaccum")]


def exact_step(model: nn.Module, loss: Any = classes_loss, **options: Any) -> ga.TrainStep:
    return ga.TrainStep(model, sgd(model), loss, batch_norm="exact", **options)


# ----------------------------------------------------------------------------------------------------------- the baton
def test_one_runs_at_a_time_in_the_batchs_order() -> None:
    log: list[str] = []

    def run_one(member: Member) -> int:
        log.append(f"{member.index}a")
        total = member.meet("here", "here", member.index, sum)
        log.append(f"{member.index}b")
        return total + member.index

    assert Conductor(CPU, [], run_one).run(3) == [3, 4, 5]
    assert log == ["0a", "1a", "2a", "0b", "1b", "2b"]


def test_what_is_combined_is_not_kept() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def run_one(member: Member) -> None:
        brought = torch.zeros(3)
        kept.append(weakref.ref(brought))
        member.meet("first", "first", brought, lambda _: None)
        del brought
        member.meet("second", "second", None, lambda _: alive.append(sum(one() is not None for one in kept)))

    alive: list[int] = []
    Conductor(CPU, [], run_one).run(3)
    assert alive == [0]


# ----------------------------------------------------------------------------------------------------- errors of a user
class Failing(nn.Module):
    """Raises in one micro-batch, before or behind a layer over the batch."""

    def __init__(self, at: int, error: BaseException, *, behind: bool) -> None:
        super().__init__()
        self.net, self.last = ResNet(blocks=1), nn.BatchNorm1d(4)
        self.at, self.error, self.behind = at, error, behind
        self.calls = 0
        self.cleaned = 0

    def forward(self, x: Tensor) -> Tensor:
        index, self.calls = self.calls, self.calls + 1
        try:
            if not self.behind and index == self.at:
                raise self.error
            hidden = self.last(self.net(x))
            if self.behind and index == self.at:
                raise self.error
            return hidden
        finally:
            self.cleaned += 1


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration()], ids=repr)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_micro_batch_that_raises_ends_all_with_its_own_error(at: int, behind: bool, error: BaseException) -> None:
    model = Failing(at, error, behind=behind).double()
    step = exact_step(model, micro_batch_size=4, check="off")
    parameters, buffers, random_state = parameters_of(model), buffers_of(model), torch.get_rng_state()
    with pytest.raises(type(error)) as caught:
        step(make_batches(1)[0])
    assert caught.value is error
    assert any("raise self.error" in (frame.line or "") for frame in traceback.extract_tb(caught.value.__traceback__))
    assert_no_thread_of_lockstep()
    assert model.cleaned == (4 if behind else at + 1)
    assert_same_gradients(buffers_of(model), buffers, tolerance=0)
    assert_same_gradients(parameters_of(model), parameters, tolerance=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.at = -1
    assert step(make_batches(1)[0]).index == 1  # and goes on


def test_an_error_in_the_backward() -> None:
    model = make_network("residual")
    step = exact_step(model, micro_batch_size=4)
    buffers = buffers_of(model)

    def fail(_: Tensor) -> None:
        raise ValueError("in the backward")

    hook = model.stem.weight.register_hook(fail)
    with pytest.raises(ValueError, match="in the backward"):
        step(make_batches(1)[0])
    hook.remove()
    assert_same_gradients(buffers_of(model), buffers, tolerance=0)
    assert step(make_batches(1)[0]).index == 1


def test_an_interrupt_while_a_micro_batch_runs() -> None:
    """Ctrl-C reaches the main thread, which waits for a micro-batch."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    model = make_network("residual")
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            _thread.interrupt_main()
        return classes_loss(model, batch)

    step = exact_step(model, loss, micro_batch_size=2)
    buffers = buffers_of(model)
    try:
        with pytest.raises(KeyboardInterrupt):
            step(make_batches(1)[0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert_no_thread_of_lockstep()
    assert_same_gradients(buffers_of(model), buffers, tolerance=0)
    assert step(make_batches(1)[0]).index == 1


def test_a_micro_batch_that_catches_everything_ends_too() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.calls = nn.BatchNorm2d(3), nn.BatchNorm2d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise ValueError("mine")
            try:
                x = self.first(x)
            except BaseException:  # noqa: BLE001 - what this is about
                x = self.second(x)
            return x.mean((2, 3))

    with pytest.raises(ValueError, match="mine"):
        trained(Stubborn().double(), make_batches(1), micro_batch_size=4)
    assert_no_thread_of_lockstep()


def test_abandoned_is_nobodys_exception() -> None:
    assert not issubclass(Abandoned, Exception)


# ------------------------------------------------------------------------------------------------------------ refusals
class Skipping(nn.Module):
    """Leaves a layer out where the data say so."""

    def __init__(self, *, at_the_end: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)
        self.at_the_end = at_the_end

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if len(x) == 4 or self.at_the_end:
            hidden = self.second(hidden)
        if len(x) == 4 or not self.at_the_end:
            hidden = self.third(hidden)
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize(
    ("at_the_end", "message"),
    [
        (False, r"different paths at second: micro-batch 0 was at second when micro-batch 1 was at third"),
        (True, r"different paths at third: micro-batch 0 was at third when micro-batch 1 had reached its end"),
    ],
)
def test_different_paths_are_refused(at_the_end: bool, message: str) -> None:
    with pytest.raises(ga.UnsupportedError, match=message):
        # pieces of 4, 3, 3 and 3
        trained(Skipping(at_the_end=at_the_end).double(), make_batches(1), micro_batch_size=4, check="off")
    assert_no_thread_of_lockstep()


def test_a_second_derivative_is_refused() -> None:
    def penalised(model: nn.Module, batch: Batch) -> Tensor:
        x = batch[0].requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return classes_loss(lambda _: output, batch) + slope.square().mean()

    with pytest.raises(ga.UnsupportedError, match="A backward ran through BatchNorm inside of the loss function"):
        trained(make_network("residual"), make_batches(1), penalised, micro_batch_size=4)


def test_create_graph_is_refused() -> None:
    layer = nn.BatchNorm2d(5).double()
    exact = Exact([layer])
    with exact.held():
        with exact.forward(lambda key, where, mine, combine: combine([mine])):
            output = layer(torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True))
        with exact.backward(), pytest.raises(ga.UnsupportedError, match="no second derivative"):
            torch.autograd.grad(output.square().sum(), layer.weight, create_graph=True)


@pytest.mark.parametrize(
    ("compiled", "batch_norm"),
    [
        *((compiled, "exact") for compiled in ("whole", "in place", "part", "scripted")),
        ("whole", ga.GhostBatch(4)),
    ],
    ids=str,
)
def test_compiled_layers_are_refused(compiled: str, batch_norm: Any) -> None:
    model: Any = make_network("residual")
    named = model
    if compiled == "whole":
        named = torch.compile(model, backend="eager")
    elif compiled == "in place":
        model.compile(backend="eager")
    elif compiled == "part":
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    else:
        with pytest.warns(DeprecationWarning, match="script"):
            model.bn = torch.jit.script(model.bn)
    step = ga.TrainStep(named, sgd(model), classes_loss, micro_batch_size=4, batch_norm=batch_norm)
    by = "batch_norm=" if batch_norm == "exact" else "ga.GhostBatch"
    with pytest.raises(ga.UnsupportedError, match=rf"{by}.* has to see every BatchNorm call, and .* is run by torch\."):
        step(make_batches(1)[0])


def test_a_thread_of_the_users_is_refused() -> None:
    def run_one(member: Member) -> None:
        found: list[BaseException] = []

        def meet() -> None:
            try:
                member.meet("mine", "a layer", None, lambda _: None)
            except BaseException as error:  # noqa: BLE001 - raised below
                found.append(error)

        thread = threading.Thread(target=meet)
        thread.start()
        thread.join()
        raise found[0]

    with pytest.raises(ga.UnsupportedError, match="a layer was called by a thread that the loss function has started"):
        Conductor(CPU, [], run_one).run(2)


# -------------------------------------------------------------------------------------------------------- out of memory
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_out_of_memory_is_a_transaction(where: str, at: int) -> None:
    torch.manual_seed(0)
    memory = Memory(limit=5)
    last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 4))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Scarce(memory, where=where), last).double()
    whole = copy.deepcopy(model)
    whole[2] = nn.Identity()
    step, batches = exact_step(model), make_batches(3)
    for batch in batches:
        assert step(batch).micro_batch_size <= 5
        memory.countdown = at
    assert memory.failures >= 2
    whole_batches(whole, sgd(whole), batches, classes_loss)
    ours, theirs = parameters_of(model) | buffers_of(model), parameters_of(whole) | buffers_of(whole)
    torch.testing.assert_close(list(ours.values()), list(theirs.values()), rtol=1e-10, atol=1e-12)
    assert_no_thread_of_lockstep()


def test_out_of_memory_frees_what_the_micro_batches_held() -> None:
    alive: list[weakref.ref[Tensor]] = []
    seen: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 13:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            gc.collect()
            if len(x) == 7 and len(alive) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            seen.append(sum(one() is not None for one in alive))
            hidden = x * 2
            alive.append(weakref.ref(hidden))
            return hidden

    torch.manual_seed(0)
    model = nn.Sequential(Watched(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).double()
    exact_step(model)(make_batches(1)[0])
    assert seen[0] == 0


def test_where_one_sample_does_not_fit() -> None:
    model = nn.Sequential(Scarce(Memory(limit=0)), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).double()
    with pytest.raises(ga.DoesNotFitError, match=r'In lockstep the activations of all .* activations="host"'):
        exact_step(model)(make_batches(1)[0])
