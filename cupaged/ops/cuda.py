"""The operations of `ops.numpy`, same names and contracts, on the current CUDA device.

Weights and activations are bfloat16 or float16, arithmetic is float32; logits and what sampling takes are float32. The
kernels are those of cuda_src; matrix products are cuBLAS's. Everything is queued on the current stream and only `download`
waits for it. Arrays are CuPy's, C-contiguous.
"""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged.cuda import jit
from cupaged.errors import DeviceError, InvalidArgument, OutOfMemory

try:
    cupy = jit.import_cupy()
except DeviceError:  # `jit.check_device` is what tells the user; the emulator puts a stand-in here
    cupy = None

Array = Any  # cupy.ndarray

DTYPES = ("bfloat16", "float16")
_DTYPE_DEFINES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}}
_SLICE_BYTES = 16 << 20  # of an upload that are converted at once
_MAX_HEADS = 8  # query heads of a group that one CTA attends for
_MAX_GRID = 2**31 - 1
_SOURCES = {
    "embedding": "embedding.cu",
    "rms_norm": "rms_norm.cu",
    "add": "elementwise.cu",
    "swiglu": "elementwise.cu",
    "add_bias": "elementwise.cu",
    "add_bias_float32": "elementwise.cu",
    "rope_append": "rope_append.cu",
    "paged_attention": "paged_attention.cu",
    "penalise": "sampling.cu",
    "forbid": "sampling.cu",
    "sample": "sampling.cu",
}
_FOR_ALL_DTYPES = ("embedding", "penalise", "forbid", "sample")


def variants() -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) of every kernel that these operations can ask for."""
    found = []
    for name, source in _SOURCES.items():
        shapes: list[dict[str, int]] = [{}]
        if name == "paged_attention":
            shapes = [{"HEAD_DIM": d, "HEADS": h} for d in (64, 128) for h in range(1, _MAX_HEADS + 1)]
        dtypes = [{}] if name in _FOR_ALL_DTYPES else _DTYPE_DEFINES.values()
        found += [(source, name, {**dtype, **shape}) for dtype in dtypes for shape in shapes]
    return found


def shared_bytes(name: str, HEAD_DIM: int = 0, HEADS: int = 0, **_: int) -> int:
    """Dynamic shared memory of a kernel: the size of its `struct Shared`."""
    if name == "rms_norm":
        return 4 * 32
    if name == "sample":
        return 2 * 4 * 2048 + 8 * (64 + 32 + 2)
    if name == "paged_attention":
        lanes = HEAD_DIM // 32
        warp_positions = 32 // lanes
        tile = 4 * warp_positions
        return 2 * 2 * tile * (HEAD_DIM + 8 * lanes + HEAD_DIM) + 4 * HEADS * (HEAD_DIM + tile)
    return 0


def _launch(name: str, grid: tuple[int, ...], threads: int, args: tuple, dtype: np.dtype | None = None, **shape: int) -> None:
    """Queue a kernel, unless its grid is empty; `dtype` chooses the variant of those that have one."""
    if 0 in grid:
        return
    for arg in args:
        if not isinstance(arg, np.generic) and not arg.flags.c_contiguous:
            raise ValueError(f"{name} takes C-contiguous arrays")
    if dtype is not None:
        if dtype.name not in DTYPES:
            raise InvalidArgument(f"{name} was given {dtype.name} arrays; the CUDA kernels take {' and '.join(DTYPES)}")
        shape = {**_DTYPE_DEFINES[dtype.name], **shape}
    launch = jit.kernel(_SOURCES[name], name, **shape)
    launch(grid, (threads, 1, 1), args, shared_mem=shared_bytes(name, **shape))


def _threads(items: int, most: int) -> int:
    """Whole warps, one thread for each of `items`, but `most` at most."""
    return min(most, max(32, -(-items // 32) * 32))


def device(index: int = 0) -> contextlib.AbstractContextManager:
    """Context in which the operations run on GPU `index`."""
    return cupy.cuda.Device(index)


def free_memory() -> tuple[int, int]:
    """(free, total) bytes of the current device; free counts what CuPy's pool holds and does not use."""
    free, total = cupy.cuda.runtime.memGetInfo()
    return free + cupy.get_default_memory_pool().free_bytes(), total


def _no_room(size: int) -> OutOfMemory:
    remedy = "lower kv_memory or max_model_len, or take a smaller model"
    return OutOfMemory(f"the GPU has no room for another {size / 1e6:.1f} MB; {remedy}")


def empty(shape: tuple[int, ...], dtype: str | np.dtype) -> Array:
    """An uninitialised device array; OutOfMemory where it does not fit."""
    try:
        return cupy.empty(shape, dtype)
    except MemoryError as error:
        raise _no_room(math.prod(shape) * np.dtype(dtype).itemsize) from error


