"""The operations of a step of few rows, queued as few kernels: the products between two attentions are one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.cuda import jit
from cupaged.ops import cuda, products
from cupaged.ops.quantized import QuantizedMatrix

Array = Any  # cupy.ndarray
Matrix = Array | QuantizedMatrix

START_SOURCE, START_NAME = "stream_start.cu", "stream_start"


def variants(
    dtype: str, kv_dtype: str, kinds: Iterable[str | None] = (None,), most_rows: int = products.MOST_ROWS
) -> list[jit.Variant]:
    """The kernels that a `Chain` can ask for beside those of `ops.cuda`, with weights of these kinds, pools of kv_dtype."""
    return [(START_SOURCE, START_NAME, cuda.DTYPE_DEFINES[dtype]), *products.variants(dtype, kv_dtype, kinds, most_rows)]


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
        self.num_tokens, self.rows, self.planners = num_tokens, products.rows_for(num_tokens), planners
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self._arrays: dict[str, Array] = {}
        self._done = self._array("done", (max_products,), "uint32")
        self.room = products.Room(self.rows)
        self._recorded: list[dict] = []
        self._kind: str | None = None  # of their weights
        self._append: dict = {}  # what of a step the products that append to the pool must know
        self._num_products = 0
        self._start: dict | None = None  # an embedding that does not know its gain yet

    # ---- the operations

    def upload(self, array: Array) -> Array:
        return array  # it is there

    def index(self, *_: Array) -> None:
        """Plans the attention of all layers, of what is in the planners already."""
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
        self,
        x: Array,
        gain: Array,
        eps: float,
        weight: Matrix,
        bias: Array | None = None,
        dtype: str | None = None,
    ) -> Array:
        out = self._rows(dtype or "product", weight.shape[:1], dtype or self.dtype)
        self._record_norm(x, gain)
        finish = products.STORE if dtype is None else products.STORE_FLOAT
        return self._record(finish, "normed", weight, bias, out, eps=eps)

    def norm_swiglu(self, x: Array, gain: Array, eps: float, weight: Matrix, bias: Array | None = None) -> Array:
        out = self._rows("activated", (weight.shape[0] // 2,), self.dtype)
        self._record_norm(x, gain)
        return self._record(products.SWIGLU, "normed", weight, bias, out, eps=eps)

    def linear_add(self, x: Array, weight: Matrix, residual: Array, bias: Array | None = None) -> Array:
        name = next(name for name, array in self._arrays.items() if array.data.ptr == x.data.ptr)
        squares = self._array("squares", (self.room.num_parts(weight), self.rows), "float32")
        normed = self._rows("normed", residual.shape[1:], self.dtype)
        return self._record(products.ADD, name, weight, bias, residual, normed=normed.data.ptr, squares=squares.data.ptr)

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
        self._append = {name: 0 if a is None else a.data.ptr for name, a in zip(products.OF_APPEND, arrays, strict=True)}
        self._append |= dict(zip(products.SIZES_OF_APPEND, sizes, strict=True))
        self._recorded[-1] |= {"finish": products.QKV, "out": out.data.ptr}
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
        self.room.launch(self._recorded, self.num_tokens, self.dtype, self.kv_dtype, self._kind, self._append)
        self._recorded = []

    # ---- what they record

    def _record(
        self,
        finish: int,
        x: str,
        weight: Matrix,
        bias: Array | None,
        out: Array,
        eps: float = 0.0,
        **values: int,
    ) -> Array:
        if x == "normed":
            squares = self._arrays["start_squares" if self._from_start else "squares"]
            values |= {"x_squares": squares.data.ptr, "x_parts": squares.shape[0]}
        values |= {"bias": 0 if bias is None else bias.data.ptr, "eps": eps}
        source, done = self._arrays[x].data.ptr, self._done.data.ptr + 4 * self._num_products
        if self._recorded and self._kind != products.kind_of(weight):  # a launch has weights of one kind
            self.flush()
        self._kind = products.kind_of(weight)
        self._recorded.append(products.product(finish, source, self.rows, weight, out.data.ptr, done, self.rows, **values))
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
        kernel = jit.kernel(START_SOURCE, START_NAME, **cuda.DTYPE_DEFINES[self.dtype])
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
