"""Where activations wait, counted in live bytes; what is copied to the host, and which blocks are found."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.memory.live_bytes import LiveBytes
from gradaccum.whole_batch.activations import CudaTransfer, HostMemory, find_blocks, recomputed
from normed import ResNet, assert_like_whole, classes_loss, make_batches, make_network, sgd, trained

# What is left on the device, as a part of what the whole batch takes there; the last two are the issue's.
ON_DEVICE = 1.15
RECOMPUTED = 0.6
ON_HOST = 0.25

ROWS = 32


class NumpyTransfer:
    """Copies that `LiveBytes` does not see, as if the host were another machine: what it sees is the device."""

    def __init__(self) -> None:
        self.num_out = self.num_back = self.num_arrived = 0

    def out(self, tensor: Tensor) -> Any:
        self.num_out += 1
        return np.array(tensor.numpy(), order="K", copy=True)

    def back(self, host: Any) -> Callable[[], Tensor]:
        self.num_back += 1
        tensor = torch.from_numpy(host).clone(memory_format=torch.preserve_format)

        def arrive() -> Tensor:
            self.num_arrived += 1
            return tensor

        return arrive


@contextmanager
def on_other_machine(transfer: NumpyTransfer, *, min_bytes: int, ahead_bytes: int = 0) -> Iterator[None]:
    """``activations="host"`` copies by this, and not by CUDA."""

    def host_memory(models: Sequence[nn.Module], *_: Any) -> HostMemory:
        return HostMemory(models, transfer, min_bytes=min_bytes, ahead_bytes=ahead_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradaccum.whole_batch.lockstep.lockstep.host_memory", host_memory)
        patch.setattr("gradaccum.whole_batch.activations.host_memory", host_memory)
        yield


def peak_of(micro_batch_size: int, *, blocks: int = 6, **options: Any) -> tuple[int, dict[str, Tensor]]:
    """Peak bytes of one update besides what is there before, and the parameters after it."""
    torch.manual_seed(0)
    model = ResNet(channels=16, blocks=blocks)
    step = ga.TrainStep(model, sgd(model), classes_loss, micro_batch_size=micro_batch_size, **options)
    batches = make_batches(2, rows=ROWS, dtype=torch.float32)
    step(batches[0])
    gc.collect()
    with LiveBytes() as memory:
        step(batches[1])
    return memory.peak, {name: parameter.detach() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- peaks
@pytest.mark.parametrize(("activations", "most"), [("device", ON_DEVICE), ("recompute", RECOMPUTED), ("host", ON_HOST)])
def test_peaks_as_parts_of_the_whole_batchs(activations: str, most: float) -> None:
    """Saved are BatchNorm's input and the ReLU's output, in both; lockstep has no micro-batch's graph twice."""
    whole, expected = peak_of(ROWS, batch_norm="exact")
    transfer = NumpyTransfer()
    with on_other_machine(transfer, min_bytes=1 << 10):
        peak, parameters = peak_of(4, batch_norm="exact", activations=activations)
    assert peak <= most * whole, f"{peak / whole:.3f} of the whole batch's"
    assert transfer.num_arrived >= transfer.num_out
    assert (transfer.num_out > 0) == (activations == "host")
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_peaks_do_not_grow_with_the_number_of_updates() -> None:
    torch.manual_seed(0)
    model = ResNet(channels=8)
    step = ga.TrainStep(model, sgd(model), classes_loss, micro_batch_size=4, batch_norm="exact")
    batch = make_batches(1, rows=ROWS, dtype=torch.float32)[0]
    step(batch)
    gc.collect()
    with LiveBytes() as memory:
        for _ in range(3):
            step(batch)
        gc.collect()
        left = memory.current
    assert left <= 1 << 12, f"{left} bytes left behind"


# ------------------------------------------------------------------------------------------------------- host
def test_whatever_ahead_is_sent_the_gradient_is_the_same() -> None:
    for ahead in (0, 1 << 14, 1 << 30):
        transfer = NumpyTransfer()
        with on_other_machine(transfer, min_bytes=1, ahead_bytes=ahead):
            assert_like_whole(make_network("branching"), make_batches(2), micro_batch_size=4, activations="host")
        assert transfer.num_back >= transfer.num_arrived >= transfer.num_out


