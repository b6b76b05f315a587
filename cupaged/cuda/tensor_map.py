"""Tensor maps: how the copy engine of sm_90 is told of an array, by the driver's cuTensorMapEncodeTiled."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from cupaged.errors import DeviceError

DTYPE = np.dtype([("opaque", "<u8", 16)])  # struct TensorMap of cuda_src/ptx.cuh, passed by value
# of an atom of wgmma's operands: rows of 128 bytes, as far as the swizzle goes, and as many as it turns through
COLUMNS, ROWS = 64, 8
_BLOCK = 128  # bytes that a swizzle takes of a row
_DATA_TYPES = {"uint8": 0, "float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _FILL_ZEROS = 0, 3, 3, 0


def encode_atoms(address: int, rows: int, columns: int, box_rows: int, dtype: str) -> np.ndarray:
    """The map of an array [rows, columns] of 16-bit elements at a device address, taken as [rows / 8, columns / 64, 8, 64].

    A box is box_rows whole rows; in shared memory it is atom by atom, each 8 x 64 and swizzled by 128 bytes.
    """
    halves = columns // COLUMNS
    sizes, strides = (rows // ROWS, halves, ROWS, COLUMNS), (2 * columns * ROWS, 2 * COLUMNS, 2 * columns)
    return _encode(address, sizes, strides, (box_rows // ROWS, halves, ROWS, COLUMNS), dtype)


def encode_slices(address: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int) -> np.ndarray:
    """The map of an array of rows of bytes at a device address, taken as [row_bytes / 128, rows, 128].

    A box is box_bytes of box_rows rows, both numbers of bytes multiples of 128; in shared memory it is 128 bytes of each row,
    swizzled, after the same of the 128 before. Outside of the array there are zeros.
    """
    sizes, strides = (row_bytes // _BLOCK, rows, _BLOCK), (_BLOCK, row_bytes)
    return _encode(address, sizes, strides, (box_bytes // _BLOCK, box_rows, _BLOCK), "uint8")


@functools.lru_cache(maxsize=4096)
def _encode(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: str) -> np.ndarray:
    """Strides in bytes, of all dimensions but the last. A map says nothing but these numbers, so that it can be kept.

    DeviceError where the driver knows no tensor maps.
    """
    room = (ctypes.c_uint64 * 24)()  # the map must begin at a multiple of 64 bytes
    start = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    rank = len(sizes)  # the driver wants the innermost dimension first
    dims, steps = (ctypes.c_uint64 * rank)(*sizes[::-1]), (ctypes.c_uint64 * (rank - 1))(*strides[::-1])
    boxes, ones = (ctypes.c_uint32 * rank)(*box[::-1]), (ctypes.c_uint32 * rank)(*[1] * rank)
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise DeviceError("the NVIDIA driver knows no tensor maps; update it to one for CUDA 12") from error
    target, base, kind = ctypes.c_void_p(start), ctypes.c_void_p(address), _DATA_TYPES[dtype]
    how = (_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _FILL_ZEROS)
    result = function(target, kind, rank, base, dims, steps, boxes, ones, *how)
    if result:
        raise DeviceError(
            f"the driver refuses a tensor map of {' x '.join(map(str, sizes))} (error {result}); use smaller arrays"
        )
    return np.frombuffer(ctypes.string_at(start, DTYPE.itemsize), DTYPE).reshape(())
