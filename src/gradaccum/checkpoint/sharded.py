"""Checkpoints of FSDP2 models by ``torch.distributed.checkpoint``: each rank writes and reads its own shards.

Any number of ranks can read them. The folder of the shards is renamed, and its checksum made, when all are written.

Torch reads its index (``.metadata``) by ``pickle`` and what is no tensor by ``torch.load(weights_only=False)``, either
of which runs code that a file holds (pytorch issue 189308). Here the index is built from its own classes alone, and
everything else read as data.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gradaccum.checkpoint.plain_data import as_plain_data
from gradaccum.checkpoint.together import Together
from gradaccum.errors import StateError

_INDEX = ".metadata"
_OF_THE_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(dtype).split(".")[1] for dtype in vars(torch).values() if isinstance(dtype, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "builtins": {"set", "dict", "list", "tuple"},
}


def save(partial: Path, sharded: Mapping[str, Any], together: Together) -> None:
    """Writes shards into the folder ``partial``. Every rank has to call it.

    What may fail on one rank alone is a step of its own, before torch's collectives, in which the others would wait.

    Args:
        partial: a folder that is there.
        sharded: one model and the optimizers of its parameters.
        together: the processes.

    Raises:
        StateError: there is another number of models, or what could not be loaded again; or it failed on some rank.
    """
    state: dict[str, Any] = {}

    def collect() -> None:
        model_state, optimizer_state = get_state_dict(*_split(sharded))
        state.update(model=model_state, optimizer=_with_numbers(optimizer_state, "optimizer"))

    together.everywhere(collect, doing="Saving")
    together.everywhere(lambda: dcp.save(state, checkpoint_id=partial), doing="Saving")


def load(path: Path, sharded: Mapping[str, Any], together: Together) -> None:
    """Loads what `save` has written, on any number of ranks. Every rank has to call it; see there."""
    doing = f"Loading {path}"
    state: dict[str, Any] = {}

    def collect() -> None:
        state.update(zip(("model", "optimizer"), get_state_dict(*_split(sharded)), strict=True))

    def put() -> None:
        set_state_dict(*_split(sharded), model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    together.everywhere(collect, doing=doing)
    together.everywhere(lambda: dcp.load(state, storage_reader=_Reader(path), planner=_Planner()), doing=doing)
    together.everywhere(put, doing=doing)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _OF_THE_INDEX.get(module, ()):
            return super().find_class(module, name)
        raise StateError(
            f"The index of a sharded checkpoint asks for {module}.{name}, which is no part of one. Nothing of it was "
            "run or loaded. It was not written by Checkpoint.save()."
        )


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _INDEX).open("rb") as file:
            index: Metadata = _IndexUnpickler(file).load()
        if index.storage_meta is not None:
            index.storage_meta.load_id = self.load_id
        return index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        data = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(data, again)  # torch's own planner reads it once more, and puts it where it belongs
        again.seek(0)
        super().load_bytes(read_item, again)


def _with_numbers(value: Any, where: str) -> Any:
    """The same state with Python's numbers in the place of numpy's, all of it loadable."""
    if type(value) is dict:
        return {key: _with_numbers(one, f"{where}[{key!r}]") for key, one in value.items()}
    if type(value) is list:
        return [_with_numbers(one, f"{where}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, torch.Tensor):  # a DTensor, whose local part is written
        return value
    plain = as_plain_data(value, where)
    if isinstance(plain, dict):
        raise StateError(
            f"The state of {where} is a {type(value).__name__}, which a checkpoint of shards cannot hold. Nothing was "
            "saved. Let it be a number, a string, a tensor, or a list or dict of these."
        )
    return plain


def _split(sharded: Mapping[str, Any]) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    models = [value for value in sharded.values() if isinstance(value, nn.Module)]
    if len(models) != 1:
        raise StateError(
            f"{len(models)} sharded models in one checkpoint: torch.distributed.checkpoint names parameters within one "
            "model. Pass one model, with its optimizers, to each Checkpoint."
        )
    return models[0], [value for value in sharded.values() if isinstance(value, torch.optim.Optimizer)]
