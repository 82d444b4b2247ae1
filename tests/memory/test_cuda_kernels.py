"""What CUDA's kernels would keep for backward, on fake tensors of the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gradaccum.memory.cuda_kernels import AsOnCuda
from gradaccum.memory.live_bytes import LiveBytes

ROWS, HEADS, TIME, WIDTH = 2, 4, 64, 16
VALUES = ROWS * HEADS * TIME * WIDTH
PAIRS = ROWS * HEADS * TIME * TIME


def kept_by_attention(dtype: torch.dtype, *, as_on_cuda: bool, masked: bool = False, **options: object) -> int:
    """Bytes that are alive after the forward, with its output."""
    with FakeTensorMode(), torch.enable_grad():
        heads = [torch.empty(ROWS, HEADS, TIME, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]
        mask = torch.ones(TIME, TIME, dtype=torch.bool) if masked else None
        with LiveBytes() as live:
            if as_on_cuda:
                with AsOnCuda():
                    output = F.scaled_dot_product_attention(*heads, attn_mask=mask, **options)  # type: ignore[arg-type]
            else:
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
