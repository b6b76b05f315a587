"""Launches of cuda_src/weight_stream.cu: up to four products, one after another, with up to 64 rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cupaged.attention.planner import DECODE_ROWS
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit, tensor_map
from cupaged.cuda.launch import launch_dependent
from cupaged.ops import cuda
from cupaged.ops.quantized import QuantizedMatrix

Array = Any  # cupy.ndarray

SOURCE, NAME = "weight_stream.cu", "weight_stream"
STRIP = 8  # rows of weights that a CTA takes at once
_BITS = {None: 16, "int8": 8, "fp8": 8, "int4": 4}  # of a weight, by the kind of its matrix; None: not quantised
_ROWS = (8, 16, 32, 64)  # of x, that there are kernels for
_STAGE_STRIPS, _TILE_ROWS = 4, 192
_CLUSTER = {8: 1, 16: 1, 32: 1, 64: 2}  # CTAs that share what they read of x, by its rows
_MOST_SHARED = 227 << 10  # bytes, of an sm_90
MOST_ROWS = max(_ROWS)
MOST_PRODUCTS = 4
WAITED_IN_VAIN = (
    "a kernel waited in vain for another part of the step, and its results are wrong; try once more, and if it happens again "
    "report it, with the output of cupaged info"
)
STORE, STORE_FLOAT, SWIGLU, ADD, QKV = range(5)

PRODUCT = np.dtype(
    [(name, tensor_map.DTYPE) for name in ("weights", "x")]
    + [(name, "<u8") for name in ("out", "bias", "gain", "normed", "squares", "x_squares", "done", "scales")]
    + [(name, "<i4") for name in ("num_rows", "inner", "x_parts", "finish")]
    + [("eps", "<f4"), ("reserved", "<u4", 11)]
)
OF_APPEND = ["rope_table", "k_pool", "v_pool", "kv_scales", "seq_lens", "page_indptr", "page_indices"]
SIZES_OF_APPEND = ["num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_shift"]
CHAIN = np.dtype(
    [("products", PRODUCT, MOST_PRODUCTS)]
    + [(name, "<u8") for name in ("flag", *OF_APPEND)]
    + [(name, "<i4") for name in (*SIZES_OF_APPEND, "padding", "num_products", "num_tokens")]
    + [("reserved", "<u4", 8)]
)


def variants(
    dtype: str, kv_dtype: str, kinds: Iterable[str | None] = (None,), most_rows: int = MOST_ROWS
) -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) for up to so many rows and every kind of weights, where pools hold arrays of kv_dtype."""
    needed = _ROWS[: _ROWS.index(rows_for(most_rows)) + 1]
    return [(SOURCE, NAME, _defines(dtype, kv_dtype, kind, rows)) for kind in kinds for rows in needed]


def _defines(dtype: str, kv_dtype: str, kind: str | None, rows: int) -> dict[str, int]:
    stages, x_stages, _ = _layout(_BITS[kind], rows)
    codes = {} if kind is None else {f"WEIGHT_{kind.upper()}": 1}
    cluster = {"CLUSTER": _CLUSTER[rows]} if _CLUSTER[rows] > 1 else {}
    kv_codes = {"KV_FP8": 1} if kv_dtype == "uint8" else {}
    return {**cuda.DTYPE_DEFINES[dtype], "TOKENS": rows, **codes, "STAGES": stages, "X_STAGES": x_stages, **cluster, **kv_codes}


def shared_bytes(defines: dict[str, int]) -> int:
    """Dynamic shared memory of a CTA: the size of `struct Shared`."""
    bits = 4 if "WEIGHT_INT4" in defines else 8 if {"WEIGHT_INT8", "WEIGHT_FP8"} & set(defines) else 16
    return _layout(bits, defines["TOKENS"])[2]


def _slice(bits: int, rows: int) -> int:
    """What of the inner dimension is in shared memory at once, as stream_products.cuh says."""
    return 256 if rows > 16 or bits == 16 else 512 if rows > 8 or bits == 8 else 1024


def _is_wide(bits: int, rows: int) -> bool:
    """Whether wgmma multiplies, as stream_products.cuh says."""
    return rows >= 16 and bits == 16


