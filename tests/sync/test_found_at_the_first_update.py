"""What stands around a model, and in it, is found at the first update: right, or refused."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import gradaccum as ga
from oracle import assert_same_gradients, gradients_of
from ranks import results_of
from wrapping import sgd


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients whose parts lie on several processes, put together; others as they are."""
    found: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in found.items()}


def refused(step: ga.TrainStep, x: Tensor) -> str:
    with pytest.raises(ga.UnsupportedError) as caught:
        step.backward(x)
    return str(caught.value)


def around_a_model(rank: int) -> None:
    x = rows(12)
    share = x[:2] if rank == 0 else x[2:]
    model = make()
    ddp = DistributedDataParallel(model)
    step = ga.TrainStep(model, sgd(model), lambda _, b: loss_fn(ddp, b), micro_batch_size=3)
    assert "The plain module was handed over" in refused(step, share)

    ddp = DistributedDataParallel(make())
    ddp.forward = torch.autocast("cpu", enabled=False)(ddp.forward)
    step = ga.TrainStep(ddp, sgd(ddp), loss_fn, micro_batch_size=3)
    assert "has been replaced on the instance" in refused(step, share)

    ddp = DistributedDataParallel(make())
    step = ga.TrainStep(ddp, sgd(ddp), loss_fn, micro_batch_size=3)
    ddp.register_comm_hook(None, lambda state, bucket: bucket)
    assert "a communication hook" in refused(step, share)


def copies(rank: int) -> None:
    """A copy of the model that is made inside of a pass has its own weights."""
    ddp = DistributedDataParallel(make())
    accumulator = ga.Accumulator(ddp, sgd(ddp), micro_batches=2)
    x = rows(2, 1)
    made: list[nn.Module] = []
    for batch in accumulator.over([rows(2, k) for k in range(4)]):
        if accumulator.backward(loss_fn(ddp, batch)) and not made:
            made += [AveragedModel(ddp), copy.deepcopy(ddp)]
            file = io.BytesIO()
            torch.save(ddp, file)
            file.seek(0)
            made.append(torch.load(file, weights_only=False))
            with torch.no_grad():
                before = ddp.module(x)
    for one in made:
        with torch.no_grad():
            assert torch.equal(one(x), before), "as the model was when it was copied"
    assert not torch.equal(ddp(x), before)
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.zero_()
        assert not made[0](x).any()


