"""Load-balancing losses of mixtures of experts, over the whole batch.

The auxiliary loss of Switch, Mixtral, Qwen-MoE and others is a product of two means over tokens: with f_e the share of
tokens routed to expert e, P_e the mean probability of it, both over all layers,

    aux = E sum_e f_e P_e            (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6)

A mean of the micro-batches' products is not the product of the batch's means. But f, P and the number of tokens are
sums, and so is the loss over tokens: they are added up over the micro-batches, and the loss of the whole batch is made
of the sums (`TrainStep` with ``combine="sum"``).

Nothing is taken for granted: the model's own ``aux_loss`` has to come out of the formula for every micro-batch, and the
coefficient is the derivative of the loss by it. Where the formula does not give it (another family's balancing loss)
that is an error which names ``router_loss="micro"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.meaning import means_in

_SAME = 1e-4  # fp32 sums over tokens, taken in two orders


class RouterLosses:
    """The statistics of micro-batches, and the loss of a batch from their sums.

    Args:
        model: the plain model.
        loss_of: ``loss_of(inputs, how)``: its loss, router loss included; ``how`` is what `forward` is given.
        over_batch: whether the router loss is taken over the batch; else it is each micro-batch's, weighed as the rest.
    """

    combine = "sum"

    def __init__(self, model: Any, loss_of: Callable[[Any, Any], Any], *, over_batch: bool = True) -> None:
        self._model = model
        self._loss_of = loss_of
        self._over_batch = over_batch
        self._coefficient: float | None = None

    @staticmethod
    def are_in(model: Any) -> bool:
        """Whether the model adds a router loss to its loss."""
        config = getattr(model, "config", None)
        return bool(getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0))

    def forward(self, batch: Any, how: Any) -> dict[str, Tensor]:
        """A micro-batch's sums; ``how`` is for ``loss_of``: a model, or the Trainer's training step."""
        seen: list[Any] = []
        handle = self._model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
        wants_graph = torch.is_grad_enabled()
        try:
            # What the loss is a mean over, and what it takes the router loss times, are read off its graph. Without the
            # graph being wanted it is gone with the sums' detaching, before the next micro-batch.
            with torch.enable_grad():
                loss = self._loss_of(batch, how)
                sums = self._sums(loss, seen, batch)
        finally:
            handle.remove()
        return sums if wants_graph else {name: one.detach() for name, one in sums.items()}

    def batch_loss(self, sums: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The whole batch's loss."""
        if not self._over_batch:
            return sums["total"] / sums["count"]
        tokens = sums["tokens"]
        balance = (sums["chosen"].detach() / tokens * (sums["probability"] / tokens)).sum()
        coefficient = self._coefficient if self._coefficient is not None else self._config("router_aux_loss_coef")
        return sums["total"] / sums["count"] + coefficient * self._config("num_experts") * balance

    def _sums(self, loss: Any, seen: list[Any], inputs: Any) -> dict[str, Tensor]:
        outputs = next((one for one in seen if getattr(one, "aux_loss", None) is not None), None)
        means = means_in(loss) if isinstance(loss, Tensor) else []
        if means and not self._over_batch:
            count = torch.as_tensor(means[0].count, device=loss.device).to(loss.dtype)
            return {"total": torch.where(count == 0, 0.0, loss) * count, "count": count}
        if outputs is None or not getattr(outputs, "router_logits", None) or not means:
            raise LossError(
                f"{type(self._model).__name__} has output_router_logits=True, and its outputs have no router_logits "
                "and aux_loss, or its loss has no mean that can be seen. So the router loss over the batch cannot be "
                "made, and a mean of the micro-batches' is not the batch's. Pass router_loss=\"micro\" to take that."
            )
        aux = outputs.aux_loss
        chosen, probability, tokens = _router_sums(
            outputs.router_logits, inputs.get("attention_mask"), int(self._config("num_experts_per_tok"))
        )
        again = (chosen / tokens * (probability / tokens)).sum() * self._config("num_experts")
        if not torch.allclose(again.detach(), aux.detach().to(again), rtol=_SAME, atol=_SAME):
            raise LossError(
                f"The router loss of {type(self._model).__name__} is {aux.item():.6g} in a micro-batch, and "
                f"{again.item():.6g} by the formula of Switch (experts x share of tokens x mean probability), so the "
                "batch's cannot be made of the micro-batches' sums. Pass router_loss=\"micro\", which weighs the "
                "micro-batches' router losses; that is not the batch's, but near it."
            )
        self._coefficient = float(torch.autograd.grad(loss, aux, retain_graph=True)[0])
        count = torch.as_tensor(means[0].count, device=loss.device).to(loss.dtype)
        return {
            "total": torch.where(count == 0, 0.0, loss - self._coefficient * aux.to(loss)) * count,
            "count": count,
            "chosen": chosen.to(loss.dtype),
            "probability": probability.to(loss.dtype),
            "tokens": tokens.to(loss.dtype),
        }

    def _config(self, name: str) -> float:
        config = self._model.config
        found = getattr(config, name, None)
        if found is None and name == "num_experts":
            found = getattr(config, "num_local_experts", None)
        if found is None:
            raise LossError(
                f"{type(self._model).__name__}'s config has no {name}, so its router loss over the batch cannot be "
                'made. Pass router_loss="micro".'
            )
        return found


