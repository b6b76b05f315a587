"""The KV pool: its arrays on the device, and how large they may be."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np

from cupaged.checkpoint.config import ModelConfig
from cupaged.engine.dtypes import kv_bytes_per_token, stored_as
from cupaged.errors import InvalidArgument, OutOfMemory

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CPU_SHARE = 0.25  # of the memory that is free: the rest of the machine is in use by others


class KVPool:
    """`k` and `v`, each `[num_layers, num_kv_heads, num_blocks, block_size, head_dim]`, and the `scales` of 8-bit types.

    Those are float16 `[num_layers, num_kv_heads, num_blocks, block_size, 2]` of int8 (K, V) and float32 `[num_layers,
    num_kv_heads, 2]` of fp8, all 1; None of other types. `ops.numpy` says what they mean.
    """

    def __init__(self, ops: ModuleType, config: ModelConfig, kv_dtype: str, num_blocks: int, block_size: int) -> None:
        slots = (config.num_layers, config.num_kv_heads, num_blocks, block_size)
        self.k, self.v = (ops.empty((*slots, config.head_dim), stored_as(kv_dtype)) for _ in range(2))
        self.scales = None
        if kv_dtype == "int8":
            self.scales = ops.empty((*slots, 2), "float16")
        elif kv_dtype == "fp8":
            self.scales = ops.upload(np.ones((*slots[:2], 2), np.float32))
        self.num_blocks, self.block_size = num_blocks, block_size
        self.bytes = num_blocks * block_size * kv_bytes_per_token(config, kv_dtype)
        # What belongs to a block is at its index of the third axis of these: to copy a block is to copy that of each.
        self.by_block = [self.k, self.v] + ([self.scales] if kv_dtype == "int8" else [])


def parse_bytes(size: int | str, name: str = "kv_memory") -> int:
    """4096, "4096", "24MB" (10^6), "24MiB" (2^20), "1.5GB" -> bytes."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise InvalidArgument(f"{name} is {size!r}; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def blocks_that_fit(
    ops: ModuleType,
    config: ModelConfig,
    kv_dtype: str,
    block_size: int,
    max_tokens: int,
    kv_memory: int | str | None,
    gpu_memory_utilization: float,
    reserved_bytes: int,
) -> int:
    """Number of blocks of the pool, block 0 included, once the weights are on the device.

    `kv_memory` decides if given. Otherwise it is what `max_tokens` tokens need, at most a quarter of the free memory of a
    CPU, or what `gpu_memory_utilization` of a GPU's memory leaves after all that is in use and `reserved_bytes`.
    """
    block_bytes = kv_bytes_per_token(config, kv_dtype) * block_size
    free, total = ops.free_memory()
    if kv_memory is not None:
        budget = parse_bytes(kv_memory)
        if budget < 2 * block_bytes:
            cause = f"kv_memory of {budget} bytes holds no block: one takes {block_bytes} and another is reserved"
            raise InvalidArgument(f"{cause}; give {2 * block_bytes} or more")
        if budget > free:
            raise OutOfMemory(f"kv_memory asks for {budget / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; ask for less")
        return budget // block_bytes
    on_cpu = "float32" in ops.DTYPES
    budget = int(free * _CPU_SHARE) if on_cpu else free - int(total * (1 - gpu_memory_utilization)) - reserved_bytes
    if budget < 2 * block_bytes:
        cause = f"{free / 1e9:.2f} GB of memory are left beside the weights, too little for a KV pool"
        raise OutOfMemory(f"{cause}; free memory or take a smaller model")
    return int(min(budget // block_bytes, -(-max_tokens // block_size) + 1))


def activation_bytes(config: ModelConfig, step_tokens: int, max_num_seqs: int, max_draft: int = 0) -> int:
    """What steps need beside weights and pool, estimated high: eight hidden-sized and four FFN-sized arrays, and logits.

    The graphs of decode steps share as much for max_num_seqs rows, and take it once more while one is captured; but those of
    up to 64 rows may have theirs each, and are for less than 4 times 64 rows together.
    """
    width = 8 * max(config.hidden_size, config.num_heads * config.head_dim) + 4 * config.intermediate_size
    captured = 2 * max_num_seqs + 4 * min(max_num_seqs, 64)
    logits = 2 * max_num_seqs * (1 + max_draft) + captured
    return 4 * ((step_tokens + captured) * width + logits * config.vocab_size) + 2**28


def check_block_size(block_size: int) -> None:
    """InvalidArgument unless `block_size` is a power of two from 1 to 256."""
    if not isinstance(block_size, (int, np.integer)) or block_size not in [2**i for i in range(9)]:
        raise InvalidArgument(f"block_size is {block_size!r}; give a power of two from 1 to 256")
