"""Bytes counted op by op: exact for real and fake tensors, whatever keeps them alive."""

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from gradaccum.memory.live_bytes import AllocatorBytes, LiveBytes, graph_bytes, measured_peak, storages_of

KB = 1000  # bytes of 250 floats


@pytest.fixture(params=["real", "fake"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything that is counted is counted for both kinds of tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True) if request.param == "fake" else nullcontext():
        yield request.param


def counted(program: Callable[[LiveBytes], object]) -> tuple[int, int]:
    """Bytes at the end, with what the program returns still alive, and at the peak."""
    with LiveBytes() as live:
        kept = program(live)
        current = live.current
    del kept
    return current, live.peak


def vector() -> Tensor:
    return torch.zeros(250)


def frees(live: LiveBytes) -> Tensor:
    x = vector()
    y = x + 1
    del x
    return y


def storage_given_back(live: LiveBytes) -> Tensor:
    x = vector()
    x.untyped_storage().resize_(0)
    return x


def storage_taken_again(live: LiveBytes) -> Tensor:
    x = storage_given_back(live)
    vector()
    x.untyped_storage().resize_(KB)
    return x


def data_replaced(live: LiveBytes) -> Tensor:
    x = vector()
    x.data = torch.zeros(500)
    return x


def cycle(live: LiveBytes) -> None:
    one: list[object] = [vector()]
    one.append(one)
    del one
    gc.collect()


DTYPES = (torch.bool, torch.float16, torch.float64, torch.complex64)
PROGRAMS: dict[str, tuple[Callable[[LiveBytes], object], int, int]] = {
    "nothing": (lambda live: None, 0, 0),
    "frees": (frees, KB, 2 * KB),
    "views": (
        lambda live: [x := vector(), x.view(10, 25), x[5:], x.expand(7, 250), x.detach(), x.view(10, 25).t()],
        KB,
        KB,
    ),
    "the last view keeps all": (lambda live: vector()[:1], KB, KB),
    "in place": (lambda live: vector().add_(1).mul_(2).relu_(), KB, KB),
    "out= grows": (lambda live: torch.add(vector(), 1, out=torch.empty(0)), KB, 2 * KB),
    "resize_": (lambda live: torch.empty(0).resize_(750), 3 * KB, 3 * KB),
    "a storage given back": (storage_given_back, 0, KB),
    "a storage taken again": (storage_taken_again, KB, KB),
    "two tensors, one storage": (lambda live: [x := vector(), vector().set_(x)], KB, 2 * KB),
    "data replaced": (data_replaced, 2 * KB, 3 * KB),
    "two outputs": (lambda live: torch.max(torch.zeros(10, 25), dim=1), 120, KB + 120),  # 10 floats and 10 int64
    "a list of outputs": (lambda live: torch._foreach_add([vector(), vector()], 1), 2 * KB, 4 * KB),
    "dtypes": (lambda live: [torch.zeros(10, dtype=dtype) for dtype in DTYPES], 190, 190),  # 10 of 1 + 2 + 8 + 8 bytes
    "a cycle": (cycle, 0, KB),
    "numbers": (lambda live: torch.tensor([1.0] * 250), KB, KB),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_bytes(name: str, kind: str) -> None:
    program, current, peak = PROGRAMS[name]
    assert counted(program) == (current, peak)


def test_saved_for_backward(kind: str) -> None:
    """Autograd's saved tensors are alive without any name in Python, until backward has used them."""
    x = torch.zeros(250, requires_grad=True)
    with LiveBytes() as live:
        loss = x.exp().sin().cos().sum()  # exp and sin are kept; the sum needs no numbers
        assert live.current == 2 * KB + 4
        loss.backward()
        assert live.current == KB + 4  # the gradient and the loss
        x.grad = None
        del loss
        assert live.current == 0


def test_a_gradient_is_added_to_in_place(kind: str) -> None:
    x = torch.zeros(250, requires_grad=True)
    with LiveBytes() as live:
        for _ in range(3):
            (x * x).sum().backward()
            assert live.current == KB


def test_checkpointing_keeps_less() -> None:
    layers = nn.Sequential(*[nn.Sequential(*[nn.Linear(50, 50), nn.Tanh()] * 4) for _ in range(4)])
    x = torch.zeros(40, 50)

    def peak(*, reentrant: bool | None) -> int:
        with LiveBytes() as live:
            y = x * 1
            y.requires_grad_()
            for layer in layers:
                y = layer(y) if reentrant is None else checkpoint(layer, y, use_reentrant=reentrant)
            y.sum().backward()
            del y
            layers.zero_grad()
            assert live.current == 0
        return live.peak

    assert max(peak(reentrant=False), peak(reentrant=True)) < 0.8 * peak(reentrant=None)


def test_autocast() -> None:
    layer = nn.Linear(50, 50)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.zeros(10, 50))
            # the input's cast, which backward needs; the casts of weight and bias, kept until autocast ends; the output
            assert live.current == 1000 + 2 * (50 * 50 + 50) + 1000
        del y
        assert live.current == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors_and_wrappers_have_the_memory_of_their_parts() -> None:
    embedding = nn.Embedding(1000, 10, sparse=True)
    with LiveBytes() as live:
        embedding(torch.arange(5)).sum().backward()
        assert live.current == 5 * 8 + 5 * 10 * 4  # indices and values
        embedding.weight.grad = None
    with LiveBytes() as live:
        kept = torch.eye(4).to_sparse_csr()
        assert live.current == sum(storage.nbytes() for storage in storages_of(kept))
    with LiveBytes() as live:
        wrapped = TwoTensor(vector(), vector()) + 1
        assert live.current == 2 * KB
        del wrapped
        assert live.current == 0


def test_what_was_there_before_is_not_counted(kind: str) -> None:
    x, y = vector(), torch.empty(0)
    with LiveBytes() as live:
        x.add_(1)
        x.view(10, 25)
        assert live.peak == 0
        torch.add(x, 1, out=y)  # has grown since
        assert live.current == KB
        y.resize_(500)
        assert live.current == 2 * KB
        del x
        assert live.current == 2 * KB
        y.untyped_storage().resize_(0)
        assert live.current == 0
    x, y = vector(), vector()
    with LiveBytes() as live:
        x.add(y)
        x.untyped_storage().resize_(0)
        assert live.current == -KB
        x.untyped_storage().resize_(KB)
        assert live.current == 0


def test_reset_peak(kind: str) -> None:
    with LiveBytes() as live:
        kept = vector()
        vector()
        assert live.peak == 2 * KB
        live.reset_peak()
        assert live.peak == KB
        vector() + 1
        assert live.peak == 3 * KB
        del kept


def test_sizes_are_rounded_as_an_allocator_would() -> None:
    with LiveBytes(rounded_to=512) as live:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129), torch.zeros(0)]
        assert live.current == 512 + 512 + 1024 + 0
        kept[0].resize_(300)
        assert live.current == 1536 + 512 + 1024
        kept.clear()
        assert live.current == 0


