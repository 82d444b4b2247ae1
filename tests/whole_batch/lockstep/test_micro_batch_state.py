"""What each micro-batch has for itself: its thread's state, its random numbers, what modules keep on themselves."""

import contextvars
import copy
import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gradaccum as ga
from gradaccum.memory.live_bytes import LiveBytes
from gradaccum.whole_batch.lockstep.micro_batch_state import Attributes, Streams, attributes_seen, carry_thread_state
from normed import CLASSES, NORMED, ROWS, Batch, ResNet, assert_like_whole, classes_loss, make_batches, sgd, trained
from oracle import assert_same

# --------------------------------------------------------------------------------------------------- the thread's state
VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def in_another_thread(function: Callable[[], Any]) -> Any:
    run = carry_thread_state(torch.device("cpu"))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(function)))
    thread.start()
    thread.join()
    return found[0]


def described() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cached": torch.is_autocast_cache_enabled(),
        "device": torch.empty(0).device.type,
        "variable": VARIABLE.get(),
    }


def test_nothing_set() -> None:
    assert in_another_thread(described) == described()


@pytest.mark.parametrize("is_cached", [True, False])
def test_all_of_it(is_cached: bool) -> None:
    token = VARIABLE.set("set")
    try:
        autocast = torch.autocast("cpu", dtype=torch.float16, cache_enabled=is_cached)
        with torch.no_grad(), autocast, torch.device("meta"):
            here = described()
            assert in_another_thread(described) == here
        assert here == {
            "gradients": False,
            "autocast": (True, torch.float16),
            "cached": is_cached,
            "device": "meta",
            "variable": "set",
        }
    finally:
        VARIABLE.reset(token)


def test_the_number_of_threads_that_libraries_beside_torch_start() -> None:
    openmp = getattr(ctypes.CDLL(None), "omp_get_max_threads", None)
    if openmp is None:
        pytest.skip("this torch has no OpenMP")
    before, wanted = torch.get_num_threads(), 1 + (os.cpu_count() or 1)  # a new thread has as many as there are cores
    torch.set_num_threads(wanted)
    try:
        assert in_another_thread(openmp) == wanted
    finally:
        torch.set_num_threads(before)


def test_modes_see_the_other_threads_operations() -> None:
    seen: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Names(), LiveBytes() as memory:
        kept = in_another_thread(lambda: torch.zeros(1000).exp())
    assert "exp" in seen
    assert memory.current == kept.nbytes


def test_hooks_on_saved_tensors() -> None:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        in_another_thread(x.exp)
    assert packed == [torch.Size([3])]


# ------------------------------------------------------------------------------------------------------- random numbers
def test_each_stream_goes_on_where_it_stopped() -> None:
    torch.manual_seed(0)
    streams = Streams(2)
    drawn: dict[int, list[Tensor]] = {0: [], 1: []}
    for index in (0, 1, 1, 0):
        with streams.of(index):
            drawn[index].append(torch.rand(3))
    torch.manual_seed(0)
    again = Streams(2)
    for index in (0, 1):
        with again.of(index):
            assert torch.equal(torch.rand(6), torch.cat(drawn[index]))
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_stream_does_not_depend_on_how_many_there_are() -> None:
    torch.manual_seed(0)
    seeds = [Streams(count)._seeds for count in (2, 5, 13)]
    assert seeds[0] == seeds[2][:2]
    assert seeds[1] == seeds[2][:5]


def test_afterwards_the_generator_is_one_number_further() -> None:
    def after(draws: int) -> Tensor:
        torch.manual_seed(0)
        streams = Streams(2)
        with streams.of(0):
            torch.rand(draws)
        streams.end()
        return torch.get_rng_state()

    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    torch.randint(0, 1 << 62, ())
    assert torch.equal(after(0), untouched)
    assert torch.equal(after(3), torch.get_rng_state())
    assert torch.equal(after(300), torch.get_rng_state())


