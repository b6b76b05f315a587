"""What `run` is given, checked against the plan and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.attention.planner import LEAST_PAGE
from cupaged.errors import InvalidArgument

Array = Any  # cupy.ndarray

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
KV_DTYPES = ("uint8", "int8")  # beside that of q; uint8 holds float8_e4m3


def check_array(ndarray: type, device: int, name: str, array: Array, shape: tuple[int, ...] | None, dtype: np.dtype) -> None:
    """InvalidArgument unless it is an array of this class (CuPy's), device, shape (None: any) and dtype, and C-contiguous."""
    if not isinstance(array, ndarray):
        raise InvalidArgument(f"{name} is a {type(array).__module__}.{type(array).__name__}; give a CuPy array")
    if array.shape != shape and shape is not None:
        raise InvalidArgument(f"{name} has shape {array.shape}; give {shape}, as the plan was made for")
    if array.dtype != dtype:
        raise InvalidArgument(f"{name} is {array.dtype.name}; give {dtype.name}")
    if not array.flags.c_contiguous:
        raise InvalidArgument(f"{name} has strides {array.strides}; give a C-contiguous array")
    if array.device.id != device:
        raise InvalidArgument(f"{name} is on device {array.device.id}; give it on the current one, {device}")


def refuse_unaligned(addresses: tuple[int, ...]) -> None:
    """Of q, k_pool, v_pool and out, one of which is no multiple of 16."""
    name, address = next(pair for pair in zip(("q", "k_pool", "v_pool", "out"), addresses, strict=True) if pair[1] % 16)
    raise InvalidArgument(f"{name} begins at address {address:#x}; give an array that begins at a multiple of 16 bytes")


def kv_dtype(
    plan: Any,
    dtype: np.dtype,
    head_dim: int,
    kv: np.dtype | None,
    no_mask: bool,
    no_scales: bool,
    no_k_pages: bool,
    no_v_pages: bool,
) -> np.dtype:
    """The dtype of K/V, from those of q and k_pool (None without pools); InvalidArgument where arguments do not go together."""
    name = dtype.name
    if name not in DTYPES:
        raise InvalidArgument(f"q is {name}; give {' or '.join(DTYPES)}")
    if head_dim not in HEAD_DIMS:
        raise InvalidArgument(f"q has head_dim {head_dim}; give 64 or 128")
    if no_k_pages != no_v_pages:
        given, missing = ("block_v_ptrs", "block_k_ptrs") if no_k_pages else ("block_k_ptrs", "block_v_ptrs")
        raise InvalidArgument(f"{missing} is None and {given} is not; give both or none")
    if no_k_pages and plan.page_indices is None:
        raise InvalidArgument("block_k_ptrs is None and the plan has no page_indices; give block_k_ptrs and block_v_ptrs")
    if kv is None:
        kv = dtype if no_scales else np.dtype(np.uint8)
    if kv != dtype and kv.name not in KV_DTYPES:
        raise InvalidArgument(f"k_pool is {kv.name}; give {name}, as q is, or int8 or uint8 (float8_e4m3)")
    if kv == np.int8 and no_scales:
        raise InvalidArgument("kv_scales is None and k_pool int8; give float16 [num_kv_heads, num_blocks, block_size, 2]")
    if kv == np.int8 and not no_k_pages:
        raise InvalidArgument("block_k_ptrs is given and K/V are int8; give pools, or K/V of another dtype")
    if kv == dtype and not no_scales:
        raise InvalidArgument(f"kv_scales is given and K/V are {name}; give it with 8-bit K/V only")
    if no_mask != (plan.mask_words is None):
        both = ("None", "a") if no_mask else ("given", "no")
        raise InvalidArgument(f"mask is {both[0]} and the plan has {both[1]} mask_indptr; give both or none")
    if plan.kernel == "sm90" and not (kv != np.int8 and no_mask and no_k_pages and plan.block_size >= LEAST_PAGE):
        what = "int8 K/V" if kv == np.int8 else "pointers" if not no_k_pages else f"pages of fewer than {LEAST_PAGE} tokens"
        raise InvalidArgument(
            f"the plan's prefill_grid is of the sm90 kernel, which takes no {what}; give plan a decode_grid only"
        )
    return kv


def check_addresses(name: str, pages: Array) -> None:
    """Of pages, as far as they are on the host."""
    if type(pages) is np.ndarray and pages.dtype == np.uint64 and (pages % 16).any():
        wrong = pages[pages % 16 > 0][0]
        raise InvalidArgument(f"{name} holds address {wrong:#x}; give multiples of 16")


def page_pointers(cupy: Any, plan: Any, name: str, pages: Array, row_bytes: int) -> Array:
    """The addresses as a kernel reads them, one for each page that the plan knows; row_bytes of a position of a kv head."""
    if pages.size < plan.num_entries:
        raise InvalidArgument(f"{name} has {pages.size} entries; give the {plan.num_entries} of the plan's page table")
    if plan.pointer_rows is None:
        return pages
    entry, slot = (cupy.asarray(column) for column in np.ascontiguousarray(plan.pointer_rows.T))  # pages of one position each
    return pages.reshape(-1)[entry] + slot.astype(np.uint64) * np.uint64(row_bytes)