def test_an_operation_that_fails() -> None:
    with LiveBytes() as live:
        x = vector()
        with pytest.raises(RuntimeError):
            x + torch.zeros(3)
        del x
        gc.collect()  # the error's frames
        assert live.current == 0


def test_tensors_freed_in_another_thread() -> None:
    """A backward on another thread frees what the forward saved; nothing is lost or counted twice."""
    x = torch.zeros(250, requires_grad=True)
    with LiveBytes() as live:
        graphs = [x.exp().sin().cos().sum() for _ in range(50)]

        def consume() -> None:
            while graphs:
                graphs.pop()

        with ThreadPoolExecutor(4) as threads:
            for _ in range(4):
                threads.submit(consume)
        assert live.current == 0
        assert live.peak == 50 * (2 * KB + 4) + KB


def test_it_keeps_nothing_alive() -> None:
    with LiveBytes() as live:
        x = vector()
        reference = weakref.ref(x)
        del x
        assert reference() is None
    outlives = vector()
    gone = weakref.ref(live)
    del live
    gc.collect()
    assert gone() is None
    del outlives


def test_one_inside_another() -> None:
    with LiveBytes() as outer:
        x = vector()
        with LiveBytes() as inner:
            y = x + 1
            y.untyped_storage().resize_(2 * KB)
            assert (inner.current, outer.current) == (2 * KB, 3 * KB)
        z = y.clone()
        assert (inner.current, outer.current) == (2 * KB, 3 * KB + z.untyped_storage().nbytes())


def test_torch_is_left_as_it_was() -> None:
    before, there = UntypedStorage.resize_, vector()
    with LiveBytes():
        made = there.add(1).untyped_storage()
        assert "resize_" in vars(made)
        assert UntypedStorage.resize_ is before
        with suppress(ZeroDivisionError), LiveBytes():
            there.add_(1)
            raise ZeroDivisionError
    assert "resize_" not in {*vars(made), *vars(there.untyped_storage()), *vars(UntypedStorage)}


def test_the_peak_outlives_the_meter() -> None:
    with measured_peak(torch.device("cpu")) as memory:
        vector() + vector()
    assert memory.peak == 3 * KB
    vector()
    assert memory.peak == 3 * KB


def test_gradients_in_two_ways_are_the_same() -> None:
    """Counting changes no number."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Dropout(), nn.ReLU(), nn.Linear(30, 1))
    x = torch.randn(8, 20)
    gradients = []
    for mode in (nullcontext, LiveBytes):
        torch.manual_seed(1)
        model.zero_grad()
        with mode():
            model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------------- what a graph has saved
def test_each_storage_counts_once_and_what_is_there_anyway_not_at_all() -> None:
    x = torch.randn(3, 5)
    layer = nn.Linear(5, 7)
    with graph_bytes([*layer.parameters(), x]) as saved:
        y = layer(x).sigmoid()
        z = y * y  # keeps y twice, which the sigmoid has kept already
    assert saved.count == 3 * 7 * 4
    z.sum().backward()
    assert layer.weight.grad is not None


WIDE = nn.Sequential(nn.Linear(5, 500), nn.Tanh(), nn.Linear(500, 5))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(lambda x: checkpoint(WIDE, x, use_reentrant=False), 3 * 5 * 4, id="a checkpoint keeps its input"),
        pytest.param(lambda x: (x.exp()[:1] ** 2).sum(), 3 * 5 * 4, id="views count their whole storage"),
        pytest.param(torch.no_grad()(lambda x: WIDE(x).sigmoid()), 0, id="without a graph nothing is kept"),
    ],
)
def test_what_is_saved(program: Callable[[Tensor], Tensor], expected: int) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with graph_bytes(WIDE.parameters()) as saved:
        y = program(x)
    assert saved.count == expected
    if y.requires_grad:
        y.sum().backward()


@pytest.mark.gpu
def test_the_allocator_and_the_count_agree() -> None:
    device = torch.device("cuda")
    x = torch.zeros(1 << 20, device=device)
    torch.zeros(1, device=device)
    with measured_peak(device) as allocated, LiveBytes(rounded_to=512) as counted_bytes:
        assert isinstance(allocated, AllocatorBytes)
        y = (x + 1).exp()
        z = torch.zeros(100, device=device)
        assert allocated.current == counted_bytes.current == y.nbytes + 512
    assert allocated.peak == counted_bytes.peak == 2 * y.nbytes
    before = allocated.peak
    del y, z
    assert allocated.peak == before
