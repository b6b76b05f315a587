"""Launches of cuda_src/weight_stream.cu: up to four products, one after another, with up to 64 rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.attention.planner import DECODE_ROWS
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit, tensor_map
from cupaged.cuda.launch import launch_dependent
from cupaged.ops import cuda

Array = Any  # cupy.ndarray

SOURCE, NAME = "weight_stream.cu", "weight_stream"
STRIP, SLICE = 8, 256  # rows of weights and part of the inner dimension that are multiplied at once
_STAGE_BYTES, _TILE_STAGES = 4 * STRIP * SLICE * 2, 6
STAGES = {8: (12, 6), 16: (12, 4), 32: (11, 3), 64: (8, 3)}  # of weights and of x, by the rows of x: as many as fit
THREADS = 7 * 32
MOST_ROWS = max(STAGES)
MOST_PRODUCTS = 4
WAITED_IN_VAIN = (
    "a kernel waited in vain for another part of the step, and its results are wrong; try once more, and if it happens again "
    "report it, with the output of cupaged info"
)
STORE, STORE_FLOAT, SWIGLU, ADD, QKV = range(5)

PRODUCT = np.dtype(
    [(name, tensor_map.DTYPE) for name in ("weights", "x")]
    + [(name, "<u8") for name in ("out", "bias", "gain", "normed", "squares", "x_squares", "done")]
    + [(name, "<i4") for name in ("num_rows", "inner", "x_parts", "finish")]
    + [("eps", "<f4"), ("reserved", "<u4", 13)]
)
OF_APPEND = ["rope_table", "k_pool", "v_pool", "kv_scales", "seq_lens", "page_indptr", "page_indices"]
SIZES_OF_APPEND = ["num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_shift"]
CHAIN = np.dtype(
    [("products", PRODUCT, MOST_PRODUCTS)]
    + [(name, "<u8") for name in ("flag", *OF_APPEND)]
    + [(name, "<i4") for name in (*SIZES_OF_APPEND, "padding", "num_products", "num_tokens")]
    + [("reserved", "<u4", 8)]
)


def variants(dtype: str, kv_dtype: str) -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) for every number of rows, where pools hold arrays of kv_dtype."""
    return [(SOURCE, NAME, _defines(dtype, kv_dtype, rows)) for rows in STAGES]


def _defines(dtype: str, kv_dtype: str, rows: int) -> dict[str, int]:
    stages, x_stages = STAGES[rows]
    codes = {"KV_FP8": 1} if kv_dtype == "uint8" else {}
    return {**cuda.DTYPE_DEFINES[dtype], "TOKENS": rows, "STAGES": stages, "X_STAGES": x_stages, **codes}


def shared_bytes(rows: int) -> int:
    """Dynamic shared memory of a CTA: the size of `struct Shared`."""
    stages, x_stages = STAGES[rows]
    slices = stages * _STAGE_BYTES + x_stages * rows * SLICE * 2
    per_token, per_row = 4 * (MOST_PRODUCTS + 2), 2 * 2
    rest = 16 * (stages + x_stages) + 8 * MOST_PRODUCTS + per_token * rows + per_row * _TILE_STAGES * 4 * STRIP
    return slices + -(-rest // 1024) * 1024


def takes(config: ModelConfig) -> bool:
    """Whether a model's products can be computed by launches on the current device: one of sm_90, where they were measured."""
    device = jit.import_cupy().cuda.Device()
    widths = (config.hidden_size, config.intermediate_size)
    fits = all(width % 64 == 0 for width in widths) and config.num_heads // config.num_kv_heads <= DECODE_ROWS
    return fits and int(device.compute_capability) == 90


def rows_for(num_tokens: int) -> int:
    """The rows of x, of those that there are kernels for, that so many tokens take."""
    return next(rows for rows in STAGES if num_tokens <= rows)


class Room:
    """What launches of so many rows need: as many CTAs as there are SMs, and a place to say that one was waited for in vain."""

    def __init__(self, rows: int) -> None:
        self.rows, self.num_ctas = rows, _num_ctas()
        self.flag = cuda.pinned((1,), "uint32")  # where the device can write to and the host look without waiting

    def reset(self) -> None:
        """After a launch that has failed: as if none had been."""
        self.flag[0] = 0

    def num_parts(self, weight: Array) -> int:
        """CTAs that have rows of a product that adds to the residual."""
        return min(self.num_ctas, -(-weight.shape[0] // STRIP))

    def launch(self, products: list[dict], num_tokens: int, dtype: str, kv_dtype: str, append: dict | None = None) -> None:
        """Queue up to four products, each as `product` makes them and its `done` count zero."""
        chain = np.zeros((), CHAIN)
        for target, values in zip(chain["products"], products, strict=False):
            for name, value in values.items():
                target[name] = value
        chain["flag"] = self.flag.ctypes.data
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
        "weights": tensor_map.encode_slices(weight.data.ptr, num_rows, inner, STRIP, SLICE, dtype),
        "x": tensor_map.encode_slices(x, x_rows, inner, rows, SLICE, dtype),
        "out": out,
        "num_rows": num_rows,
        "inner": inner,
        "finish": finish,
        "done": done,
        **values,
    }


def _num_ctas() -> int:
    """One for each SM of the current device: a launch counts on all of them being there."""
    return jit.import_cupy().cuda.Device().attributes["MultiProcessorCount"]
