"""The operations of `ops.cuda` such that a row's result does not depend on the other rows of its batch, to the bit.

Every product is by cuda_src/weight_stream.cu, which sums alike for any number of rows, and attention has parts of fixed borders
and tiles of one class. All else goes row by row as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.errors import DeviceError
from cupaged.ops import cuda, products

Array = Any  # cupy.ndarray


class BatchInvariant:
    """Takes the place of the module; for models that `products.takes`."""

    def __init__(self) -> None:
        self._rooms: dict[int, products.Room] = {}  # by rows
        self._done = cuda.upload(np.zeros(1, np.uint32))  # counts tiles, and nobody looks
        for operation in (cuda.linear, cuda.norm_linear, cuda.norm_swiglu, cuda.linear_add):
            setattr(self, operation.__name__, functools.partial(operation, gemm=self._gemm))
        self.index = functools.partial(cuda.Index, batch_invariant=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def compiling(self, dtype: str, kv_dtype: str, head_dim: int, block_size: int, qk_norm: bool, also: tuple = ()) -> Any:
        """As in `ops.cuda`, with what these operations take more."""
        kinds = attention.kernel.variants_of_device(dtype, head_dim, kv_dtype, block_size, batch_invariant=True)
        more = [*products.variants(dtype, dtype), *kinds, *also]
        return cuda.compiling(dtype, kv_dtype, head_dim, block_size, qk_norm, more)

    def check(self) -> None:
        """DeviceError if a product has waited in vain for its parts since the last look, in what the device is done with."""
        for room in self._rooms.values():
            if room.flag[0]:
                room.reset()
                raise DeviceError(products.WAITED_IN_VAIN)

    def _gemm(self, x: Array, weight: Array, out: Array, add: bool) -> None:
        dtype, width, bytes_of_row = x.dtype.name, weight.shape[0], x.shape[1] * x.dtype.itemsize
        finish = products.ADD if add else products.STORE_FLOAT if out.dtype == np.float32 else products.STORE
        for first in range(0, x.shape[0], products.MOST_ROWS):
            count = min(products.MOST_ROWS, x.shape[0] - first)
            rows = products.rows_for(count)
            if rows not in self._rooms:
                self._rooms[rows] = products.Room(rows)
            source, target = x.data.ptr + first * bytes_of_row, out.data.ptr + first * width * out.dtype.itemsize
            one = products.product(finish, source, count, weight, target, self._done.data.ptr, rows, dtype)
            self._rooms[rows].launch([one], count, dtype, dtype)
