"""A decode step as it was before paging: the baseline that `bench generate --cache contiguous` measures.

Each request's K/V of a layer and head is one run of memory, reserved for the longest sequence. Attention is three operations
with the scores in memory between them: a product, a softmax, a product, as in transformers' eager attention; where query heads
share a KV head, K and V are copied for each of them first. All else is the model's own forward pass, its operations launched
one by one.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from cupaged.model.llama import Llama

if TYPE_CHECKING:
    from cupaged.llm import LLM

_BLOCK = 16  # of the operation that appends; the blocks of a request are neighbours here
_PREFILL_ROWS = 512  # whose scores are in memory at once
_WARM_UP = 2  # steps

Array = Any  # of the device of the model's operations


class Contiguous:
    """The forward pass of `batch` sequences of equal length over a cache of at least `max_len` tokens each."""

    def __init__(self, model: Llama, batch: int, max_len: int) -> None:
        self._model, self._batch, self._length = model, batch, 0
        self._pages = -(-max_len // _BLOCK)  # of a request
        config = model.config
        shape = (config.num_layers, config.num_kv_heads, batch * self._pages, _BLOCK, config.head_dim)
        self._k, self._v = (model.ops.empty(shape, model.params.embed.dtype.name) for _ in range(2))

    def forward(self, token_ids: np.ndarray) -> Array:
        """Append tokens int32 [batch, T] and return float32 logits [batch, vocab] after the last of each sequence."""
        model, config, ops = self._model, self._model.config, self._model.ops
        batch, count = token_ids.shape
        eps, params, start = config.rms_norm_eps, model.params, self._length
        self._length += count
        rows = np.arange(batch + 1, dtype=np.int32)
        lengths, pages = np.full(batch, self._length, np.int32), np.arange(batch * self._pages, dtype=np.int32)
        index = ops.index(rows * count, lengths, rows * self._pages, pages)

        x = ops.embedding(ops.upload(token_ids.reshape(-1)), params.embed)
        for number, (layer, window) in enumerate(zip(params.layers, config.sliding_windows, strict=True)):
            k, v = self._k[number], self._v[number]
            gains = (layer.q_norm, layer.k_norm) if config.qk_norm else None
            qkv = ops.norm_linear(x, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
            qkv = qkv.reshape(batch * count, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
            q = ops.rope_append(qkv, model.rope_table, k, v, None, index, config.num_heads, gains, eps)
            attended = self._attend(q.reshape(batch, count, config.num_heads, config.head_dim), k, v, start, window)
            x = ops.linear_add(attended.reshape(batch * count, -1), layer.o, x, layer.o_bias)
            h = ops.norm_swiglu(x, layer.post_norm, eps, layer.gate_up, layer.gate_up_bias)
            x = ops.linear_add(h, layer.down, x, layer.down_bias)
        x = ops.embedding(ops.upload(rows[1:] * count - 1), x)
        return ops.norm_linear(x, params.norm, eps, params.head, dtype="float32")

    def _attend(self, q: Array, k: Array, v: Array, start: int, window: int | None) -> Array:
        """q [batch, T, num_heads, head_dim], of positions from `start` on -> the same shape."""
        xp = _library(q)
        batch, count, num_heads, head_dim = q.shape
        shape = (len(k), 1, batch, self._pages * _BLOCK, head_dim)
        group = num_heads // len(k)
        k, v = (_repeated(x.reshape(shape)[:, :, :, : self._length], group) for x in (k, v))
        q = xp.ascontiguousarray(q.reshape(batch, count, len(k), group, head_dim).transpose(2, 3, 0, 1, 4))
        scores = _product(q, k, transposed=True, dtype="float32")  # [num_kv_heads, group, batch, T, length]
        scores *= np.float32(head_dim**-0.5)
        if count > 1 or window is not None:
            row, key = xp.arange(start, self._length)[:, None], xp.arange(self._length)
            hidden = key > row if window is None else (key > row) | (key <= row - window)
            scores += xp.where(hidden, np.float32(-np.inf), np.float32(0))
        scores -= scores.max(axis=-1, keepdims=True)
        xp.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out = _product(scores.astype(v.dtype), v, transposed=False, dtype=v.dtype.name)
        return xp.ascontiguousarray(out.transpose(2, 3, 0, 1, 4))


def _library(array: Array) -> Any:
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy


def _repeated(x: Array, group: int) -> Array:
    """x [num_kv_heads, 1, ...] for every query head of a group; a copy, but for a group of one."""
    xp = _library(x)
    return x if group == 1 else xp.ascontiguousarray(xp.broadcast_to(x, (len(x), group, *x.shape[2:])))


def _product(a: Array, b: Array, transposed: bool, dtype: str) -> Array:
    """a [..., M, K] times b [..., K, N], or b [..., N, K] transposed -> [..., M, N] in `dtype`.

    a is contiguous; the matrices of b lie at equal distances. On a GPU by cuBLAS itself: CuPy knows no such product of
    bfloat16, and computes float16's in float32.
    """
    if isinstance(a, np.ndarray):
        return a @ (b.swapaxes(-1, -2) if transposed else b)
    import cupy
    from cupy_backends.cuda.libs import cublas

    runtime = cupy.cuda.runtime
    types = {"bfloat16": runtime.CUDA_R_16BF, "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F}
    (rows, inner), columns = a.shape[-2:], b.shape[-2 if transposed else -1]
    out = cupy.empty((*a.shape[:-1], columns), dtype)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    # cuBLAS is column-major: the same memory is out^T = b^T a^T.
    cublas.gemmStridedBatchedEx(
        handle,
        cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
        cublas.CUBLAS_OP_N,
        *(columns, rows, inner, one.ctypes.data),
        *(b.data.ptr, types[b.dtype.name], b.shape[-1], b.strides[-3] // b.itemsize),
        *(a.data.ptr, types[a.dtype.name], inner, rows * inner, zero.ctypes.data),
        *(out.data.ptr, types[dtype], columns, rows * columns, a.size // (rows * inner)),
        cublas.CUBLAS_COMPUTE_32F,
        cublas.CUBLAS_GEMM_DEFAULT,
    )
    return out


def contiguous_step(llm: LLM, batch: int, context: int, tokens: int) -> float:
    """Median milliseconds of a step of `batch` sequences of `context` tokens and more, greedy, by the host's clock."""
    ops = llm.engine.model.ops
    with ops.device(int(llm.device.partition(":")[2] or 0)):
        cache = Contiguous(llm.engine.model, batch, context + tokens + _WARM_UP)
        ids = np.random.default_rng().integers(0, llm.config.vocab_size, (batch, context), np.int32)
        chunk = max(_PREFILL_ROWS // batch, 1)
        for start in range(0, context, chunk):
            logits = cache.forward(ids[:, start : start + chunk])
        times = []
        for _ in range(_WARM_UP + tokens):
            last = ops.download(logits.argmax(axis=-1)).astype(np.int32)
            start = time.perf_counter()
            logits = cache.forward(last[:, None])
            ops.download(logits.argmax(axis=-1))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[_WARM_UP:])
