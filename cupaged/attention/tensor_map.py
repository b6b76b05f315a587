"""Tensor maps: how the copy engine of sm_90 is told of a pool, by the driver's cuTensorMapEncodeTiled."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from cupaged.errors import DeviceError

DTYPE = np.dtype([("opaque", "<u8", 16)])  # struct TensorMap of cuda_src/ptx.cuh, passed by value
COLUMNS, ROWS = (
    64,
    8,
)  # of an atom of wgmma's operands: rows of 128 bytes, as far as the swizzle goes, and as many as it turns through
_DATA_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _FILL_ZEROS = 0, 3, 3, 0


@functools.lru_cache(maxsize=4096)
def encode(address: int, rows: int, columns: int, box_rows: int, dtype: str) -> np.ndarray:
    """The map of an array [rows, columns] of 16-bit elements at a device address, taken as [rows / 8, columns / 64, 8, 64].

    A box is box_rows whole rows; in shared memory it is atom by atom, each 8 x 64 and swizzled by 128 bytes.

    It says nothing but these numbers, so that it can be kept. DeviceError where the driver knows no tensor maps.
    """
    room = (ctypes.c_uint64 * 24)()  # the map must begin at a multiple of 64 bytes
    start = ctypes.addressof(room) + -ctypes.addressof(room) % 64
    halves = columns // COLUMNS
    # the innermost dimension comes first, and has no stride
    dims = (ctypes.c_uint64 * 4)(COLUMNS, ROWS, halves, rows // ROWS)
    strides = (ctypes.c_uint64 * 3)(2 * columns, 2 * COLUMNS, 2 * columns * ROWS)
    box, steps = (ctypes.c_uint32 * 4)(COLUMNS, ROWS, halves, box_rows // ROWS), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise DeviceError("the NVIDIA driver knows no tensor maps; update it to one for CUDA 12") from error
    target, base, kind = ctypes.c_void_p(start), ctypes.c_void_p(address), _DATA_TYPES[dtype]
    how = (_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _FILL_ZEROS)
    result = function(target, kind, 4, base, dims, strides, box, steps, *how)
    if result:
        raise DeviceError(f"the driver refuses a tensor map of {rows} x {columns} (error {result}); use a smaller pool")
    return np.frombuffer(ctypes.string_at(start, DTYPE.itemsize), DTYPE).reshape(())
