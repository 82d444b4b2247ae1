"""Fake tensors of a model, the workspaces that fake kernels know nothing of, and what CUDA's kernels would keep."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gradaccum.memory.fakes import AsOnCuda, WithWorkspaces, can_be_faked, fake_mode, fake_of
from gradaccum.memory.live_bytes import LiveBytes

CPU = torch.device("cpu")


def test_a_parameter_stays_one() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    mode = fake_mode()
    weight, bias = (fake_of(parameter, mode=mode, device=CPU) for parameter in (layer.weight, layer.bias))
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, FakeTensor)
    assert (weight.requires_grad, bias.requires_grad) == (True, False)
    assert (weight.shape, weight.dtype, weight.is_leaf) == ((2, 3), torch.float32, True)


def test_a_buffer_keeps_its_memory_layout() -> None:
    expanded, transposed = torch.zeros(1, 4).expand(3, 4), torch.zeros(4, 3, dtype=torch.bool).t()
    for buffer in (expanded, transposed):
        fake = fake_of(buffer, mode=fake_mode(), device=CPU)
        assert not isinstance(fake, nn.Parameter)
        assert (fake.stride(), fake.dtype) == (buffer.stride(), buffer.dtype)
        assert fake.untyped_storage().nbytes() == buffer.untyped_storage().nbytes()


def test_what_is_here_can_be_faked() -> None:
    assert can_be_faked(CPU)
    assert can_be_faked(torch.device("meta"))
    assert can_be_faked(torch.device("cuda")) == torch.cuda.is_available()
    assert not can_be_faked(torch.device("xla"))


@pytest.mark.parametrize(
    ("steps", "samples", "inputs", "hidden"),
    [(5, 3, 16, 16), (9, 20, 40, 24), (20, 8, 24, 8), (3, 2, 8, 100), (7, 6, 256, 256)],
)
def test_the_workspace_of_a_fused_lstm(steps: int, samples: int, inputs: int, hidden: int) -> None:
    def workspace(made: torch.Tensor) -> int:
        weights = [made.new_zeros(4 * hidden, size) for size in (inputs, hidden)]
        weights += [made.new_zeros(4 * hidden) for _ in range(2)]
        states = [made.new_zeros(samples, hidden) for _ in range(2)]
        options = (False, [], 2, hidden, 1, True, False, False, True)
        return torch.ops.aten.mkldnn_rnn_layer.default(made, *weights, *states, *options)[3].nbytes

    true = workspace(torch.zeros(steps, samples, inputs))
    with fake_mode():
        assert workspace(torch.zeros(steps, samples, inputs)) == 0  # why it is needed at all
        with WithWorkspaces():
            known = workspace(torch.zeros(steps, samples, inputs))
    assert true <= known <= 1.03 * true


def test_the_reserve_of_cudnn_is_not_forgotten() -> None:
    with fake_mode(), WithWorkspaces():
        x = torch.zeros(6, 2, 16)
        weights = [torch.zeros(4 * 8, 16), torch.zeros(4 * 8, 8), torch.zeros(4 * 8), torch.zeros(4 * 8)]
        states = [torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)]
        for training, expected in ((True, 6 * 2 * 8 * (4 + 2) * 4), (False, 0)):
            options = (2, 8, 0, 1, False, 0.0, training, False, [], None)
            assert torch.ops.aten._cudnn_rnn.default(x, weights, 4, None, *states, *options)[3].nbytes == expected


# ---------------------------------------------------------------------------------------------------- as on CUDA
ROWS, HEADS, TIME, WIDTH = 2, 4, 64, 16
VALUES = ROWS * HEADS * TIME * WIDTH
PAIRS = ROWS * HEADS * TIME * TIME


def kept_by_attention(dtype: torch.dtype, *, as_on_cuda: bool, masked: bool = False, **options: object) -> int:
    """Bytes that are alive after the forward, with its output."""
    with FakeTensorMode(), torch.enable_grad():
        heads = [torch.empty(ROWS, HEADS, TIME, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]
        mask = torch.ones(TIME, TIME, dtype=torch.bool) if masked else None
        with LiveBytes() as live:
            with AsOnCuda() if as_on_cuda else nullcontext():
                output = F.scaled_dot_product_attention(*heads, attn_mask=mask, **options)  # type: ignore[arg-type]
            kept = live.current
            assert output.shape == heads[0].shape
            output.sum().backward()
            assert all(head.grad is not None and head.grad.shape == head.shape for head in heads)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_keeps_no_pairs(dtype: torch.dtype, masked: bool) -> None:
    options = {} if masked else {"is_causal": True}
    here = kept_by_attention(dtype, as_on_cuda=False, masked=masked, dropout_p=0.1, **options)
    there = kept_by_attention(dtype, as_on_cuda=True, masked=masked, dropout_p=0.1, **options)
    assert here > 2 * PAIRS * dtype.itemsize
    statistics = ROWS * HEADS * TIME * 4 + 16  # a float for each token and head, and where the random stream was
    mask = TIME * TIME * dtype.itemsize if masked else 0
    assert there == pytest.approx(VALUES * dtype.itemsize + statistics + mask, abs=16)


def test_attention_that_has_no_stand_in_is_left_alone() -> None:
    with FakeTensorMode(), AsOnCuda():
        flat = torch.empty(HEADS, TIME, WIDTH, requires_grad=True)
        assert F.scaled_dot_product_attention(flat, flat, flat).shape == flat.shape
        few = torch.empty(ROWS, 2, TIME, WIDTH, requires_grad=True)
        query = torch.empty(ROWS, HEADS, TIME, WIDTH, requires_grad=True)
        output = F.scaled_dot_product_attention(query, few, few, enable_gqa=True)
        output.sum().backward()
    assert few.grad is not None
    assert few.grad.shape == few.shape


def test_dropout_keeps_a_mask_of_bools() -> None:
    layer = torch.nn.Dropout(0.1)
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1000, requires_grad=True)
        output = layer(x)
        assert live.current == x.nbytes + output.nbytes + 4 * 1000  # of the CPU: floats
        del output
        with AsOnCuda():
            output = layer(x)
            assert live.current == x.nbytes + output.nbytes + 1000
            output.sum().backward()
            assert x.grad is not None


def test_dropout_that_does_nothing_is_left_alone() -> None:
    x = torch.ones(10)
    with AsOnCuda():
        assert torch.nn.Dropout(0.1).eval()(x) is x
        assert torch.equal(F.dropout(x, 0.0), x)
        assert F.dropout(x, 0.5, inplace=True) is x