def test_a_tensor_is_copied_once_with_its_strides_and_again_when_it_was_changed_in_place() -> None:
    transfer = NumpyTransfer()
    memory = HostMemory([], transfer, min_bytes=1)
    x = torch.arange(12.0).view(3, 4)
    first, second, part = memory.pack(x), memory.pack(x.detach()), memory.pack(x[1:])
    assert first is second
    assert part is not first
    assert transfer.num_out == 2
    assert torch.equal(memory.unpack(part), x[1:])
    x.add_(1)
    after = memory.pack(x)
    assert torch.equal(memory.unpack(first), x - 1)
    assert torch.equal(memory.unpack(after), x)
    strided = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert memory.unpack(memory.pack(strided)).stride() == strided.stride()


def test_memory_that_is_used_again_is_not_mistaken() -> None:
    """The same address, shape and version: only the storage tells that it is another tensor."""
    memory = HostMemory([], NumpyTransfer(), min_bytes=1)
    kept = []
    for value in range(50):
        x = torch.full((1000,), float(value))
        kept.append(memory.pack(x))
        del x
    assert [memory.unpack(one)[0].item() for one in kept] == list(range(50))


def test_what_stays_is_not_copied() -> None:
    model = nn.Linear(4, 4)
    transfer = NumpyTransfer()
    memory = HostMemory([model], transfer, min_bytes=16)
    for tensor in (model.weight, model.weight.t(), torch.ones(3), torch.ones(1).expand(100), torch.eye(9).to_sparse()):
        assert memory.pack(tensor) is tensor
    assert transfer.num_out == 0


def test_on_the_cpu_host_is_the_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="gradaccum")
    assert_like_whole(make_network("residual"), make_batches(3), micro_batch_size=4, activations="host")
    assert 'activations="host" changes nothing here' in caplog.text


@pytest.mark.gpu
def test_cuda_transfers() -> None:
    device = torch.device("cuda")
    memory = HostMemory([], CudaTransfer(device), min_bytes=1)
    tensors = [torch.randn(1 << 16, device=device) for _ in range(20)]
    kept = [memory.pack(tensor) for tensor in tensors]
    for tensor, one in reversed(list(zip(tensors, kept, strict=True))):
        assert torch.equal(memory.unpack(one), tensor)


# -------------------------------------------------------------------------------------------- recompute
def layer(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), *more)