def _layout(bits: int, rows: int) -> tuple[int, int, int]:
    """Stages of weights, as many as there is room for, and of x; bytes of shared memory."""
    width = _slice(bits, rows)
    x_slice, scales = 2 * rows * width, 4 * _STAGE_STRIPS * STRIP * (width // 128) if bits == 4 else 0
    stage = _STAGE_STRIPS * STRIP * width * bits // 8 + scales
    x_stages = min(max((32 << 10) // x_slice, 3), 6)
    per_row = 2 * (2 + (bits == 8))
    rest = x_stages * (x_slice + 16) + 16 * MOST_PRODUCTS + 4 * (MOST_PRODUCTS + 2) * rows + per_row * _TILE_ROWS
    if rows < 64 and not _is_wide(bits, rows):  # of sums that are finished
        rest += 4 * (64 * (_TILE_ROWS // 2 + 4) + _TILE_ROWS // 32 * rows)
    stages = (_MOST_SHARED - rest) // (stage + 16)
    return stages, x_stages, -(-(rest + stages * (stage + 16)) // 1024) * 1024


def takes(config: ModelConfig, quantization: str | None = None) -> bool:
    """Whether a model's products can be computed by launches on the current device: one of sm_90, where they were measured."""
    device = jit.import_cupy().cuda.Device()
    block = 1024 // _BITS[quantization]  # weights that a box has of a row
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    fits = all(width % block == 0 for width in widths) and config.num_heads // config.num_kv_heads <= DECODE_ROWS
    return fits and int(device.compute_capability) == 90


def rows_for(num_tokens: int) -> int:
    """The rows of x, of those that there are kernels for, that so many tokens take."""
    return next(rows for rows in _ROWS if num_tokens <= rows)


def kind_of(weight: Array | QuantizedMatrix) -> str | None:
    return weight.kind if isinstance(weight, QuantizedMatrix) else None


class Room:
    """What launches of so many rows need: as many CTAs as there are SMs, and a place to say that one was waited for in vain."""

    def __init__(self, rows: int) -> None:
        self.rows, self.num_ctas = rows, _num_ctas() // _CLUSTER[rows] * _CLUSTER[rows]
        self.flag = cuda.pinned((1,), "uint32")  # where the device can write to and the host look without waiting

    def reset(self) -> None:
        """After a launch that has failed: as if none had been."""
        self.flag[0] = 0

    def num_parts(self, weight: Array) -> int:
        """CTAs that have rows of a product that adds to the residual."""
        return min(self.num_ctas, -(-weight.shape[0] // STRIP))

    def launch(
        self,
        products: list[dict],
        num_tokens: int,
        dtype: str,
        kv_dtype: str,
        kind: str | None = None,
        append: dict | None = None,
    ) -> None:
        """Queue up to four products with weights of one kind, each as `product` makes them and its `done` count zero."""
        chain = np.zeros((), CHAIN)
        for target, values in zip(chain["products"], products, strict=False):
            for name, value in values.items():
                target[name] = value
        chain["flag"] = self.flag.ctypes.data
        for name, value in (append or {}).items():
            chain[name] = value
        chain["num_products"], chain["num_tokens"] = len(products), num_tokens
        defines = _defines(dtype, kv_dtype, kind, self.rows)
        size, kernel = shared_bytes(defines), jit.kernel(SOURCE, NAME, **defines)
        kernel.max_dynamic_shared_size_bytes = size
        bits = _BITS[kind]
        threads = 32 * (3 + (8 if self.rows < 64 or _is_wide(bits, self.rows) else 4))  # warps that bring, and that multiply
        launch_dependent(kernel, (self.num_ctas,), (threads,), (chain,), shared_mem=size, cluster=_CLUSTER[self.rows])


def product(
    finish: int, x: int, x_rows: int, weight: Array | QuantizedMatrix, out: int, done: int, rows: int, **values: float
) -> dict:
    """PRODUCT of x, x_rows rows of 16-bit scalars at an address, and a weight, for a kernel of so many rows."""
    num_rows, inner = weight.shape
    kind = kind_of(weight)
    bits = _BITS[kind]
    width, codes = _slice(bits, rows), weight if kind is None else weight.codes
    return {
        "weights": tensor_map.encode_slices(codes.data.ptr, num_rows, inner * bits // 8, STRIP, width * bits // 8),
        "x": tensor_map.encode_slices(x, x_rows, 2 * inner, rows, 2 * width // _CLUSTER[rows]),
        "scales": 0 if kind is None else weight.scales.data.ptr,
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
