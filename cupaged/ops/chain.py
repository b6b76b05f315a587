"""The operations of a step of few rows, queued as few kernels: the products between two attentions are one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.attention.planner import DECODE_ROWS
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit, tensor_map
from cupaged.cuda.launch import launch_dependent
from cupaged.ops import cuda

Array = Any  # cupy.ndarray

SOURCE, NAME = "weight_stream.cu", "weight_stream"
START_SOURCE, START_NAME = "stream_start.cu", "stream_start"
TILE, DEPTH = 128, 64  # rows of weights and length of a unit
STAGES = {8: (12, 16), 16: (12, 10), 32: (11, 8), 64: (10, 6)}  # of weights and of x, by the rows of x: as many as fit
THREADS = 7 * 32
MOST_ROWS = max(STAGES)
_MOST_PRODUCTS = 4
WAITED_IN_VAIN = (
    "a kernel waited in vain for another part of the step, and its results are wrong; try once more, and if it happens again "
    "report it, with the output of cupaged info"
)
_DTYPES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}}
_UNWRITTEN = 0xFFFFFFFF
STORE, STORE_FLOAT, SWIGLU, ADD, QKV = range(5)

PRODUCT = np.dtype(
    [(name, tensor_map.DTYPE) for name in ("weights", "x")]
    + [(name, "<u8") for name in ("out", "bias", "gain", "normed", "squares", "x_squares", "done")]
    + [(name, "<i4") for name in ("num_rows", "inner", "x_tiles", "finish")]
    + [("eps", "<f4"), ("reserved", "<u4", 13)]
)
_OF_APPEND = ["rope_table", "k_pool", "v_pool", "kv_scales", "seq_lens", "page_indptr", "page_indices"]
_SIZES_OF_APPEND = ["num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_shift"]
CHAIN = np.dtype(
    [("products", PRODUCT, _MOST_PRODUCTS)]
    + [(name, "<u8") for name in ("parts", "flag", *_OF_APPEND)]
    + [(name, "<i4") for name in (*_SIZES_OF_APPEND, "padding", "num_products", "num_tokens")]
    + [("reserved", "<u4", 6)]
)


def variants(dtype: str, kv_dtype: str) -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) of every kernel that a `Chain` can ask for, where pools hold arrays of kv_dtype."""
    streams = [(SOURCE, NAME, _defines(dtype, kv_dtype, rows)) for rows in STAGES]
    return [(START_SOURCE, START_NAME, _DTYPES[dtype]), *streams]


def _defines(dtype: str, kv_dtype: str, rows: int) -> dict[str, int]:
    stages, x_stages = STAGES[rows]
    codes = {"KV_FP8": 1} if kv_dtype == "uint8" else {}
    return {**_DTYPES[dtype], "TOKENS": rows, "STAGES": stages, "X_STAGES": x_stages, **codes}


