"""Steps of one token a sequence as captured graphs: the forward pass once for each number of sequences, then replayed."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import attention
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.model.llama import Batch, Llama
from cupaged.ops import chain, cuda

Array = Any  # cupy.ndarray

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sequences that there are graphs for


def variants(config: ModelConfig, dtype: str, kv_dtype: str) -> list[jit.Variant]:
    """The kernels of a Decoder, beside those of `ops.cuda`; none where the device or the model is not for it."""
    if not chain.takes(config):
        return []
    step = attention.grids_of_device(config.head_dim, dtype, kv_dtype)[0].step
    return [*chain.variants(dtype, kv_dtype), (attention.device_plan.SOURCE, attention.device_plan.NAME, {"STEP": step})]


class Decoder:
    """The logits of a model for steps of one token for each of up to 64 sequences, on one GPU.

    A graph is captured when a step of its size first comes; a step with fewer sequences has rows that belong to none. The pools
    are those of every step.
    """

    def __init__(
        self, model: Llama, k_pool: Array, v_pool: Array, kv_scales: Array | None, max_model_len: int, max_num_seqs: int
    ) -> None:
        self._model, self._pools = model, (k_pool, v_pool, kv_scales)
        self._max_model_len, self._most = max_model_len, min(max_num_seqs, _SIZES[-1])
        self._graphs: dict[int, _Graph] = {}

    def takes(self, batch: Batch) -> bool:
        """Whether every sequence has one token, whose logits are wanted, and there are not too many."""
        count = len(batch.seq_lens)
        return len(batch.token_ids) == len(batch.logit_rows) == count <= self._most and bool(
            (np.diff(batch.q_indptr) == 1).all()
        )

    def logits(self, batch: Batch) -> Array:
        """float32 [B, vocab] of the batch's sequences in the order of its logit_rows; overwritten by the next step."""
        count = len(batch.seq_lens)
        size = next(size for size in _SIZES if size >= count)
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._model, self._pools, size, self._max_model_len)
        return self._graphs[size].replay(_in_order(batch))[:count]

    def check(self) -> None:
        """DeviceError if a wait in one of the graphs has failed since the last look; only known once the device is done."""
        for graph in self._graphs.values():
            if graph.chain.flag[0]:
                graph.chain.reset()
                cause = "a kernel waited in vain for another part of the step, and its results are wrong"
                raise DeviceError(f"{cause}; try once more, and if it happens again report it, with the output of cupaged info")


def _in_order(batch: Batch) -> Batch:
    """The batch with its sequences in the order of logit_rows."""
    order = batch.logit_rows
    if (order == np.arange(order.size)).all():
        return batch
    counts = np.diff(batch.page_indptr)[order]
    page_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    places = np.repeat(batch.page_indptr[:-1][order] - page_indptr[:-1], counts) + np.arange(page_indptr[-1])
    return Batch(
        batch.token_ids[order],
        np.arange(order.size, dtype=np.int32),
        batch.q_indptr,
        batch.seq_lens[order],
        page_indptr,
        batch.page_indices[places],
    )


class _Graph:
    """The forward pass of so many sequences, and the arrays that it reads a step from."""

    def __init__(self, model: Llama, pools: tuple[Array, Array, Array | None], size: int, max_model_len: int) -> None:
        cupy, config = jit.import_cupy(), model.config
        k_pool = pools[0]
        num_blocks, block_size, head_dim = k_pool.shape[2:]
        dtype = model.params.embed.dtype.name
        grid, _ = attention.grids_of_device(head_dim, dtype, k_pool.dtype.name)
        self._planners = {
            window: attention.DevicePlanner(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                block_size=block_size,
                num_blocks=num_blocks,
                grid=grid,
                max_sequences=size,
                max_tokens=size,
                max_tokens_each=1,
                max_pages=size * -(-max_model_len // block_size),
                sliding_window=window,
            )
            for window in set(config.sliding_windows)
        }
        self.chain = chain.Chain(size, dtype, k_pool.dtype.name, self._planners, max_products=4 * config.num_layers + 1)
        self._token_ids = cuda.upload(np.zeros(size, np.int32))
        self._staging = cuda.pinned((size,), "int32")
        rows = cuda.upload(np.zeros(size, np.int32))
        batch = Batch(self._token_ids, rows, None, None, None, None)  # of the device; the planners have the rest

        def forward() -> Array:
            logits = model.forward(batch, *pools, ops=self.chain)
            self.chain.flush()
            return logits

        cupy.cuda.get_current_stream().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            self._logits = forward()  # of no sequences: all is compiled and every array made
            stream.begin_capture()
            forward()
            self._graph = stream.end_capture()
        stream.synchronize()

    def replay(self, batch: Batch) -> Array:
        stream = jit.import_cupy().cuda.get_current_stream()
        for planner in self._planners.values():
            planner.update(batch.q_indptr, batch.seq_lens, batch.page_indptr, batch.page_indices)
        count = batch.token_ids.size
        self._staging[:count] = batch.token_ids
        self._staging[count:] = 0
        runtime = jit.import_cupy().cuda.runtime
        to_device = runtime.memcpyHostToDevice
        runtime.memcpyAsync(self._token_ids.data.ptr, self._staging.ctypes.data, 4 * self._staging.size, to_device, stream.ptr)
        self._graph.launch(stream)
        return self._logits
