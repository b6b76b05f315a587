"""Matrices of weights kept as codes of 8 or 4 bits, and what NumPy makes of such codes, those of K/V among them.

A matrix [out, in] of each kind, its scales float16:

    int8  code * scale: a code from -127 to 127, a scale for each row, the least float16 no less than (largest magnitude) / 127
    fp8   the same with the bits of a float8_e4m3, as uint8, and 448 in the place of 127
    int4  code * scale + zero: a code from 0 to 15, a scale and a zero for each group of a row, which is the largest of 128, 64
          and 32 columns that divides it. zero is the largest float16 no more than the least weight of the group, scale the
          least one no less than (largest weight - zero) / 15

Scales are rounded upwards, and zeros downwards, so that every weight is within reach of the codes: what is left of a weight is
at most scale / 2 away from it (of fp8, at most 1/16 of it or scale / 1024). Where scale is 0, all codes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import InvalidArgument

Array = Any  # of NumPy or CuPy

KINDS = ("int8", "fp8", "int4")
INT8_MAX, FP8_MAX, INT4_MAX = 127, 448, 15
_GROUPS = (128, 64, 32)
_MULTIPLE = 16  # of columns, for 8 bits: as many bytes as a kernel reads at once
_FLOAT16_MAX = 65504
_FP8 = ml_dtypes.float8_e4m3fn
_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)  # of the codes of fp8
_SLICE = 1 << 19  # weights that are taken at once: few enough for a cache, and for memory to be had without the system


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """What `ops.quantize` makes of a matrix [out, in]; the products of `ops` take it in the place of a weight.

    codes, scales: arrays of the device; each implementation of the operations has its own order of them.
    """

    kind: str
    shape: tuple[int, int]
    codes: Array
    scales: Array

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def check_kind(kind: object) -> None:
    """InvalidArgument unless it is one of KINDS."""
    if kind not in KINDS:
        raise InvalidArgument(
            f"quantization is {kind!r}; give {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}, or leave it out"
        )


def group_of(kind: str, inner: int, name: str = "a matrix") -> int:
    """Columns that share a scale, of rows of so many; InvalidArgument where the kind is unknown or not for such rows."""
    check_kind(kind)
    if kind != "int4":
        if inner % _MULTIPLE:
            cause = f"quantization {kind!r} takes rows of a multiple of {_MULTIPLE} weights, and those of {name} have {inner}"
            raise InvalidArgument(f"{cause}; leave quantization out")
        return inner
    group = next((group for group in _GROUPS if inner % group == 0), None)
    if group is None:
        cause = f"quantization 'int4' takes rows of a multiple of {_GROUPS[-1]} weights, and those of {name} have {inner}"
        raise InvalidArgument(f"{cause}; take 'int8' or 'fp8', or leave quantization out")
    return group


def bytes_of_matrix(kind: str, rows: int, inner: int) -> int:
    """Bytes of codes and scales."""
    if kind != "int4":
        return rows * (inner + 2)
    return rows * (inner // 2 + 4 * (inner // group_of(kind, inner)))


# ---- NumPy


def quantize(matrix: np.ndarray, kind: str) -> QuantizedMatrix:
    """A matrix [out, in] as codes of a kind, as the module's docstring says; InvalidArgument where `in` is not for it.

    Here codes are [out, in] of int8 or uint8, in order, and scales [out]; int4's codes are uint8 [out, in / 2], an even column
    in the lower half of a byte and the next one in the upper, and its scales [out, in / group, 2]: scale, zero.
    """
    rows, inner = matrix.shape
    group = group_of(kind, inner)
    if kind == "int4":
        codes, scales = np.empty((rows, inner // 2), np.uint8), np.empty((rows, inner // group, 2), np.float16)
    else:
        codes, scales = np.empty((rows, inner), np.int8 if kind == "int8" else np.uint8), np.empty(rows, np.float16)
    step = max(1, _SLICE // inner)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        weights = matrix[part].astype(np.float32)
        if kind == "int4":
            codes[part], scales[part] = _to_int4(weights.reshape(len(weights), -1, group))
        elif kind == "int8":
            codes[part], scales[part] = to_int8(weights)
        else:
            scales[part] = _no_less(np.abs(weights).max(axis=-1) / FP8_MAX)
            codes[part] = to_fp8(weights, _divisor(scales[part], weights.dtype)[:, None])
    return QuantizedMatrix(kind, (rows, inner), codes, scales)


def dequantize(matrix: QuantizedMatrix, dtype: str, first: int = 0, count: int | None = None) -> np.ndarray:
    """Rows first .. first + count of what a matrix stands for, by default all -> [count, in] of `dtype`."""
    part = slice(first, None if count is None else first + count)
    codes, scales = matrix.codes[part], matrix.scales[part].astype(np.float32)
    if matrix.kind == "int8":
        weights = codes.astype(np.float32) * scales[:, None]
    elif matrix.kind == "fp8":
        weights = _VALUES.take(codes) * scales[:, None]
    else:
        both = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.float32)
        group = matrix.shape[1] // scales.shape[1]
        weights = both.reshape(*scales.shape[:2], group) * scales[..., :1] + scales[..., 1:]
    return weights.reshape(len(codes), matrix.shape[1]).astype(dtype, copy=False)


def product(x: np.ndarray, matrix: QuantizedMatrix) -> np.ndarray:
    """x [T, in] times what the matrix [out, in] stands for, transposed -> [T, out]; no more than a slice is ever there."""
    rows, inner = matrix.shape
    out, step = np.empty((len(x), rows), x.dtype), max(1, _SLICE // inner)
    for first in range(0, rows, step):
        out[:, first : first + step] = x @ dequantize(matrix, x.dtype, first, step).T
    return out


def to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes int8 [..., width] and scales float16 [...] of rows."""
    scale = _no_less(np.abs(x).max(axis=-1) / INT8_MAX)
    return np.clip(np.rint(x / _divisor(scale, x.dtype)[..., None]), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def to_fp8(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The codes uint8 of x / scale, what is too large as 448."""
    return np.clip(x / scale, -FP8_MAX, FP8_MAX).astype(_FP8).view(np.uint8)


def of_fp8(codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What codes of fp8 stand for, less the scale."""
    return codes.view(_FP8).astype(dtype)


def _to_int4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [rows, in / 2] and scales float16 [rows, groups, 2] of weights [rows, groups, group]."""
    least = np.clip(groups.min(axis=-1), -_FLOAT16_MAX, _FLOAT16_MAX) + np.float32(0)  # + 0: no -0
    zero = -_no_less(-least)
    from_zero = groups - zero.astype(np.float32)[..., None]
    scale = _no_less(from_zero.max(axis=-1) / INT4_MAX + np.float32(0))
    codes = np.clip(np.rint(from_zero / _divisor(scale, groups.dtype)[..., None]), 0, INT4_MAX).astype(np.uint8)
    codes = codes.reshape(len(groups), -1, 2)
    return codes[..., 0] | codes[..., 1] << 4, np.stack([scale, zero], axis=-1)


def _no_less(x: np.ndarray) -> np.ndarray:
    """The least float16 no less than x; 65504 where that is too small."""
    x = np.minimum(x, _FLOAT16_MAX)
    nearest = x.astype(np.float16)
    return np.where(nearest < x, np.nextafter(nearest, np.float16(np.inf)), nearest)


def _divisor(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.where(scale == 0, 1, scale.astype(dtype))  # where it is 0, so is all that it divides