class Experts(nn.Module):
    """A trunk that all have, and an expert of each process's own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.trunk = make()
        self.expert = nn.Sequential(*list(make(seed=rank))[2:], nn.Linear(2, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(self.trunk[:2](x))


def parameters_left_alone(rank: int) -> None:
    """What DDP is told to ignore has the gradient of its own process's samples; one norm, one decision to skip."""
    shares = [rows(2, 5), rows(11, 6)]
    alone = [Experts(0), Experts(1)]
    for one, x in zip(alone, shares, strict=True):
        loss_fn(one, x).backward()
    expected = gradients_of(alone[rank])
    for name in expected:
        if name.startswith("trunk.") and not name.startswith("trunk.2"):
            both_have = [gradients_of(one)[name] for one in alone]
            expected[name] = sum(g * len(x) / 13 for g, x in zip(both_have, shares, strict=True))
    common = [one for name, one in expected.items() if name.startswith("trunk.") and one is not None]
    own = [p.grad for one in alone for p in one.expert.parameters()]
    norm = torch.nn.utils.get_total_norm([*common, *own]).item()

    model = Experts(rank)
    names = [name for name, _ in model.named_parameters() if name.startswith("expert.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    step = ga.TrainStep(ddp, sgd(ddp), loss_fn, micro_batch_size=3, clip_norm=norm / 7)
    step.backward(shares[rank])
    assert_same_gradients(gradients_of(model), expected)
    model.zero_grad()
    assert abs(step(shares[rank]).grad_norm.item() - norm) < 1e-12 * norm
    if rank == 1:
        model.expert[0].weight.register_hook(lambda g: g * float("inf"))
    assert bool(ga.TrainStep(ddp, sgd(ddp), loss_fn, micro_batch_size=3)(shares[rank]).skipped)
    with pytest.raises(ga.UnsupportedError, match="leave some parameters alone"):
        ga.TrainStep(ddp, sgd(ddp), loss_fn, micro_batch_size=3, weights=len)(shares[rank])


def a_late_process_group(step: ga.TrainStep) -> None:
    assert "made after this TrainStep" in refused(step, rows(4))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = make()

    def encode(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("only encode is called")


def unequal_counts_of_shards(rank: int) -> None:
    """Two models in one step, and a method besides `forward`: processes run fillers in the order of the others."""
    x = rows(13)
    share = x[:2] if rank == 0 else x[2:]
    body, head = make(), nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    whole = copy.deepcopy(nn.ModuleList([body, head]))
    loss_fn(nn.Sequential(*whole), x).backward()
    for order in (1, -1):
        sharded = [fully_shard(copy.deepcopy(body)), fully_shard(copy.deepcopy(head))]
        optimizer = torch.optim.SGD([p for one in sharded for p in one.parameters()], lr=0.1)
        run = nn.Sequential(*sharded)
        step = ga.TrainStep(sharded[::order], optimizer, lambda _, b, run=run: loss_fn(run, b), micro_batch_size=3)
        step.backward(share)
        for one, expected in zip(sharded, whole, strict=True):
            assert_same_gradients(whole_gradients(one), gradients_of(expected))
    left = fully_shard(make())
    left.set_requires_gradient_sync(False)  # as loops by hand do
    step = ga.TrainStep(left, sgd(left), loss_fn, micro_batch_size=3)
    assert "set_requires_gradient_sync(True)" in refused(step, share)
    left.set_requires_gradient_sync(True)
    assert step.backward(share).weight == 13
    encoder = fully_shard(Encoder())
    register_fsdp_forward_method(encoder, "encode")
    loss_fn(alone := make(), x).backward()
    step = ga.TrainStep(encoder, sgd(encoder), lambda m, b: m.encode(b).square().mean(), micro_batch_size=3)
    step.backward(share)
    assert_same_gradients(
        whole_gradients(encoder), {f"layers.{name}": one for name, one in gradients_of(alone).items()}
    )


def tensor_parallel_alone(rank: int) -> None:
    """One model over all processes: gradients as they are, samples counted once, one norm."""
    x = rows(13)
    alone, model = make(), make()
    loss_fn(alone, x).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.grad is not None]).item()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for sync in ("auto", "never"):
        step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=5, sync=sync, clip_norm=norm / 3)
        step.backward(x)
        assert_same_gradients(whole_gradients(model), gradients_of(alone))
        model.zero_grad()
    expected = copy.deepcopy(alone)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), norm / 3)
    update = step(x)
    assert update.samples == 13
    assert abs(update.grad_norm.item() - norm) < 1e-12 * norm
    with pytest.raises(ga.WindowError, match="with tensor parallelism"):
        ga.TrainStep(model, sgd(model), loss_fn)


def both(rank: int, world_size: int, early: Any = None) -> None:
    around_a_model(rank)
    copies(rank)
    parameters_left_alone(rank)
    unequal_counts_of_shards(rank)
    tensor_parallel_alone(rank)
    # A step that was made before the process group.
    dist.destroy_process_group()
    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2)
    store = dist.FileStore(early, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    a_late_process_group(step)


def test_right_or_refused(tmp_path: Any) -> None:
    results_of(both, 2, str(tmp_path / "store"))


def under_fsdp2(rank: int, world_size: int) -> bool:
    replicas_of_a_group(rank)
    parts_of_a_group(rank)
    x = rows(13)
    alone, model = make(), make()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    share = x[:4] if mesh["dp"].get_local_rank() == 0 else x[4:]
    loss_fn(alone, x).backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    optimizer = sgd(alone)
    optimizer.step()
    update = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=3, clip_norm=0.01)(share)
    assert abs(update.grad_norm.item() - norm.item()) < 1e-12 * norm.item()
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        value: Any = parameter
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    # One element of one shard overflows: all skip.
    weight: Any = model[0].weight

    def overflow(p: Any) -> None:
        if rank == 0:
            p.grad.to_local().view(-1)[0].fill_(float("inf"))

    weight.register_post_accumulate_grad_hook(overflow)
    return bool(ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=3)(share).skipped)


