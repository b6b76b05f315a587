"""The operations of `ops.numpy`, same names and contracts, on the current CUDA device.

Weights and activations are bfloat16 or float16, arithmetic is float32; logits and what sampling takes are float32. The
kernels are those of cuda_src; matrix products are cuBLAS's. Everything is queued on the current stream, and only `download`
and what brings large host arrays (`upload`, `write`) wait for it. Arrays are CuPy's, C-contiguous.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged import attention
from cupaged.cuda import cublas as blas
from cupaged.cuda import jit
from cupaged.errors import DeviceError, InvalidArgument, OutOfMemory
from cupaged.ops import staging
from cupaged.ops.quantized import KINDS, QuantizedMatrix, group_of

try:
    cupy = jit.import_cupy()
except DeviceError:  # `jit.check_device` is what tells the user; the emulator puts a stand-in here
    cupy = None

Array = Any  # cupy.ndarray

DTYPES = ("bfloat16", "float16")
KV_DTYPES = ("fp8", "int8")  # of a pool, beside that of the activations
DTYPE_DEFINES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}}
_CODE_DEFINES = {"uint8": {"KV_FP8": 1}, "int8": {"KV_INT8": 1}}  # by the dtype of a pool that holds codes
_QK_NORM = {"QK_NORM": 1}
_WEIGHT_DEFINES = {kind: {f"WEIGHT_{kind.upper()}": 1} for kind in KINDS}  # of `quantize` and `dequantize`
_SCALE_ROWS = 128  # the rows of a matrix of int4 are as many as a multiple of it where its scales are, 8 of them side by side
_SCRATCH_BYTES = 64 << 20  # of a quantised matrix that are dequantised at once
_MAX_GRID = 2**31 - 1
_SOURCES = {
    "embedding": "embedding.cu",
    "rms_norm": "rms_norm.cu",
    "swiglu": "elementwise.cu",
    "add_bias": "elementwise.cu",
    "add_bias_float32": "elementwise.cu",
    "quantize": "quantize.cu",
    "dequantize": "quantize.cu",
    "rope_append": "rope_append.cu",
    "copy_blocks": "copy_blocks.cu",
    "penalise": "sampling.cu",
    "bias": "sampling.cu",
    "sample": "sampling.cu",
    "largest": "logprobs.cu",
    "ranks": "logprobs.cu",
    "logprobs": "logprobs.cu",
}
_FOR_ALL_DTYPES = ("embedding", "copy_blocks", "penalise", "bias", "sample", "largest", "ranks", "logprobs")
_SELDOM = (  # asked for by some models, some requests
    *("quantize", "dequantize", "add_bias", "add_bias_float32", "copy_blocks", "penalise", "bias"),
    *("largest", "ranks", "logprobs"),
)


def variants() -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) of every kernel that these operations can ask for."""
    found = []
    for name, source in _SOURCES.items():
        shapes: list[dict[str, int]] = [{}]
        if name == "rope_append":
            shapes = [{**codes, **norm} for codes in ({}, *_CODE_DEFINES.values()) for norm in ({}, _QK_NORM)]
        elif name in ("quantize", "dequantize"):
            shapes = list(_WEIGHT_DEFINES.values())
        dtypes = [{}] if name in _FOR_ALL_DTYPES else DTYPE_DEFINES.values()
        found += [(source, name, {**dtype, **shape}) for dtype in dtypes for shape in shapes]
    return found


def variants_of_weights(kinds: Iterable[str | None], dtype: str) -> list[jit.Variant]:
    """The kernels for matrices of kinds that `quantize` knows, beside activations of a type: for `compiling`."""
    defines = [{**DTYPE_DEFINES[dtype], **_WEIGHT_DEFINES[kind]} for kind in kinds if kind is not None]
    return [(_SOURCES[name], name, each) for each in defines for name in ("quantize", "dequantize")]


