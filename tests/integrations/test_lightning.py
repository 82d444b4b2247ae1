"""Lightning's automatic optimisation as it is and with the callback, side by side."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

with warnings.catch_warnings():  # lightning itself, while it is imported
    warnings.simplefilter("ignore")
    L = pytest.importorskip("lightning")

from gradaccum.integrations.lightning import ExactAccumulation, exact
from ranks import results_of

ROWS, STEPS, PER_BATCH = 37, 4, 5
EXACT, WRONG = 1e-12, 0.01

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own, about loaders and loggers


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 7, 5, generator=generator).double()
    labels = torch.randint(0, 3, (rows, 7), generator=generator)
    return x, labels.where(torch.arange(7) < torch.randint(1, 8, (rows, 1), generator=generator), -100)


class Module(L.LightningModule):
    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.returns = returns
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        if self.returns == "none" and batch_idx == 1:
            return None
        loss, count = self.loss_of(x, labels), (labels != -100).sum()
        return {
            "tensor": loss,
            "none": loss,
            "loss": ga.Loss.mean(loss, over=count),
            "dict": {"loss": loss, "weight": count},
        }[self.returns]

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        weight = torch.tensor([1.0, 5.0, 0.2]).double() if self.returns in ("tensor", "none") else None
        return F.cross_entropy(self.net(x).flatten(0, 1), labels.flatten(), weight=weight)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in self.net.named_parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module: Any, folder: Path, *, callbacks: Any = (), rows: int = ROWS, wrap: Any = None, **options: Any) -> Any:
    trainer = L.Trainer(
        max_epochs=1, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, **{"devices": 1, "accumulate_grad_batches": STEPS, **options},
    )  # fmt: skip
    if wrap is not None:
        wrap(trainer)
    trainer.fit(module, DataLoader(TensorDataset(*data(rows)), batch_size=PER_BATCH))
    return trainer


def whole(module: Any, rows: list[int]) -> dict[str, Tensor]:
    module = copy.deepcopy(module)
    x, labels = data()
    module.net.zero_grad()
    module.loss_of(x[rows], labels[rows]).backward()
    return {name: p.grad.clone() for name, p in module.net.named_parameters()}


def far(made: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    scale = max(float(one.abs().max()) for one in expected.values())
    return max(float((made[name] - one).abs().max()) for name, one in expected.items()) / scale


WINDOWS = [list(range(20)), list(range(20, ROWS))]


@pytest.mark.parametrize("returns", ["tensor", "loss", "dict"])
def test_short_windows_tokens_and_class_weights(returns: str, tmp_path: Path) -> None:
    module, callback = Module(returns), ExactAccumulation()
    trainer = fit(module, tmp_path, callbacks=[callback])
    expected = [whole(module, rows) for rows in WINDOWS]
    assert [far(made, right) < EXACT for made, right in zip(module.seen, expected, strict=True)] == [True, True]
    assert trainer.global_step == 2
    assert "training_step" not in module.__dict__
    stock = Module("tensor")
    fit(stock, tmp_path)
    assert min(far(made, whole(stock, rows)) for made, rows in zip(stock.seen, WINDOWS, strict=True)) > WRONG


def test_none_from_training_step_and_a_trainer_that_is_there(tmp_path: Path) -> None:
    module = Module("none")
    fit(module, tmp_path, wrap=exact)
    rows = [row for row in WINDOWS[0] if not 5 <= row < 10]
    assert far(module.seen[0], whole(module, rows)) < EXACT


def test_clipping_sees_the_right_gradient_and_the_loss_is_logged(tmp_path: Path) -> None:
    module = Module()
    callback = ExactAccumulation(log="window_loss")
    trainer = fit(module, tmp_path, callbacks=[callback], gradient_clip_val=1e-3)
    assert far(module.seen[1], whole(module, WINDOWS[1])) < EXACT  # others see it before it is clipped
    x, labels = data()
    right = module.loss_of(x[WINDOWS[1]], labels[WINDOWS[1]]).item()
    assert callback.loss is not None
    assert callback.loss.item() == pytest.approx(right, rel=1e-6)
    assert trainer.callback_metrics["window_loss"].item() == pytest.approx(right, rel=1e-6)


def test_a_schedule_of_windows(tmp_path: Path) -> None:
    module = Module()
    schedule = L.pytorch.callbacks.GradientAccumulationScheduler({0: 3})
    trainer = L.Trainer(
        max_epochs=1, callbacks=[schedule, ExactAccumulation()], accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=PER_BATCH))
    windows = [list(range(15)), list(range(15, 30)), list(range(30, ROWS))]
    assert max(far(made, whole(module, rows)) for made, rows in zip(module.seen, windows, strict=True)) < EXACT


def test_a_count_of_ones_own_and_a_loss_that_says_nothing(tmp_path: Path) -> None:
    class Opaque(Module):
        def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
            return torch.linalg.vector_norm(self.net(x), dim=-1).mean(1) @ torch.ones(len(x)).double() / len(x)

    module = Opaque()
    fit(module, tmp_path, callbacks=[ExactAccumulation(weight=lambda batch: len(batch[0]))])
    assert max(far(made, whole(module, rows)) for made, rows in zip(module.seen, WINDOWS, strict=True)) < EXACT


def test_what_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ga.UnsupportedError, match=r"optimises manually.* ga.Accumulator"):
        fit(module, tmp_path, callbacks=[ExactAccumulation()], accumulate_grad_batches=1)

    class Closures(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ga.UnsupportedError, match="LBFGS evaluates the loss several times"):
        fit(Closures(), tmp_path, callbacks=[ExactAccumulation()])


def test_manual_optimisation_with_the_accumulator(tmp_path: Path) -> None:
    """The pattern of the docs."""

    class Manual(Module):
        def __init__(self) -> None:
            super().__init__("loss")
            self.automatic_optimization = False

        def on_train_start(self) -> None:
            self.accumulator = ga.Accumulator(self.net, self.optimizers().optimizer, micro_batches=STEPS)
            self.optimizers().optimizer.register_step_pre_hook(lambda *_: self.on_before_optimizer_step(None))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            update = self.accumulator.backward(super().training_step(batch, batch_idx))
            if update is None and self.trainer.is_last_batch:
                self.accumulator.flush()

    module = Manual()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=PER_BATCH))
    assert max(far(made, whole(module, rows)) for made, rows in zip(module.seen, WINDOWS, strict=True)) < EXACT


def test_fabric_in_mixed_precision(tmp_path: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    torch.manual_seed(0)
    net = nn.Linear(5, 1)
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.0))
    x = torch.randn(13, 5)
    accumulator = ga.Accumulator(net, optimizer.optimizer, micro_batches=4, backward=fabric.backward)
    seen: list[Tensor] = []
    optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(net.module.weight.grad.clone()))
    for xs in accumulator.over(x.split([3, 1, 5, 4])):
        accumulator.backward(ga.Loss.mean(net(xs).float().mean(), over=len(xs)))
    torch.testing.assert_close(seen[0], x.mean(0, keepdim=True), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_inside_a_window(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    first = ExactAccumulation()
    module = Module()
    fit(module, tmp_path, callbacks=[Saves(), first])
    state = torch.load(tmp_path / "inside.ckpt", weights_only=False)["callbacks"][first.state_key]
    (window,) = state["windows"]
    assert len(window["sizes"]) == 2

    class Resumed(ExactAccumulation):  # type: ignore[misc,valid-type]
        """Goes on with the micro-batches after those of the checkpoint."""

    again, callback = Module(), Resumed()
    callback.load_state_dict(state)
    trainer = L.Trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=[callback], accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2,
        default_root_dir=tmp_path,
    )  # fmt: skip
    x, labels = data()
    order: list[Any] = []
    zero_grad = again.optimizer_zero_grad
    again.optimizer_zero_grad = lambda *args: order.append(args) or (zero_grad(*args) if len(order) > 1 else None)
    trainer.fit(again, DataLoader(TensorDataset(x[10:20], labels[10:20]), batch_size=PER_BATCH))
    for name, one in module.seen[0].items():
        assert torch.equal(again.seen[0][name], one)


# ------------------------------------------------------------------------------------------------------- two processes
class Share(torch.utils.data.Sampler[list[int]]):
    """Uneven shares of two windows of three and two micro-batches."""

    SHARES = ([[0, 1, 2], [3], [4, 5], [12, 13]], [[6, 7, 8, 9, 10], [11], [14], [15, 16, 17]])

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter(self.SHARES[self.rank])

    def __len__(self) -> int:
        return len(self.SHARES[self.rank])


def on_a_rank(rank: int, world_size: int, folder: str) -> Any:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29573", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size)}
    warnings.simplefilter("ignore")
    found = {}
    for kind in ("stock", "exact"):
        module = Module()
        trainer = L.Trainer(
            max_epochs=1, accumulate_grad_batches=3, callbacks=[ExactAccumulation()] if kind == "exact" else [],
            accelerator="cpu", devices=world_size, strategy="ddp", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_sampler=Share(rank)))
        found[kind] = module.seen
    return found


def test_two_processes(tmp_path: Path) -> None:
    for found in results_of(on_a_rank, 2, str(tmp_path), seconds=250):
        for window, last in ((0, 3), (1, 4)):
            rows = [row for share in Share.SHARES for some in share[3 * window : last] for row in some]
            expected = whole(Module(), rows)
            assert far(found["exact"][window], expected) < EXACT
            assert far(found["stock"][window], expected) > WRONG
