"""Lightning's automatic optimisation with one callback more: a short last window and class weights are exact.

+trainer = L.Trainer(accumulate_grad_batches=4, callbacks=[ExactAccumulation()])
"""

import copy
import logging
import tempfile
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

try:
    warnings.simplefilter("ignore")  # Lightning's, about loaders without worker processes
    import lightning as L
except ImportError:
    print("needs lightning: pip install '.[lightning]'")
    raise SystemExit from None

from gradaccum.integrations.lightning import ExactAccumulation

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(0)
x, y = torch.randn(37, 5), torch.randint(0, 3, (37,))
weight = torch.tensor([1.0, 5.0, 0.2])
start = nn.Linear(5, 3)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(start)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def trained(callbacks: list) -> nn.Module:
    module = Module()
    trainer = L.Trainer(
        max_epochs=1, accumulate_grad_batches=4, callbacks=callbacks, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=5))
    return module.net


model = copy.deepcopy(start)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for rows in (slice(0, 20), slice(20, 37)):  # whole batches of 20 and 17
    F.cross_entropy(model(x[rows]), y[rows], weight=weight).backward()
    optimizer.step()
    optimizer.zero_grad()

for name, callbacks in (("stock", []), ("exact", [ExactAccumulation()])):
    print(f"{name}: weights off by {(trained(callbacks).weight - model.weight).norm():.1e}")
torch.testing.assert_close(trained([ExactAccumulation()]).weight, model.weight)