def compiling(
    dtype: str, kv_dtype: str, head_dim: int, block_size: int, qk_norm: bool, also: Sequence[jit.Variant] = ()
) -> contextlib.AbstractContextManager:
    """Context beside whose body the kernels of a model are compiled, where that was not done before; they are ready at its end.

    The types are of activations and of the arrays of the KV pool; with qk_norm `rope_append` is given gains. For the current
    device, and with them the kernels `also`. InvalidArgument for other head_dims than 64 and 128.
    """
    if head_dim not in (64, 128):
        raise InvalidArgument(f"the model's head_dim is {head_dim} and the CUDA kernels know 64 and 128; use device 'cpu'")
    found = attention.kernel.variants_of_device(dtype, head_dim, kv_dtype, block_size)
    for name, source in _SOURCES.items():
        if name not in _SELDOM:
            defines = {} if name in _FOR_ALL_DTYPES else DTYPE_DEFINES[dtype]
            shape = _rope_append_defines(kv_dtype, qk_norm) if name == "rope_append" else {}
            found.append((source, name, {**defines, **shape}))
    return jit.compiling([*found, *also])


def _rope_append_defines(kv_dtype: str, qk_norm: bool) -> dict[str, int]:
    return _CODE_DEFINES.get(kv_dtype, {}) | (_QK_NORM if qk_norm else {})


def shared_bytes(name: str) -> int:
    """Dynamic shared memory of a kernel: the size of its `struct Shared`."""
    sizes = {
        "rms_norm": 4 * 32,
        "quantize": 4 * 32,
        "sample": 2 * 4 * 2048 + 8 * (64 + 32 + 2),
        "largest": 8 * 32,
        "ranks": 4 * 32,
        "logprobs": 4 * 32,
    }
    return sizes.get(name, 0)


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
        shape = {**DTYPE_DEFINES[dtype.name], **shape}
    launch = jit.kernel(_SOURCES[name], name, **shape)
    launch(grid, (threads, 1, 1), args, shared_mem=shared_bytes(name))


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


def check() -> None:
    """DeviceError if an operation that is over has failed without a word: none of these does, those of `ops.invariant` may."""


