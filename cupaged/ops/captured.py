"""The operations of a step that a graph captures one by one, for any number of rows and on any device."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.ops import cuda

Array = Any  # cupy.ndarray

logger = logging.getLogger("cupaged")


class Captured:
    """Takes the place of `ops.cuda` in a forward pass over arrays of the device, each row of another sequence.

    Nothing waits for the device or copies from the host. The batch is what is in the planners, which are given by sliding
    window. Results are new arrays as always: who captures must see to it that their memory stays.
    """

    def __init__(self, planners: dict[int | None, attention.DevicePlanner]) -> None:
        self._planners = planners

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def upload(self, array: Array) -> Array:
        return array  # it is there

    def index(self, *_: Array) -> None:
        """Plans the attention of all layers."""
        for planner in self._planners.values():
            planner.launch()

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
        out = cuda.empty((qkv.shape[0], num_heads, qkv.shape[2]), qkv.dtype)
        planner = next(iter(self._planners.values()))
        batch = planner.q_indptr, planner.seq_lens, planner.page_indptr, planner.page_indices
        cuda.launch_rope_append(qkv, rope_table, k_pool, v_pool, kv_scales, batch, num_heads, qk_gains, eps, out)
        return out

    def paged_attention(
        self, q: Array, k_pool: Array, v_pool: Array, kv_scales: Array | None, index: None, scale: float, window: int | None
    ) -> Array:
        out = cuda.empty(q.shape, q.dtype)
        return attention.run(self._planners[window], q, k_pool, v_pool, scale, out=out, kv_scales=kv_scales)


def takes_products() -> bool:
    """Whether a graph can hold cuBLAS's products here, found out by capturing one; if not, the log says why."""
    streams = jit.import_cupy().cuda
    stream, x = streams.Stream(non_blocking=True), cuda.upload(np.zeros((8, 8)), "bfloat16")
    streams.get_current_stream().synchronize()  # products of one stream at a time
    try:
        with stream:
            cuda.linear(x, x)  # all that it needs is loaded
            stream.synchronize()
            stream.begin_capture()
            try:
                cuda.linear(x, x)
            finally:
                stream.end_capture()
    except (RuntimeError, DeviceError) as error:
        logger.warning("decode steps are launched one operation at a time, because cuBLAS cannot be captured: %s", error)
        return False
    return True