def balance_over_batch(model: Any) -> dict[str, Any]:
    """Options of `TrainStep` with which a mixture of experts' load-balancing loss is the whole batch's.

    For models of transformers that add it to their loss (Mixtral, Qwen-MoE, OLMoE and others:
    ``output_router_logits=True`` in their config). A batch is the mapping that the model is called with, labels
    included. Under data parallelism the batch is that of all processes.

        train_step = ga.TrainStep(model, optimizer, **ga.balance_over_batch(model), micro_batch_size=4)

    The model's own ``aux_loss`` is held against the formula of Switch in every micro-batch; memory is that of the sums
    over tokens, and each micro-batch is run forward twice where its graph does not fit.

    Args:
        model: the model itself, or wrapped (``DistributedDataParallel``).

    Returns:
        ``forward``, ``batch_loss`` and ``combine``.

    Raises:
        LossError: the model has no load-balancing loss; in training, it is another one than Switch's.
    """
    plain = getattr(model, "module", model)
    if not RouterLosses.are_in(plain):
        config = getattr(plain, "config", None)
        raise LossError(
            f"{type(plain).__name__} adds no load-balancing loss: output_router_logits="
            f"{getattr(config, 'output_router_logits', None)}, router_aux_loss_coef="
            f"{getattr(config, 'router_aux_loss_coef', None)}. Without one, its loss is a mean over tokens, which "
            "needs no options: ga.TrainStep(model, optimizer, lambda model, batch: ga.weight_of(model(**batch).loss)). "
            "For a model of your own, see examples/18_balance_of_experts.py."
        )
    routers = RouterLosses(plain, lambda batch, model: model(**batch).loss)
    return {
        "forward": lambda model, batch: routers.forward(batch, model),
        "batch_loss": routers.batch_loss,
        "combine": "sum",
    }


def _router_sums(layers: Any, mask: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Over all layers and the tokens that count: choices of each expert, probability of each, and how many tokens."""
    chosen: Any = 0
    probability: Any = 0
    tokens: Any = 0
    for logits in layers:
        weights = torch.softmax(logits.float() if logits.dtype is not torch.float64 else logits, dim=-1)
        best = torch.topk(weights, top_k, dim=-1).indices
        one_hot = torch.zeros_like(weights).scatter_(-1, best, 1.0)
        counts = torch.ones_like(weights[:, 0]) if mask is None else mask.reshape(-1).to(weights)
        chosen = chosen + (one_hot * counts[:, None]).sum(0)
        probability = probability + (weights * counts[:, None]).sum(0)
        tokens = tokens + counts.sum()
    return chosen, probability, tokens