def pinned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A host array of zeros that the device can read and write where it is, and copies fast."""
    size = math.prod(shape)
    array = np.frombuffer(cupy.cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize), dtype, size).reshape(shape)
    array[...] = 0
    return array


def upload(array: np.ndarray, dtype: str | None = None) -> Array:
    """The host array as a device array, converted to `dtype` if one is given.

    A large one is there when this returns; `ops.staging` says how.
    """
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if not isinstance(array, np.ndarray) and array.dtype == dtype:
        return array  # it is there
    if array.size * dtype.itemsize > staging.SLICE_BYTES:
        out = empty(array.shape, dtype)
        staging.copy(out, array)
        return out
    try:
        return cupy.asarray(np.ascontiguousarray(array, dtype))
    except MemoryError as error:
        raise _no_room(array.size * dtype.itemsize) from error


def write(target: Array, array: np.ndarray) -> None:
    """Put an array of the host, converted to the type there, or of the device and this type into a device array of its shape.

    `target` may be a part of another array whose rows (everything behind the first axis) have gaps between them. An array of
    the host is there when this returns.
    """
    if not array.size:
        return
    if not isinstance(array, cupy.ndarray):
        staging.copy(target, array)
    elif target.flags.c_contiguous:
        target[...] = array
    else:  # CuPy would compile a kernel for this
        runtime, row_bytes = cupy.cuda.runtime, target.nbytes // len(target)
        where = target.data.ptr, target.strides[0], array.data.ptr, row_bytes, row_bytes, len(target)
        runtime.memcpy2DAsync(*where, runtime.memcpyDeviceToDevice, cupy.cuda.get_current_stream().ptr)


def repeat(pattern: np.ndarray, shape: tuple[int, ...], dtype: str) -> Array:
    """A device array of `dtype` filled with a host array's elements, over and over."""
    out, source = empty(shape, dtype), upload(pattern.reshape(-1), dtype)
    target = out.reshape(-1)
    for start in range(0, target.size, source.size):
        piece = target[start : start + source.size]
        piece.data.copy_from_device_async(source.data, piece.nbytes, cupy.cuda.get_current_stream())
    return out


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


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; any leading axes."""
    width = x.shape[-1]
    out = empty(x.shape, x.dtype)
    if x.size:
        threads = _threads(-(-width // 8), 256)
        _launch("rms_norm", (x.size // width,), threads, (x, weight, out, np.int32(width), np.float32(eps)), x.dtype)
    return out


def quantize(matrix: Array, kind: str) -> QuantizedMatrix:
    """A matrix [out, in] of bfloat16 or float16 as codes of a kind, as `ops.quantized` says and in the order of quantize.cu.

    InvalidArgument where the kind is not for such a matrix.
    """
    rows, inner = matrix.shape
    group = group_of(kind, inner)
    if kind == "int4":
        tiles = -(-rows // _SCALE_ROWS)
        codes = empty((rows, inner // 2), "uint8")
        scales = empty((tiles * _SCALE_ROWS // 8, inner // group, 8, 2), "float16")
        grid, threads = tiles * inner // 32, _SCALE_ROWS
    else:
        codes, scales = empty((rows, inner), "int8" if kind == "int8" else "uint8"), empty((rows,), "float16")
        grid, threads = rows, _threads(inner // 16, 256)
    args = (matrix, codes, scales, *map(np.int32, (rows, inner, group)))
    _launch("quantize", (grid,), threads, args, matrix.dtype, **_WEIGHT_DEFINES[kind])
    return QuantizedMatrix(kind, (rows, inner), codes, scales)


def dequantize(matrix: QuantizedMatrix, dtype: str, first: int = 0, count: int | None = None) -> Array:
    """Rows first .. first + count of what a matrix stands for, by default all -> [count, in] of bfloat16 or float16."""
    rows, inner = matrix.shape
    count = rows - first if count is None else min(count, rows - first)
    out = empty((count, inner), dtype)
    pieces = count * (inner // (32 if matrix.kind == "int4" else 16))
    args = (matrix.codes, matrix.scales, out, *map(np.int32, (first, count, inner, group_of(matrix.kind, inner))))
    _launch("dequantize", (-(-pieces // 256),), 256, args, out.dtype, **_WEIGHT_DEFINES[matrix.kind])
    return out


Gemm = Callable[[Array, Array, Array, bool], None]  # as `_gemm`
Weight = Array | QuantizedMatrix  # [out, in]


def _multiply(x: Array, weight: Weight, out: Array, add: bool, gemm: Gemm | None) -> None:
    """`_gemm`, or what takes its place; a quantised matrix is dequantised a slice at a time, so that little is there twice."""
    gemm = gemm or _gemm
    if not isinstance(weight, QuantizedMatrix):
        gemm(x, weight, out, add)
        return
    rows, inner = weight.shape
    # Whole tiles: the fast kernels of cuBLAS want columns of `out` that begin at multiples of 16 bytes.
    step = max(_SCALE_ROWS, _SCRATCH_BYTES // (inner * x.dtype.itemsize) // _SCALE_ROWS * _SCALE_ROWS)
    for first in range(0, rows, step):
        gemm(x, dequantize(weight, x.dtype, first, step), out[:, first : first + step], add)


def linear(x: Array, weight: Weight, bias: Array | None = None, dtype: str | None = None, *, gemm: Gemm | None = None) -> Array:
    """x [T, in] times weight [out, in] transposed, plus bias [out] -> [T, out], in `dtype`: that of x or "float32".

    `gemm` multiplies, if it is not to be cuBLAS.
    """
    out = empty((x.shape[0], weight.shape[0]), x.dtype if dtype is None else dtype)
    if out.size:
        _multiply(x, weight, out, False, gemm)
        _add_bias(out, bias, x.dtype)
    return out


def norm_linear(
    x: Array,
    gain: Array,
    eps: float,
    weight: Weight,
    bias: Array | None = None,
    dtype: str | None = None,
    *,
    gemm: Gemm | None = None,
) -> Array:
    """linear(rms_norm(x, gain, eps), weight, bias, dtype) of x [T, in], gain [in], weight [out, in], bias [out] -> [T, out]."""
    return linear(rms_norm(x, gain, eps), weight, bias, dtype, gemm=gemm)


def norm_swiglu(
    x: Array, gain: Array, eps: float, weight: Weight, bias: Array | None = None, *, gemm: Gemm | None = None
) -> Array:
    """silu(gate) * up, both `norm_linear` of x [T, in] -> [T, ffn].

    weight [2 * ffn, in] and bias [2 * ffn] hold 8 rows of the gate, then the same 8 of up, by turns, as `ops.numpy` says.
    """
    both = norm_linear(x, gain, eps, weight, bias, gemm=gemm)
    num_rows, ffn = both.shape[0], both.shape[1] // 2
    out = empty((num_rows, ffn), both.dtype)
    blocks = min(-(-out.size // (256 * 8)), _MAX_GRID)
    _launch("swiglu", (blocks,), 256, (both, out, np.int64(out.size), np.int32(ffn)), both.dtype)
    return out


def linear_add(x: Array, weight: Weight, residual: Array, bias: Array | None = None, *, gemm: Gemm | None = None) -> Array:
    """residual [T, out] + x [T, in] times weight [out, in] transposed, plus bias [out] -> [T, out].

    `residual` is overwritten by the result, which is returned. It is rounded once, or with a bias once more.
    """
    if residual.size:
        _multiply(x, weight, residual, True, gemm)
        _add_bias(residual, bias, x.dtype)
    return residual


def _add_bias(out: Array, bias: Array | None, dtype: np.dtype) -> None:
    """out [T, N] += bias [N], if there is one; `dtype` is that of the bias."""
    if bias is not None:
        name = "add_bias_float32" if out.dtype == np.float32 else "add_bias"
        _launch(name, (out.shape[0],), _threads(out.shape[1], 256), (out, bias, np.int32(out.shape[1])), dtype)


_ONE_ZERO = np.array([1, 0], np.float32)  # where cuBLAS reads alpha and beta
_ONE_ADDRESS, _ZERO_ADDRESS = _ONE_ZERO.ctypes.data, _ONE_ZERO.ctypes.data + 4
_NO_REDUCED_PRECISION_REDUCTION = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION


@functools.cache
def _cublas_types() -> dict[str, int]:
    """What cuBLAS calls the types."""
    runtime = cupy.cuda.runtime
    return {"bfloat16": runtime.CUDA_R_16BF, "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F}


def _gemm(x: Array, weight: Array, out: Array, add: bool = False) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T on cuBLAS, accumulated in float32; with `add` also what out held, rounded once.

    cuBLAS is column-major: the same memory is out^T [N, T] = (weight^T [K, N])^T @ x^T [K, T], leading dimensions N, K and K.
    `out` may be columns of another array: then its leading dimension is the width of that.
    """
    cublas, types = blas.module(), _cublas_types()
    (rows, inner), columns = x.shape, weight.shape[0]
    try:
        handle = cupy.cuda.device.get_cublas_handle()
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)  # where alpha and beta are
        cublas.setMathMode(handle, _NO_REDUCED_PRECISION_REDUCTION)
        blas.gemm_ex(
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
            _ONE_ADDRESS if add else _ZERO_ADDRESS,
            out.data.ptr,
            types[out.dtype.name],
            out.strides[0] // out.dtype.itemsize,
            cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )
    except cublas.CUBLASError as error:
        raise DeviceError(f"cuBLAS failed ({error}); if GPU memory is short, lower gpu_memory_utilization") from error