def test_dropout_is_that_of_the_micro_batchs_own_stream() -> None:
    """Each micro-batch draws what it would draw alone, from its stream: the same masks in a loop without lockstep."""
    torch.manual_seed(0)
    model = ResNet(blocks=1, dropout=0.5).double().eval()  # so that lockstep is all there is between them
    model.dropout.train()
    whole = copy.deepcopy(model)
    batch = make_batches(1)[0]
    torch.manual_seed(5)
    made, _ = trained(model, [batch], _gathering, micro_batch_size=4, batch_norm="micro", lockstep=True)
    torch.manual_seed(5)
    streams = Streams(4)
    loss = torch.zeros(())
    for index, rows in enumerate(ga.split_by_samples().plan(batch, 4)):
        with streams.of(index):
            loss = loss + F.cross_entropy(whole(batch[0][rows]), batch[1][rows], reduction="sum") / len(batch[1])
    optimizer = sgd(whole)
    loss.backward()
    optimizer.step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(made[0].parameters[name], parameter.detach(), rtol=NORMED, atol=NORMED)


def _gathering(model: nn.Module, batch: Batch) -> Tensor:
    ga.gather(batch[1])  # one more meeting, between which streams are switched
    return classes_loss(model, batch)


def test_a_seed_repeats_an_update() -> None:
    torch.manual_seed(0)
    model = ResNet(blocks=1, dropout=0.5).double()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(trained(copy.deepcopy(model), make_batches(3), micro_batch_size=4)[0])
        runs[-1].append(torch.get_rng_state())  # type: ignore[arg-type]
    assert torch.equal(runs[0].pop(), runs[1].pop())  # type: ignore[arg-type]
    assert_same(runs[0], runs[1], tolerance=0)


def test_masks_of_micro_batches_differ() -> None:
    masks: list[Tensor] = []
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 4)).double()
    model[1].register_forward_hook(lambda _m, _i, output: masks.append(output == 0))
    trained(model, make_batches(1, rows=12), micro_batch_size=4)
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


# ----------------------------------------------------------------------------------------------------------- attributes
class Skips(nn.Module):
    """Keeps features in one layer for a later one, and what is left of them for whoever looks afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(8, CLASSES)
        self.kept: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.conv(x))
        self.size = len(x)
        hidden = self.bn(self.kept)
        assert self.size == len(x)
        self.calls += 1
        output = self.head(torch.cat([hidden, self.kept], dim=1).mean((2, 3)))
        del self.size
        return output


@pytest.mark.parametrize("size", [1, 4, ROWS])
def test_features_kept_on_the_module(size: int) -> None:
    assert_like_whole(Skips().double(), make_batches(2), micro_batch_size=size)


def test_the_last_micro_batchs_stay_and_modules_are_as_they_were() -> None:
    before = nn.Module.__setattr__, nn.Module.__delattr__
    model = Skips().double()
    trained(model, make_batches(1), micro_batch_size=4)
    assert model.kept is not None
    assert len(model.kept) == 3
    assert model.calls == 4
    assert not hasattr(model, "size")
    assert (nn.Module.__setattr__, nn.Module.__delattr__) == before


def test_switching() -> None:
    module, attributes = nn.Linear(1, 1), Attributes(2)
    with attributes_seen():
        with attributes.of(0), attributes.noted(0):
            module.kept = "first"
        with attributes.of(1), attributes.noted(1):
            module.kept = "second"
            module.weight = nn.Parameter(torch.zeros(1, 1))  # is everybody's
        with attributes.of(0), attributes.noted(0):
            assert module.kept == "first"
            del module.kept
        with attributes.of(1):
            assert module.kept == "second"
        with attributes.of(0):
            assert not hasattr(module, "kept")
            assert module.weight.item() == 0


def test_other_threads_are_not_noted() -> None:
    module, attributes = nn.Linear(1, 1), Attributes(1)
    with attributes_seen():
        module.kept = 1
        with attributes.noted(0):
            pass
        module.kept = 2
    with attributes.of(0):
        pass
    with attributes.of(0):
        assert module.kept == 2
