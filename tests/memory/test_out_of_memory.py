"""Which errors mean that memory ran out, and that what they held is let go of."""

import weakref

import pytest
import torch

from gradaccum.errors import DoesNotFitError
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of

# As torch and its libraries write them.
SAID = {
    "CUDA": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.31 GiB",
    "CUDA call": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other",
    "CUDA driver": "CUDA driver error: out of memory",
    "Triton": "Triton Error [CUDA]: out of memory",
    "HIP": "HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.98 GiB",
    "MPS": "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.11 MB, max allowed: 9.07 GB).",
    "XPU": "XPU out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 15.91 GiB.",
    "CPU": "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
    "CPU, Windows": "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 4000000000000 bytes.",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "C++": "std::bad_alloc",
}

OTHERWISE = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x5)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("the cache is out of memory slots of its own"),
    RuntimeError(
        "view size is not compatible with input tensor's size and stride (at least one dimension spans across "
        "two contiguous subspaces)"
    ),
    RuntimeError(""),
    ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    KeyError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
    KeyboardInterrupt(),
]


OF_THEIR_OWN_KIND = [torch.OutOfMemoryError("?"), MemoryError(), MemoryError("Unable to allocate")]
RAN_OUT = {f"{name}: it did": RuntimeError(text) for name, text in SAID.items()}
RAN_OUT |= {f"{error!r}: it did": error for error in OF_THEIR_OWN_KIND}


@pytest.mark.parametrize("error", [*RAN_OUT.values(), *OTHERWISE], ids=lambda error: f"{error!r:.50}")
def test_whether_memory_ran_out(error: BaseException) -> None:
    assert is_out_of_memory(error) is (error in RAN_OUT.values())


def test_the_text_of_this_torch() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_our_own_verdict_is_a_memory_error() -> None:
    assert issubclass(DoesNotFitError, MemoryError)


class Piece:
    """Stands for a tensor of the failed piece."""


def caught_from(kept: list[weakref.ref[Piece]]) -> BaseException:
    piece = Piece()
    kept.append(weakref.ref(piece))
    try:
        raise MemoryError("in the middle")
    except MemoryError as error:
        return error


@pytest.mark.parametrize("behind_another", ["no", "its cause", "its context"])
def test_an_error_keeps_its_frames_until_it_is_let_go_of(behind_another: str) -> None:
    kept: list[weakref.ref[Piece]] = []

    def wrapped() -> BaseException:
        inner = caught_from(kept)
        if behind_another == "no":
            return inner
        try:
            try:
                raise inner
            except MemoryError as again:
                if behind_another == "its cause":
                    raise RuntimeError("std::bad_alloc") from again
                raise RuntimeError("std::bad_alloc")  # noqa: B904 - that is the case
        except RuntimeError as outer:
            return outer

    error = wrapped()
    assert kept[0]() is not None  # so that the next line shows something
    let_go_of(error)
    assert kept[0]() is None
    assert str(error) == ("in the middle" if behind_another == "no" else "std::bad_alloc")


def test_errors_that_refer_to_each_other_end() -> None:
    one, other = MemoryError("one"), MemoryError("other")
    one.__context__, other.__context__ = other, one
    let_go_of(one)


def test_nothing_to_free_on_the_cpu() -> None:
    free_memory(torch.device("cpu"))
