"""The operations of `ops.cuda` such that a row's result does not depend on the other rows of its batch, to the bit.

Every product is by one kernel of cuda_src/weight_stream.cu, whatever the number of rows, and attention has parts of fixed
borders and tiles of one class. All else goes row by row as it is.
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
        self._room = products.Room(products.MOST_ROWS)  # for any number: the kernels for fewer sum in another order
        self._done = cuda.upload(np.zeros(1, np.uint32))  # counts tiles, and nobody looks
        for operation in (cuda.linear, cuda.norm_linear, cuda.norm_swiglu, cuda.linear_add):
            setattr(self, operation.__name__, functools.partial(operation, gemm=self._gemm))
        self.index = functools.partial(cuda.Index, batch_invariant=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def compiling(self, dtype: str, kv_dtype: str, head_dim: int, block_size: int, qk_norm: bool, also: tuple = ()) -> Any:
        """As in `ops.cuda`, with what these operations take more."""
        kinds = attention.kernel.variants_of_device(dtype, head_dim, kv_dtype, block_size, batch_invariant=True)
        more = [products.variants(dtype, dtype)[-1], *kinds, *also]
        return cuda.compiling(dtype, kv_dtype, head_dim, block_size, qk_norm, more)

    def check(self) -> None:
        """DeviceError if a product has waited in vain for its parts since the last look, in what the device is done with."""
        if self._room.flag[0]:
            self._room.reset()
            raise DeviceError(products.WAITED_IN_VAIN)

    def _gemm(self, x: Array, weight: Array, out: Array, add: bool) -> None:
        dtype, width, bytes_of_row = x.dtype.name, weight.shape[0], x.shape[1] * x.dtype.itemsize
        finish = products.ADD if add else products.STORE_FLOAT if out.dtype == np.float32 else products.STORE
        rows = self._room.rows
        for first in range(0, x.shape[0], rows):
            count = min(rows, x.shape[0] - first)
            source, target = x.data.ptr + first * bytes_of_row, out.data.ptr + first * width * out.dtype.itemsize
            one = products.product(finish, source, count, weight, target, self._done.data.ptr, rows)
            self._room.launch([one], count, dtype, dtype)