def replicas_of_a_group(rank: int) -> None:
    """With ``process_group=`` only the processes of a mesh's dimension add up; the others have the same data."""
    x = rows(13)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    share = x[:4] if mesh["dp"].get_local_rank() == 0 else x[4:]
    alone = make()
    loss_fn(alone, x).backward()
    for group in (mesh["dp"], mesh.get_group("dp")):
        model = make()
        step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=3, process_group=group)
        step.backward(share)
        assert_same_gradients(gradients_of(model), gradients_of(alone))
        model.zero_grad()
        assert step(share).samples == 13
        model = make()
        window = ga.Window(model.parameters(), process_group=group)
        for piece in share.split(3):
            window.weigh(loss_fn(model, piece), samples=len(piece)).backward()
        assert window.settle().weight == 13
        assert_same_gradients(gradients_of(model), gradients_of(alone))
    with pytest.raises(ga.UnsupportedError, match=r'ProcessGroup or a DeviceMesh .*: mesh\["dp"\], say'):
        ga.Window(make().parameters(), process_group="dp")
    ddp = DistributedDataParallel(make())
    with pytest.raises(ga.UnsupportedError, match="names the processes"):
        ga.TrainStep(ddp, sgd(ddp), loss_fn, process_group=mesh["dp"])
    half = parallelize_module(make(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(ga.UnsupportedError, match="over 2 of 4 processes"):
        ga.TrainStep(half, sgd(half), loss_fn, micro_batch_size=3)
    with pytest.raises(ga.UnsupportedError, match="which holds other parts of the same parameters"):
        ga.TrainStep(half, sgd(half), loss_fn, micro_batch_size=3, process_group=mesh)
    with pytest.raises(ga.WindowError, match="with tensor parallelism"):
        ga.TrainStep(half, sgd(half), loss_fn, process_group=mesh["dp"])


def parts_of_a_group(rank: int) -> None:
    """Data x tensor parallel without FSDP2: parts are added up with the same parts; one norm, one decision to skip."""
    x = rows(13)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    share = x[:4] if mesh["dp"].get_local_rank() == 0 else x[4:]
    alone = make()
    loss_fn(alone, x).backward()
    expected = gradients_of(alone)
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    optimizer = sgd(alone)
    optimizer.step()
    for size in (3, 13):
        model = parallelize_module(make(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=size, process_group=mesh["dp"], clip_norm=0.01)
        step.backward(share)
        assert_same_gradients(whole_gradients(model), expected)
        model.zero_grad()
        update = step(share)
        assert update.samples == 13
        assert abs(update.grad_norm.item() - norm.item()) < 1e-12 * norm.item()
        for parameter, stepped in zip(model.parameters(), alone.parameters(), strict=True):
            whole: Any = parameter
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            torch.testing.assert_close(whole, stepped, rtol=0, atol=1e-12)
    # In one's own loop, with fewer micro-batches on the processes of one share.
    model = parallelize_module(make(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=3, process_group=mesh["dp"], clip_norm=0.01)
    for batch in accumulator.over(share.split(4)):
        accumulator.backward(loss_fn(model, batch))
    assert accumulator.updates == 1
    whole = model[0].weight  # type: ignore[index]
    torch.testing.assert_close(whole.full_tensor(), alone[0].weight, rtol=0, atol=1e-12)


def test_one_norm_under_fsdp2_and_tensor_parallelism() -> None:
    assert results_of(under_fsdp2, 4) == [True] * 4
