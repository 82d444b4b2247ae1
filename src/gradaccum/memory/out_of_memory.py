"""Which errors mean that memory ran out, and how to get it back.

Torch raises its own `torch.OutOfMemoryError` on accelerators only. The CPU's allocator, cuBLAS and cuDNN say it in the
text of a RuntimeError, and Python and the C++ library in a MemoryError.
"""

from __future__ import annotations

import gc
import traceback

import torch

# The texts, from c10/core/impl/alloc_cpu.cpp, c10/cuda/CUDAException.cpp, the status names of NVIDIA's libraries,
# Triton and the C++ library.
_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "XPU out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, and nothing else."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def let_go_of(error: BaseException) -> None:
    """Clears the frames of an error that has been handled: their variables keep the tensors of the failed piece alive.

    To be called outside of the ``except`` block: inside, Python itself still holds the error.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None
        current = current.__context__ if current.__cause__ is None else current.__cause__


def free_memory(device: torch.device) -> None:
    """Gives what nothing refers to any more back to the device."""
    gc.collect()  # graphs and hooks refer to each other
    if device.type in ("cuda", "mps", "xpu"):
        torch.get_device_module(device).empty_cache()