def shared_bytes(rows: int) -> int:
    """Dynamic shared memory of a CTA: the size of `struct Shared`."""
    stages, x_stages = STAGES[rows]
    boxes = stages * TILE * DEPTH * 2 + x_stages * rows * DEPTH * 2
    rest = 16 * (stages + x_stages) + 16 + 6 * 4 * rows + 4 * 4 * 8 * 36
    return boxes + -(-rest // 1024) * 1024


def takes(config: ModelConfig) -> bool:
    """Whether a `Chain` can compute a model on the current device, which must be sm_90: there its kernels were measured."""
    device = jit.import_cupy().cuda.Device()
    widths = (config.hidden_size, config.intermediate_size)
    fits = all(width % 8 == 0 for width in widths) and config.num_heads // config.num_kv_heads <= DECODE_ROWS
    return fits and int(device.compute_capability) == 90


def rows_for(num_tokens: int) -> int:
    """The rows of x, of those that there are kernels for, that so many tokens take."""
    return next(rows for rows in STAGES if num_tokens <= rows)


class Room:
    """What the CTAs of launches of so many rows share: parts of tiles on their way, and whether one was waited for in vain."""

    def __init__(self, rows: int) -> None:
        self.rows, self.num_ctas = rows, _num_ctas()
        self.parts = cuda.upload(np.full(self.num_ctas * TILE * rows, _UNWRITTEN, np.uint32))
        self.flag = cuda.pinned((1,), "uint32")  # where the device can write to and the host look without waiting

    def reset(self) -> None:
        """After a launch that has failed: as if none had been."""
        self.parts[...] = _UNWRITTEN
        self.flag[0] = 0

    def launch(self, products: list[dict], num_tokens: int, dtype: str, kv_dtype: str, append: dict | None = None) -> None:
        """Queue up to four products, each as `product` makes them and its `done` count zero."""
        chain = np.zeros((), CHAIN)
        for target, values in zip(chain["products"], products, strict=False):
            for name, value in values.items():
                target[name] = value
        chain["parts"], chain["flag"] = self.parts.data.ptr, self.flag.ctypes.data
        for name, value in (append or {}).items():
            chain[name] = value
        chain["num_products"], chain["num_tokens"] = len(products), num_tokens
        size = shared_bytes(self.rows)
        kernel = jit.kernel(SOURCE, NAME, **_defines(dtype, kv_dtype, self.rows))
        kernel.max_dynamic_shared_size_bytes = size
        launch_dependent(kernel, (self.num_ctas,), (THREADS,), (chain,), shared_mem=size)


def product(
    finish: int, x: int, x_rows: int, weight: Array, out: int, done: int, rows: int, dtype: str, **values: float
) -> dict:
    """PRODUCT of x, x_rows rows of `dtype` at an address, and a weight, for a kernel of so many rows."""
    num_rows, inner = weight.shape
    return {
        "weights": tensor_map.encode_rows(weight.data.ptr, num_rows, inner, TILE, dtype),
        "x": tensor_map.encode_rows(x, x_rows, inner, rows, dtype),
        "out": out,
        "num_rows": num_rows,
        "inner": inner,
        "finish": finish,
        "done": done,
        **values,
    }


class Chain:
    """The operations of `ops.cuda` that a forward pass calls, for `num_tokens` rows, each of another sequence.

    Nothing is launched when a product is asked for: products gather until an operation of another kind needs their results.
    Every array it makes is kept and used again by the next step, so that a graph may capture what it launches, once a step has
    run outside of the capture. What it is given (weights, gains, ids) must stay where it is.

    dtype, kv_dtype       of weights and activations; of the pools' arrays
    planners              by sliding window: what plans the attention, made for num_tokens sequences
    max_products          that a step has
    """

    def __init__(
        self,
        num_tokens: int,
        dtype: str,
        kv_dtype: str,
        planners: dict[int | None, attention.DevicePlanner],
        max_products: int,
    ) -> None:
        self.num_tokens, self.rows, self.planners = num_tokens, rows_for(num_tokens), planners
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self._arrays: dict[str, Array] = {}
        self._done = self._array("done", (max_products,), "uint32")
        self.room = Room(self.rows)
        self._recorded: list[dict] = []
        self._append: dict = {}  # what of a step the products that append to the pool must know
        self._num_products = 0
        self._start: dict | None = None  # an embedding that does not know its gain yet

    # ---- the operations

    def upload(self, array: Array) -> Array:
        return array  # it is there

    def index(self, *_: Array) -> None:
        """Plans the attention of all layers; what of is in the planners already."""
        for planner in self.planners.values():
            planner.launch()

    def embedding(self, token_ids: Array, table: Array) -> Array:
        residual = self._rows("residual", table.shape[1:], self.dtype)
        if table.data.ptr == residual.data.ptr:
            return table  # the rows whose logits are wanted: all, in this order
        self._num_products = 0
        self._start = {"token_ids": token_ids, "table": table}
        return residual

    def norm_linear(
        self, x: Array, gain: Array, eps: float, weight: Array, bias: Array | None = None, dtype: str | None = None
    ) -> Array:
        out = self._rows(dtype or "product", weight.shape[:1], dtype or self.dtype)
        self._record_norm(x, gain)
        finish = STORE if dtype is None else STORE_FLOAT
        return self._record(finish, "normed", weight, bias, out, eps=eps)

    def norm_swiglu(self, x: Array, gain: Array, eps: float, weight: Array, bias: Array | None = None) -> Array:
        out = self._rows("activated", (weight.shape[0] // 2,), self.dtype)
        self._record_norm(x, gain)
        return self._record(SWIGLU, "normed", weight, bias, out, eps=eps)

    def linear_add(self, x: Array, weight: Array, residual: Array, bias: Array | None = None) -> Array:
        name = next(name for name, array in self._arrays.items() if array.data.ptr == x.data.ptr)
        tiles = -(-weight.shape[0] // TILE)
        squares = self._array("squares", (tiles, self.rows), "float32")
        normed = self._rows("normed", residual.shape[1:], self.dtype)
        return self._record(ADD, name, weight, bias, residual, normed=normed.data.ptr, squares=squares.data.ptr)

    def rope_append(
        self,
        qkv: Array,
        rope_table: Array,
        k_pool: Array,
        v_pool: Array,
        kv_scales: Array | None,
        index: None,
        num_heads: int,
        qk_gains: tuple[Array, Array] | None = None,
        eps: float = 0.0,
    ) -> Array:
        out = self._rows("q", (num_heads, qkv.shape[-1]), self.dtype)
        planner = next(iter(self.planners.values()))
        batch = (planner.q_indptr, planner.seq_lens, planner.page_indptr, planner.page_indices)
        num_kv_heads, num_blocks, block_size, head_dim = k_pool.shape
        if qk_gains is not None or k_pool.dtype == np.int8:  # what must know all of a head first
            self.flush()
            cuda.launch_rope_append(qkv, rope_table, k_pool, v_pool, kv_scales, batch, num_heads, qk_gains, eps, out)
            return out
        arrays = (rope_table, k_pool, v_pool, kv_scales, *batch[1:])
        sizes = (num_heads, num_kv_heads, head_dim, num_blocks, block_size.bit_length() - 1)
        self._append = {name: 0 if a is None else a.data.ptr for name, a in zip(_OF_APPEND, arrays, strict=True)}
        self._append |= dict(zip(_SIZES_OF_APPEND, sizes, strict=True))
        self._recorded[-1] |= {"finish": QKV, "out": out.data.ptr}
        self.flush()
        return out

    def paged_attention(
        self, q: Array, k_pool: Array, v_pool: Array, kv_scales: Array | None, index: None, scale: float, window: int | None
    ) -> Array:
        out = self._rows("attended", q.shape[1:], self.dtype)
        attention.run(self.planners[window], q, k_pool, v_pool, scale, out=out, kv_scales=kv_scales)
        return out

    def flush(self) -> None:
        """Launch the products asked for since the last time."""
        if not self._recorded:
            return
        self.room.launch(self._recorded, self.num_tokens, self.dtype, self.kv_dtype, self._append)
        self._recorded = []

    # ---- what they record

    def _record(
        self, finish: int, x: str, weight: Array, bias: Array | None, out: Array, eps: float = 0.0, **values: int
    ) -> Array:
        if x == "normed":
            squares = self._arrays["start_squares" if self._from_start else "squares"]
            values |= {"x_squares": squares.data.ptr, "x_tiles": squares.shape[0]}
        values |= {"bias": 0 if bias is None else bias.data.ptr, "eps": eps}
        source, done = self._arrays[x].data.ptr, self._done.data.ptr + 4 * self._num_products
        self._recorded.append(product(finish, source, self.rows, weight, out.data.ptr, done, self.rows, self.dtype, **values))
        self._num_products += 1
        return out

    def _record_norm(self, x: Array, gain: Array) -> None:
        """Tell whoever makes x what the norm that reads it multiplies by."""
        self._from_start = self._start is not None
        if self._start is None:
            self._recorded[-1]["gain"] = gain.data.ptr
            return
        table, token_ids = self._start["table"], self._start["token_ids"]
        normed = self._rows("normed", x.shape[1:], self.dtype)
        squares = self._array("start_squares", (1, self.rows), "float32")
        kernel = jit.kernel(START_SOURCE, START_NAME, **_DTYPES[self.dtype])
        args = (token_ids, table, gain, x, normed, squares, self._done, np.int32(x.shape[1]), np.int32(self._done.size))
        kernel((self.num_tokens,), (256,), args, shared_mem=4 * 32)
        self._start = None

    def _rows(self, name: str, shape: Sequence[int], dtype: str) -> Array:
        """An array with a row for each token; there are more behind, up to as many as the kernel takes."""
        return self._array(name, (self.rows, *shape), dtype)[: self.num_tokens]

    def _array(self, name: str, shape: Sequence[int], dtype: str) -> Array:
        """The array of this name, made of zeros at its first use."""
        if name not in self._arrays:
            self._arrays[name] = cuda.upload(np.zeros(shape, np.dtype(dtype)))
        array = self._arrays[name]
        assert (array.shape, array.dtype) == (tuple(shape), dtype), f"{name} was {array.shape}"
        return array


@functools.cache
def _num_ctas() -> int:
    cupy = jit.import_cupy()
    return cupy.cuda.Device().attributes["MultiProcessorCount"]