class Body(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(2, 2), nn.ModuleList(blocks), nn.Linear(2, 2)


def test_blocks_of_a_sequential_and_of_a_list() -> None:
    blocks = [layer() for _ in range(4)]
    assert find_blocks([nn.Sequential(*blocks, nn.Linear(2, 2))]) == blocks
    assert find_blocks([Body(*blocks)]) == blocks
    both = find_blocks([Body(*blocks), nn.Sequential(layer(), layer(), layer())])
    assert both[:4] == blocks
    assert len(both) == 7

    model = ResNet()
    assert find_blocks([model]) == list(model.blocks)


def test_the_level_at_which_least_is_alive() -> None:
    small = [layer() for _ in range(6)]  # a whole body behind one checkpoint would be made again at once
    assert find_blocks([nn.Sequential(layer(), nn.Sequential(*small), nn.Linear(2, 2))])[-6:] == small
    large = [nn.Sequential(layer(), layer(), layer()) for _ in range(9)]
    assert find_blocks([Body(*large)]) == large  # 9 + 9 alive, where the 27 within would keep 27 + 3


def test_a_shared_block_counts_once() -> None:
    block, other = layer(), layer()
    assert find_blocks([Body(block, block, other)]) == [block, other]


def test_no_blocks_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    batches = [torch.randn(4, 2, dtype=torch.float64)]
    with pytest.raises(ga.UnsupportedError, match="found none"):
        trained(model, batches, lambda model, x: model(x).sum(), micro_batch_size=2, activations="recompute")


def test_blocks_are_as_they_were() -> None:
    model = ResNet()
    model.blocks[0].forward = own = model.blocks[0].forward  # type: ignore[method-assign]
    with recomputed([model]):
        assert model.blocks[0].forward is not own
        assert "forward" in model.blocks[1].__dict__
    assert model.blocks[0].forward is own
    assert "forward" not in model.blocks[1].__dict__


# ------------------------------------------------------------------------------------- one after another
class Stateful(nn.Module):
    """Blocks whose forward writes buffers, and draws."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(3)]
        self.blocks = nn.ModuleList(nn.Sequential(one, nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)) for one in wide)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def updated(model: nn.Module, batch: Any, **options: Any) -> dict[str, Tensor]:
    """State after two updates, with random draws from the same seed."""
    torch.manual_seed(0)
    step = ga.TrainStep(model, sgd(model), options.pop("loss_fn", classes_loss), **options)
    for _ in range(2):
        step(batch)
    return model.state_dict()


FORWARD: dict[str, Any] = {
    "loss_fn": None,
    "forward": lambda model, batch: model(batch[0]),
    "batch_loss": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
}


@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")  # of spectral norm
@pytest.mark.parametrize("options", [{}, {"batch_norm": "frozen"}, {"randomness": "sample"}, {"fused": True}, FORWARD])
def test_blocks_run_again_find_what_the_first_run_found(options: dict[str, Any]) -> None:
    batch = torch.randn(13, 6, dtype=torch.float64), torch.randint(4, (13,))
    states: dict[str, dict[str, Tensor]] = {}
    for activations in ("device", "recompute"):
        torch.manual_seed(1)
        model = Stateful().double()
        states[activations] = updated(model, batch, micro_batch_size=4, activations=activations, check="off", **options)
    for name, expected in states["device"].items():
        torch.testing.assert_close(states["recompute"][name], expected, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.filterwarnings("ignore::gradaccum.BatchNormWarning")
def test_peaks_of_one_micro_batch() -> None:
    transfer = NumpyTransfer()
    with on_other_machine(transfer, min_bytes=1 << 10):
        peaks = {kind: peak_of(ROWS, activations=kind, blocks=8) for kind in ("device", "recompute", "host")}
    device, expected = peaks["device"]
    assert peaks["recompute"][0] <= 0.5 * device
    assert peaks["host"][0] <= ON_HOST * device
    for kind in ("recompute", "host"):
        for name, parameter in peaks[kind][1].items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_models_of_transformers_leave_their_caches_out(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small)
        make = transformers.GPT2LMHeadModel
    elif kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**sizes, **small)
        make = transformers.LlamaForCausalLM
    else:
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, **small
        )
        make = transformers.T5ForConditionalGeneration
    batch = {"input_ids": torch.randint(50, (5, 12)), "labels": torch.randint(50, (5, 12))}

    def loss_fn(model: Any, micro_batch: Any) -> ga.Loss:
        loss = model(**micro_batch, use_cache=True).loss
        return ga.Loss.mean(loss, over=len(micro_batch["labels"]))

    states: dict[str, dict[str, Tensor]] = {}
    for activations in ("device", "recompute"):
        torch.manual_seed(1)
        model = make(config).double()
        options: dict[str, Any] = {"loss_fn": loss_fn, "micro_batch_size": 2, "check": "off"}
        states[activations] = updated(model, batch, activations=activations, **options)
        assert not any("forward" in vars(module) for module in model.modules())
    for name, expected in states["device"].items():
        torch.testing.assert_close(states["recompute"][name], expected, rtol=1e-10, atol=1e-12, msg=name)


def test_a_cache_that_is_not_empty_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    ids = torch.randint(50, (2, 5))
    cache = model(ids).past_key_values
    with recomputed([model]), pytest.raises(ga.UnsupportedError, match="cache has 5 tokens before its own"):
        model(ids, past_key_values=cache)


def test_no_blocks_are_an_error_at_construction() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ga.UnsupportedError, match="found none"):
        ga.TrainStep(model, sgd(model), classes_loss, activations="recompute")
