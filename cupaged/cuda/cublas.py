"""cuBLAS called past CuPy, which refuses to multiply on a stream that is being captured; cuBLAS itself does not."""

from __future__ import annotations

import ctypes
import functools
from types import ModuleType
from typing import Any

from cupaged.cuda import jit
from cupaged.errors import DeviceError, OutOfMemory

_WORKSPACE_BYTES = 32 << 20  # what the manual of cublasSetWorkspace advises for compute capability 9.0; it is less for others
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_MATRIX = (_POINTER, _INT, _INT)  # address, type, leading dimension
_GEMM_EX = (_POINTER, *(_INT,) * 5, _POINTER, *_MATRIX, *_MATRIX, _POINTER, *_MATRIX, _INT, _INT)


@functools.cache
def module() -> ModuleType:
    """CuPy's face of cuBLAS; DeviceError where that is not installed."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        raise DeviceError(f"cuBLAS, which multiplies the matrices, is not installed; {jit.install_command()}") from error
    return cublas


def gemm_ex(handle: int, *arguments: int) -> None:
    """Queue `cublas.gemmEx` of CuPy, same arguments, on the current stream, in a capture too; CUBLASError as there.

    In a graph cuBLAS must not allocate, and every graph may be replayed for as long as it likes: so all products of a device
    have one workspace, which stays. Use one stream at a time.
    """
    library, cuda = _library(), jit.import_cupy().cuda
    if library is None:
        module().gemmEx(handle, *arguments)
        return
    workspace = _workspace(cuda.runtime.getDevice())
    status = library.cublasSetStream_v2(handle, cuda.get_current_stream().ptr)  # takes the workspace away, says its manual
    status = status or library.cublasSetWorkspace_v2(handle, workspace.ptr, _WORKSPACE_BYTES)
    status = status or library.cublasGemmEx(handle, *arguments)
    if status:
        raise module().CUBLASError(status)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The very library that CuPy has loaded: its names are found through CuPy's module, which is linked to it."""
    try:
        library = ctypes.CDLL(module().__file__)
        library.cublasSetStream_v2.argtypes = (_POINTER, _POINTER)
        library.cublasSetWorkspace_v2.argtypes = (_POINTER, _POINTER, ctypes.c_size_t)
        library.cublasGemmEx.argtypes = _GEMM_EX
    except (OSError, AttributeError):  # linked in another way
        return None
    return library


@functools.cache
def _workspace(device: int) -> Any:
    """Memory of the device, a multiple of 256 bytes from where it begins, as cuBLAS wants it."""
    try:
        return jit.import_cupy().cuda.alloc(_WORKSPACE_BYTES)
    except MemoryError as error:
        cause = f"the GPU has no room for the {_WORKSPACE_BYTES / 1e6:.1f} MB that cuBLAS works in"
        raise OutOfMemory(f"{cause}; lower kv_memory or max_model_len, or take a smaller model") from error
