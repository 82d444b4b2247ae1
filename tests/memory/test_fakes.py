"""Fake tensors of a model and a batch, and the workspaces that fake kernels know nothing of."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from gradaccum.memory.fakes import WithWorkspaces, can_be_faked, fake_micro_batch, fake_mode, fake_of

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


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_micro_batch_of_any_size(size: int) -> None:
    batch = {
        "x": torch.zeros(4, 5),
        "names": ["a", "b", "c", "d"],
        "scale": 2,
        "y": (torch.zeros(4, dtype=torch.int64),),
    }
    fake = fake_micro_batch(batch, size, mode=fake_mode(), device=CPU)
    assert isinstance(fake["x"], FakeTensor)
    assert (fake["x"].shape, fake["y"][0].shape, len(fake["names"]), fake["scale"]) == ((size, 5), (size,), size, 2)
    assert fake["x"].untyped_storage().nbytes() == size * 5 * 4  # its own rows, not the batch's


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
