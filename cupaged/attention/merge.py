"""merge_states(): attention over two sets of keys, joined."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.cuda import jit
from cupaged.errors import InvalidArgument

Array = Any  # numpy.ndarray or cupy.ndarray

SOURCE, NAME = "merge_states.cu", "merge_states"
THREADS = 256
_DTYPES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}, "float32": {"DTYPE_F32": 1}}


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, out: Array | None = None) -> tuple[Array, Array]:
    """(out, lse) of attention over the keys of a and those of b, which have none in common, from the attention over each.

    out [..., head_dim] and lse [...] (natural log). NumPy arrays are float32 or float64. CuPy arrays are C-contiguous, out
    bfloat16, float16 or float32 with head_dim a multiple of 8, lse float32; the merge is then queued on the current stream.
    `out` receives the result if it is given (CuPy arrays only; it may be out_a or out_b).

    An lse of -inf says that no key was seen: whatever that out holds counts for nothing, and where neither saw any the result
    is 0 and -inf (Milakov and Gimelshein 2018, section 3.1). InvalidArgument where the arrays do not fit each other.
    """
    rows = out_a.shape[:-1]
    for name, array, shape in (("lse_a", lse_a, rows), ("out_b", out_b, out_a.shape), ("lse_b", lse_b, rows)):
        if array.shape != shape:
            raise InvalidArgument(f"{name} has shape {array.shape}; to go with out_a, {out_a.shape}, give {shape}")
    if type(out_a) is not np.ndarray:
        return _on_device(out_a, lse_a, out_b, lse_b, out)
    largest = np.maximum(lse_a, lse_b)
    shift = np.where(largest == -np.inf, 0, largest)
    weight_a, weight_b = np.exp(lse_a - shift), np.exp(lse_b - shift)  # the larger is 1, unless there are no keys at all
    total = weight_a + weight_b
    share = 1 / np.maximum(total, 1)
    merged = _weighted(out_a, weight_a * share) + _weighted(out_b, weight_b * share)
    with np.errstate(divide="ignore"):
        return merged, shift + np.log(total)


def _weighted(out: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """out * weight, and 0 where the weight is: 0 * NaN would be NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(weight[..., None] == 0, 0, out * weight[..., None])


def _on_device(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, out: Array | None) -> tuple[Array, Array]:
    cupy = jit.import_cupy()
    out = cupy.empty(out_a.shape, out_a.dtype) if out is None else out
    lse = cupy.empty(lse_a.shape, np.float32)
    device = cupy.cuda.runtime.getDevice()
    arrays = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out}
    for name, array in arrays.items():
        if not isinstance(array, cupy.ndarray):
            raise InvalidArgument(
                f"{name} is a {type(array).__module__}.{type(array).__name__}; give a CuPy array, as out_a is"
            )
        expected = "float32" if name.startswith("lse") else out_a.dtype.name
        if array.dtype.name != expected or expected not in _DTYPES:
            other = expected if expected in _DTYPES else " or ".join(_DTYPES)
            raise InvalidArgument(f"{name} is {array.dtype.name}; give {other}")
        if not array.flags.c_contiguous:
            raise InvalidArgument(f"{name} has strides {array.strides}; give a C-contiguous array")
        if array.device.id != device:
            raise InvalidArgument(f"{name} is on device {array.device.id}; give it on the current one, {device}")
        if array.data.ptr % 16 and not name.startswith("lse"):
            raise InvalidArgument(f"{name} begins at address {array.data.ptr:#x}; give one that begins at a multiple of 16")
    if out.shape != out_a.shape:
        raise InvalidArgument(f"out has shape {out.shape}; to go with out_a, give {out_a.shape}")
    head_dim = out_a.shape[-1]
    if head_dim % 8:
        raise InvalidArgument(f"out_a has head_dim {head_dim}; give a multiple of 8")
    if out.size:
        num_rows, vector = lse.size, 16 // out.dtype.itemsize
        blocks = -(-out.size // (vector * THREADS))
        arguments = (out_a, lse_a, out_b, lse_b, out, lse, np.int64(num_rows), np.int32(head_dim))
        jit.kernel(SOURCE, NAME, **_DTYPES[out.dtype.name])((blocks, 1, 1), (THREADS, 1, 1), arguments)
    return out, lse