def upload(array: np.ndarray, dtype: str | None = None) -> Array:
    """The host array as a device array, converted to `dtype` if one is given.

    Conversion and staging take a slice of 16 MiB at a time, so that the host holds little beside the array itself.
    """
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    step = _SLICE_BYTES // dtype.itemsize
    try:
        if array.size <= step:
            return cupy.asarray(np.ascontiguousarray(array, dtype))
        out = cupy.empty(array.shape, dtype)
        source, target = np.ascontiguousarray(array).reshape(-1), out.reshape(-1)
        for start in range(0, source.size, step):
            target[start : start + step] = cupy.asarray(source[start : start + step].astype(dtype, copy=False))
        return out
    except MemoryError as error:
        raise _no_room(array.size * dtype.itemsize) from error


def download(array: Array) -> np.ndarray:
    """The device array as a host array (waits for the device)."""
    return cupy.asnumpy(array)


def embedding(token_ids: Array, table: Array) -> Array:
    """Rows of `table` [num_rows, width] by id [T] -> [T, width]; also used to pick the rows whose logits are wanted."""
    width = table.shape[1]
    row_bytes = width * table.dtype.itemsize
    out = empty((token_ids.size, width), table.dtype)
    args = (_device_array(token_ids, np.int32), table, out, np.int64(row_bytes))
    if row_bytes:
        _launch("embedding", (token_ids.size,), _threads(row_bytes // 16, 128), args)
    return out


def add(x: Array, y: Array) -> Array:
    """x + y of equal shapes."""
    return _elementwise("add", x, y)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up of equal shapes."""
    return _elementwise("swiglu", gate, up)


def _elementwise(name: str, x: Array, y: Array) -> Array:
    out = empty(x.shape, x.dtype)
    blocks = min(-(-x.size // (256 * 8)), _MAX_GRID)
    _launch(name, (blocks,), 256, (x, y, out, np.int64(x.size)), x.dtype)
    return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; any leading axes."""
    width = x.shape[-1]
    out = empty(x.shape, x.dtype)
    if x.size:
        threads = _threads(-(-width // 8), 256)
        _launch("rms_norm", (x.size // width,), threads, (x, weight, out, np.int32(width), np.float32(eps)), x.dtype)
    return out


def linear(x: Array, weight: Array, bias: Array | None = None, dtype: str | None = None) -> Array:
    """x [T, in] times weight [out, in] transposed, plus bias [out] -> [T, out], in `dtype`: that of x or "float32"."""
    num_rows, width = x.shape[0], weight.shape[0]
    out = empty((num_rows, width), x.dtype if dtype is None else dtype)
    if out.size:
        _gemm(x, weight, out)
        if bias is not None:
            name = "add_bias_float32" if out.dtype == np.float32 else "add_bias"
            _launch(name, (num_rows,), _threads(width, 256), (out, bias, np.int32(width)), x.dtype)
    return out


_ALPHA_BETA = np.array([1, 0], np.float32)  # where cuBLAS reads them
_ONE_ADDRESS, _ZERO_ADDRESS = _ALPHA_BETA.ctypes.data, _ALPHA_BETA.ctypes.data + 4
_NO_REDUCED_PRECISION_REDUCTION = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION


@functools.cache
def _cublas() -> tuple[ModuleType, dict[str, int]]:
    """CuPy's face of cuBLAS, and what cuBLAS calls the types."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        raise DeviceError(f"cuBLAS, which multiplies the matrices, is not installed; {jit.install_command()}") from error
    runtime = cupy.cuda.runtime
    return cublas, {"bfloat16": runtime.CUDA_R_16BF, "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F}


def _gemm(x: Array, weight: Array, out: Array) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T on cuBLAS, accumulated in float32.

    cuBLAS is column-major: the same memory is out^T [N, T] = (weight^T [K, N])^T @ x^T [K, T], leading dimensions N, K and K.
    """
    cublas, types = _cublas()
    (rows, inner), columns = x.shape, weight.shape[0]
    try:
        handle = cupy.cuda.device.get_cublas_handle()
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)  # where alpha and beta are
        cublas.setMathMode(handle, _NO_REDUCED_PRECISION_REDUCTION)
        cublas.gemmEx(  # sets the current stream itself
            handle,
            cublas.CUBLAS_OP_T,
            cublas.CUBLAS_OP_N,
            columns,
            rows,
            inner,
            _ONE_ADDRESS,
            weight.data.ptr,
            types[weight.dtype.name],
            inner,
            x.data.ptr,
            types[x.dtype.name],
            inner,
            _ZERO_ADDRESS,
            out.data.ptr,
            types[out.dtype.name],
            columns,
            cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )
    except cublas.CUBLASError as error:
        raise DeviceError(f"cuBLAS failed ({error}); if GPU memory is short, lower gpu_memory_utilization") from error


def rope_append(
    q: Array,
    k: Array,
    v: Array,
    rope_table: Array,
    k_pool: Array,
    v_pool: Array,
    q_indptr: Array,
    seq_lens: Array,
    page_indptr: Array,
    page_indices: Array,
) -> Array:
    """Rotate q and k by their positions, append k and v to the pool, return the rotated q.

    q [T, num_heads, head_dim]; k, v [T, num_kv_heads, head_dim]; rope_table [max_positions, head_dim] float32; pools
    [num_kv_heads, num_blocks, block_size, head_dim]; head_dim a multiple of 16, block_size a power of two.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_blocks, block_size, _ = k_pool.shape
    out = empty(q.shape, q.dtype)
    index = [_device_array(a, np.int32) for a in (q_indptr, seq_lens, page_indptr, page_indices)]
    sizes = (seq_lens.size, num_heads, num_kv_heads, head_dim, num_blocks, _shift(block_size))
    args = (q, k, v, rope_table, out, k_pool, v_pool, *index, *map(np.int32, sizes))
    _launch("rope_append", (num_rows,), 128, args, q.dtype)
    return out


def paged_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    q_indptr: Array,
    seq_lens: Array,
    page_indptr: Array,
    page_indices: Array,
    scale: float,
    sliding_window: int | None = None,
) -> Array:
    """Causal attention of every row over its own sequence, K and V read through the page table.

    q [T, num_heads, head_dim] -> out of the same shape; pools [num_kv_heads, num_blocks, block_size, head_dim]; head_dim 64 or
    128, block_size a power of two. A row with nothing to attend to gives 0.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_blocks, block_size, _ = k_pool.shape
    if head_dim not in (64, 128):
        raise InvalidArgument(f"head_dim is {head_dim}; the CUDA kernels know 64 and 128")
    group_size = num_heads // num_kv_heads
    tiles = -(-group_size // _MAX_HEADS)
    heads = -(-group_size // tiles)
    out = empty(q.shape, q.dtype)
    index = [_device_array(a, np.int32) for a in (q_indptr, seq_lens, page_indptr, page_indices)]
    window = 2**30 if sliding_window is None else min(sliding_window, 2**30)  # position - window must not overflow
    sizes = (seq_lens.size, group_size, num_blocks, _shift(block_size), window)
    args = (q, k_pool, v_pool, out, *index, *map(np.int32, sizes), np.float32(scale))
    _launch("paged_attention", (num_rows, num_kv_heads, tiles), 128, args, q.dtype, HEAD_DIM=head_dim, HEADS=heads)
    return out


def penalise(
    logits: Array,
    seen_indptr: Array,
    seen_ids: Array,
    seen_counts: Array,
    repetition_penalty: Array,
    presence_penalty: Array,
    frequency_penalty: Array,
) -> None:
    """Lower the logits [B, vocab] float32 of tokens that have occurred, in place."""
    num_rows, vocab = logits.shape
    seen = [_device_array(a, np.int32) for a in (seen_indptr, seen_ids, seen_counts)]
    penalties = [_device_array(a, np.float32) for a in (repetition_penalty, presence_penalty, frequency_penalty)]
    _launch("penalise", (num_rows,), 128, (logits, *seen, *penalties, np.int32(vocab)))


def forbid(logits: Array, indptr: Array, token_ids: Array) -> None:
    """Set logits[b, t] to -inf for the tokens t of token_ids[indptr[b] : indptr[b+1]], in place."""
    num_rows, vocab = logits.shape
    args = (logits, _device_array(indptr, np.int32), _device_array(token_ids, np.int32), np.int32(vocab))
    _launch("forbid", (num_rows,), 128, args)


def sample(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seed: Array,
    candidate: Array,
    position: Array,
) -> Array:
    """One token id per row of float32 logits [B, vocab] -> int32 [B], as `ops.numpy` says."""
    num_rows, vocab = logits.shape
    out = empty((num_rows,), "int32")
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int32, np.int32)
    columns = (temperature, top_k, top_p, min_p, seed, candidate, position)
    args = [_device_array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    _launch("sample", (num_rows,), _threads(-(-vocab // 4), 1024), (logits, *args, out, np.int32(vocab)))
    return out


def _device_array(array: Array, dtype: type) -> Array:
    """A small argument as a device array of `dtype`: as it is, or uploaded from the host."""
    if isinstance(array, np.ndarray) or array.dtype != dtype:
        return cupy.asarray(array, dtype)
    return array


def _shift(block_size: int) -> int:
    """log2 of a block size."""
    if block_size < 1 or block_size & (block_size - 1):
        raise InvalidArgument(f"block_size is {block_size}; give a power of two from 1 to 256")
    return block_size.bit_length() - 1