class Index:
    """The batch of one step, as `ops.numpy` says, on the device; and the plans of its attention."""

    def __init__(self, *arrays: np.ndarray, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._host = [np.ascontiguousarray(array, np.int32) for array in arrays]
        self._plans: dict[tuple, attention.CascadePlan] = {}
        starts = np.cumsum([0, *(-(-array.size // 4) * 4 + 4 for array in self._host)])
        together = np.full(starts[-1], -1, np.int32)  # what lies between the arrays is no page, so that a wrong index shows
        for start, array in zip(starts, self._host, strict=False):
            together[start : start + array.size] = array
        on_device = upload(together)
        parts = [on_device[start : start + array.size] for start, array in zip(starts, self._host, strict=False)]
        self.q_indptr, self.seq_lens, self.page_indptr, self.page_indices = parts

    def plan(self, q: Array, k_pool: Array, sliding_window: int | None) -> attention.CascadePlan:
        """How attention over such arrays is cut: made for the first layer, found again by the others.

        Where neighbours in the batch begin with the same blocks, and reading those once pays, they are a level of their own. If
        a row is not to depend on the others, all is one level of fixed parts.
        """
        key = q.shape[1:], k_pool.shape, q.dtype, k_pool.dtype, sliding_window
        if key not in self._plans:
            num_kv_heads, num_blocks, block_size, head_dim = k_pool.shape
            shape = {"num_heads": q.shape[1], "num_kv_heads": num_kv_heads, "block_size": block_size}
            decode_grid, prefill_grid = attention.grids_of_device(head_dim, q.dtype.name, k_pool.dtype.name)
            grids = {"num_blocks": num_blocks, "decode_grid": decode_grid, "prefill_grid": prefill_grid}
            prefixes = []
            if sliding_window is None and not self._batch_invariant:
                prefixes = attention.shared_prefixes(*self._host, **shape, head_dim=head_dim, kv_bytes=k_pool.dtype.itemsize)
            if prefixes:
                self._plans[key] = attention.plan_cascade(*self._host, prefixes, **shape, **grids)
            else:
                rules = {"sliding_window": sliding_window, "batch_invariant": self._batch_invariant}
                whole = attention.plan(*self._host, **shape, **grids, **rules)
                self._plans[key] = attention.CascadePlan(None, whole)
        return self._plans[key]


def index(q_indptr: np.ndarray, seq_lens: np.ndarray, page_indptr: np.ndarray, page_indices: np.ndarray) -> Index:
    """What `rope_append` and `paged_attention` take to know a batch by, from host arrays of int32."""
    return Index(q_indptr, seq_lens, page_indptr, page_indices)


def rope_append(
    qkv: Array,
    rope_table: Array,
    k_pool: Array,
    v_pool: Array,
    kv_scales: Array | None,
    index: Index,
    num_heads: int,
    qk_gains: tuple[Array, Array] | None = None,
    eps: float = 0.0,
) -> Array:
    """Rotate q and k by their positions, append k and v to the pool, return the rotated q [T, num_heads, head_dim].

    qkv [T, num_heads + 2 * num_kv_heads, head_dim]; rope_table [max_positions, head_dim] float32; pools [num_kv_heads,
    num_blocks, block_size, head_dim] of qkv's dtype, int8 or uint8 (fp8), with kv_scales as `ops.numpy` says; head_dim a
    multiple of 16, with qk_gains a power of two up to 512; block_size a power of two.
    """
    out = empty((qkv.shape[0], num_heads, qkv.shape[2]), qkv.dtype)
    batch = index.q_indptr, index.seq_lens, index.page_indptr, index.page_indices
    launch_rope_append(qkv, rope_table, k_pool, v_pool, kv_scales, batch, num_heads, qk_gains, eps, out)
    return out


def launch_rope_append(
    qkv: Array,
    rope_table: Array,
    k_pool: Array,
    v_pool: Array,
    kv_scales: Array | None,
    index_arrays: tuple[Array, Array, Array, Array],
    num_heads: int,
    qk_gains: tuple[Array, Array] | None,
    eps: float,
    out: Array,
) -> None:
    """`rope_append` into `out`: a launch and nothing else, so that it can be captured in a graph.

    index_arrays: q_indptr, seq_lens, page_indptr and page_indices on the device. Nothing is written for rows from q_indptr[B]
    on, not to `out` either: a graph may have more rows than a step.
    """
    num_rows, _, head_dim = qkv.shape
    num_kv_heads, num_blocks, block_size, _ = k_pool.shape
    scales = [] if kv_scales is None else [kv_scales]
    norm = [] if qk_gains is None else [*qk_gains, np.float32(eps)]
    sizes = (index_arrays[1].size, num_heads, num_kv_heads, head_dim, num_blocks, _shift(block_size))
    args = (qkv, rope_table, out, k_pool, v_pool, *scales, *norm, *index_arrays, *map(np.int32, sizes))
    defines = _rope_append_defines(k_pool.dtype.name, qk_gains is not None)
    _launch("rope_append", (num_rows,), 128, args, qkv.dtype, **defines)


def copy_blocks(pool: Array, sources: Array, targets: Array) -> None:
    """Copy blocks within a pool [num_layers, num_kv_heads, num_blocks, ...] of all layers and heads, in place."""
    layers, heads, num_blocks = pool.shape[:3]
    pool = pool.view(np.uint32)
    words = math.prod(pool.shape[3:])
    index = [_device_array(a, np.int32) for a in (sources, targets)]
    args = (pool, *index, np.int32(num_blocks), np.int32(words))
    _launch("copy_blocks", (len(sources), layers * heads), _threads(words, 256), args)


def paged_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    kv_scales: Array | None,
    index: Index,
    scale: float,
    sliding_window: int | None = None,
) -> Array:
    """Causal attention of every row over its own sequence, K and V read through the page table.

    q [T, num_heads, head_dim] -> out of the same shape; pools and kv_scales as for `rope_append`; head_dim 64 or 128,
    block_size a power of two up to 256. A row with nothing to attend to gives 0. One launch, from a plan that `index` keeps;
    three, where a prefix that sequences share is attended once for all.
    """
    plans = index.plan(q, k_pool, sliding_window)
    return attention.run_cascade(plans, q, k_pool, v_pool, scale, out=empty(q.shape, q.dtype), kv_scales=kv_scales)


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


def bias(logits: Array, indptr: Array, token_ids: Array, values: Array) -> None:
    """Add values[i] to logits[b, token_ids[i]] for the i from indptr[b] to indptr[b+1], in place; -inf forbids a token."""
    num_rows, vocab = logits.shape
    index = [_device_array(a, np.int32) for a in (indptr, token_ids)]
    _launch("bias", (num_rows,), 128, (logits, *index, _device_array(values, np.float32), np.int32(vocab)))


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
    out = empty((logits.shape[0],), "int32")
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int32, np.int32)
    columns = (temperature, top_k, top_p, min_p, seed, candidate, position)
    launch_sample(logits, [_device_array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)], out)
    return out


def launch_sample(logits: Array, columns: Sequence[Array], out: Array) -> None:
    """`sample` into `out`: a launch and nothing else, so that it can be captured in a graph.

    columns: what `sample` takes after the logits, on the device. A token is one of the vocabulary, whatever the logits.
    """
    num_rows, vocab = logits.shape
    _launch("sample", (num_rows,), _threads(-(-vocab // 4), 1024), (logits, *columns, out, np.int32(vocab)))


def largest(logits: Array, count: int) -> Array:
    """Ids int32 [R, count] of the largest of float32 logits [R, vocab], as `ops.numpy` says; a pass over the row for each."""
    num_rows, vocab = logits.shape
    out = empty((num_rows, count), "int32")
    if count:
        _launch("largest", (num_rows,), _threads(vocab, 1024), (logits, out, np.int32(vocab), np.int32(count)))
    return out


def ranks(logits: Array, token_ids: Array) -> Array:
    """1 + how many of float32 logits [R, vocab] are larger than that of the row's token [R] -> int32 [R]."""
    num_rows, vocab = logits.shape
    out = empty((num_rows,), "int32")
    _launch("ranks", (num_rows,), _threads(vocab, 1024), (logits, _device_array(token_ids, np.int32), out, np.int32(vocab)))
    return out


def logprobs(logits: Array, token_ids: Array) -> Array:
    """log(softmax(logits)) of float32 logits [R, vocab] at token_ids [R, n] -> float32 [R, n]."""
    num_rows, vocab = logits.shape
    out = empty(token_ids.shape, "float32")
    args = (logits, _device_array(token_ids, np.int32), out, np.int32(vocab), np.int32(token_ids.shape[1]))
    _launch("logprobs", (num_rows,), _threads(vocab, 1024), args)
    return out


def _device_array(array: Array, dtype: type) -> Array:
    """A small argument as a device array of `dtype`: as it is, or uploaded from the host."""
    if isinstance(array, cupy.ndarray) and array.dtype == dtype:
        return array
    return cupy.asarray(array, dtype)


def _shift(block_size: int) -> int:
    """log2 of a block size."""
    if block_size < 1 or block_size & (block_size - 1):
        raise InvalidArgument(f"block_size is {block_size}; give a power of two from 1 to 256")
    return block_size.bit_length() - 1
