"""The head of a causal language model of Hugging Face in chunks, without a change to its class.

Such a model computes ``logits = self.lm_head(hidden)`` and then ``self.loss_function(logits=logits, labels=labels)``.
For the time of the context the head of this one instance hands on what it gets, wrapped so that nothing but the loss
can use it, and the loss function of this instance runs head and loss in chunks. Where there are no labels, the model
computes its logits as always.

A model that does something to its logits between the two (Gemma 2 bounds them, Cohere scales them) would do it to the
wrapper, which raises an error: nothing has to be known about each model.

Written for transformers 5 (``modeling_utils.py``, ``loss/loss_utils.py``: ``PreTrainedModel.loss_function`` has been an
attribute that can be set since 4.46). Nothing of it is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.chunks.head_criterion import gathered
from gradaccum.chunks.row_chunks import in_chunks
from gradaccum.errors import UnsupportedError
from gradaccum.losses.criterion import Criterion
from gradaccum.types import HALF_DTYPES

_LOSS = "ForCausalLMLoss"


@contextmanager
def chunked_head(model: nn.Module, size: int = 1024) -> Iterator[None]:
    """Runs the head and the loss of a causal language model in chunks of tokens, as `chunked` does.

    Inside of the context ``model(**batch, labels=labels).loss`` is a `Loss` over the labels that count; there are no
    logits, and using what stands in their place raises an error. With ``num_items_in_batch`` it is the tensor that the
    model's own loss would be: the sum divided by that number. Without labels the model does what it always does. Its
    loss is that of ``ForCausalLMLoss``, except that logits of float64 stay so.

    Args:
        model: a causal language model of Hugging Face whose logits go from its last layer straight to its loss (Llama,
            GPT-2, Qwen, Mistral and most others), perhaps within DistributedDataParallel or a PEFT model.
        size: tokens in a chunk.

    Raises:
        UnsupportedError: the model has no such head or loss; when it is called: it changes its logits before the loss.

    Example:
        Inside of a loop over micro-batches::

            with ga.chunked_head(model, size=512):
                update = accumulator.backward(model(**batch).loss)
    """
    inner = _unwrapped(model)
    chunks = _ChunkedHead(inner, *_head_of(inner), size)
    with chunks.installed():
        yield


def _unwrapped(model: Any) -> Any:
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(model: Any) -> tuple[nn.Module, Any]:
    """The last layer, and the loss of the model."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    loss = getattr(model, "loss_function", None)
    name = getattr(loss, "__name__", type(loss).__name__)
    if not isinstance(head, nn.Module) or head not in model.children() or name != _LOSS:
        if not isinstance(head, nn.Module):
            why = "has no output embeddings"
        elif name != _LOSS:
            why = f"has the loss {name}, not {_LOSS}"
        else:
            why = f"keeps its last layer ({type(head).__name__}) inside of another module"
        raise UnsupportedError(
            f"ga.chunked_head got a {type(model).__name__}, which {why}. It knows causal language models of Hugging "
            "Face; with another model its loss would not be the one that is wanted. Write the head into the loss "
            "yourself: ga.criterion(nn.CrossEntropyLoss(), head=model.lm_head)(hidden, labels)."
        )
    return head, loss


class LogitsError(UnsupportedError, AttributeError):
    """Logits were asked for that are never made; an AttributeError, for code that tries what an object can do."""


class _Waiting:
    """What the head would have made logits of."""

    __slots__ = ("hidden", "model")

    def __init__(self, hidden: Tensor, model: str) -> None:
        self.hidden, self.model = hidden, model

    def __getattr__(self, name: str) -> Any:
        raise self._error(f".{name}")

    def _error(self, what: str) -> LogitsError:
        return LogitsError(
            f"The logits of {self.model} were used ({what}) where ga.chunked_head makes none: they exist in chunks, "
            f"inside of the loss. If {self.model} itself does so between its head and its loss, the loss would be "
            "another one: write ga.criterion(nn.CrossEntropyLoss(), head=...)(hidden, labels) with a head that does "
            "the same to its chunk. For logits, call the model without labels."
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise self._error(getattr(func, "__name__", repr(func)))

    def _refuse(self, *_: Any) -> Any:
        raise self._error("arithmetic or indexing")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __getitem__ = __matmul__ = __neg__ = __pow__ = _refuse


class _ChunkedHead:
    """One model's head and loss while they run in chunks.

    Its methods are put on the model, not functions that enclose it: a copy of the model then has a copy of this.
    """

    def __init__(self, model: Any, head: nn.Module, loss: Any, size: int) -> None:
        self._model, self._head, self._loss, self._size = model, head, loss, size
        self._own_forward = vars(head).get("forward")
        self._has_labels = False  # of the call that runs

    @contextmanager
    def installed(self) -> Iterator[None]:
        model, head = self._model, self._head
        before = vars(model).get("_loss_function")
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        head.forward = self._forward_head
        model.loss_function = self._loss_in_chunks
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del head.forward, model._loss_function
            if self._own_forward is not None:
                head.forward = self._own_forward
            if before is not None:
                model.loss_function = before

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(model).forward)
        self._has_labels = signature.bind_partial(model, *args, **kwargs).arguments.get("labels") is not None

    def _end(self, *_: Any) -> None:
        self._has_labels = False

    def _forward_head(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._has_labels:
            return _Waiting(hidden, type(self._model).__name__)
        if self._own_forward is not None:
            return self._own_forward(hidden, *args, **kwargs)
        return type(self._head).forward(self._head, hidden, *args, **kwargs)

    def _loss_in_chunks(
        self,
        logits: Any,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Takes what ``ForCausalLMLoss`` takes."""
        if not isinstance(logits, _Waiting):  # the model's forward was called past its hooks
            return self._loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        criterion = Criterion(nn.CrossEntropyLoss(ignore_index=ignore_index))
        self._has_labels = False  # from here on the head makes logits
        with gathered(self._head) as head:
            loss = in_chunks(
                lambda rows, of_rows: criterion(_wide(head(rows)), of_rows),
                logits.hidden,
                (shift_labels.to(logits.hidden.device),),
                size=self._size,
                ignored=(0, ignore_index),
            )
        return loss if num_items_in_batch is None else loss.total / num_items_in_batch


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in HALF_DTYPES else logits
