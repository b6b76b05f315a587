"""The types that a model computes in and that its KV pool keeps: which are meant, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged.checkpoint.config import ModelConfig
from cupaged.errors import InvalidArgument

_STORED_AS = {"fp8": "uint8"}  # where no array can have the type itself
_INT8_SCALE_BYTES = np.dtype("float16").itemsize


def choose_dtype(dtype: str, weights_dtype: str, ops: ModuleType) -> str:
    """The type of weights and activations: "auto" means that of the weights if `ops` can compute in it, else its first."""
    if dtype == "auto":
        return weights_dtype if weights_dtype in ops.DTYPES else ops.DTYPES[0]
    if dtype not in ops.DTYPES:
        raise InvalidArgument(f"dtype is {dtype!r}; on this device give {_choice(ops.DTYPES)}")
    return dtype


def choose_kv_dtype(kv_cache_dtype: str, dtype: str, ops: ModuleType) -> str:
    """The type of the KV pool beside activations of `dtype`, which "auto" stands for."""
    known = dict.fromkeys([dtype, *ops.KV_DTYPES])
    if kv_cache_dtype == "auto":
        return dtype
    if kv_cache_dtype not in known:
        raise InvalidArgument(f"kv_cache_dtype is {kv_cache_dtype!r}; beside dtype {dtype} give {_choice(known)}")
    return kv_cache_dtype


def _choice(names: Iterable[str]) -> str:
    return " or ".join(map(repr, ["auto", *names]))


def stored_as(kv_dtype: str) -> str:
    """The dtype of the arrays that hold a KV type."""
    return _STORED_AS.get(kv_dtype, kv_dtype)


def bytes_of(dtype: str) -> int:
    """Bytes of one number of a type of weights, activations or KV."""
    return np.dtype(stored_as(dtype)).itemsize


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of K and V that one token keeps, over all layers, int8's scales among them."""
    head = config.head_dim * bytes_of(kv_dtype) + (_INT8_SCALE_BYTES if kv_dtype == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * head
