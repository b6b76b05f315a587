"""The limits of a machine, and what it is called: how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cupaged.llm import LLM

SWEEP_BYTES = 2**31  # several times the largest caches


def weight_and_kv_bytes(llm: LLM) -> tuple[int, int]:
    """Bytes of weights that one decoded token reads, and bytes of K/V for each token before it."""
    from cupaged.checkpoint.weights import expected_tensors
    from cupaged.engine.dtypes import bytes_of, kv_bytes_per_token

    shapes = expected_tensors(llm.config)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if not llm.config.tie_word_embeddings:  # then a token reads one row of the table; tied, the table is the head as well
        count -= int(np.prod(shapes["model.embed_tokens.weight"]))
    return count * bytes_of(llm.dtype), kv_bytes_per_token(llm.config, llm.kv_cache_dtype)


def read_limit(device: str, model_bytes: int, threads: int | None = None) -> float:
    """Bytes a second that plain reads of the device's memory reach, the best of several ways and sizes.

    CPU: a matrix-vector product by BLAS and a search for the maximum, over 2 GiB and over as much as the model's weights.
    The second size matters where a shared L3 of hundreds of MB keeps a part of the weights from one token to the next: no
    figure of decode may then be held to memory alone. GPU: a sum over 4 GiB, and a copy of them, whose bytes count twice.
    """
    if device != "cpu":
        return _gpu_read_limit(int(device.partition(":")[2] or 0))
    import psutil
    from threadpoolctl import threadpool_limits

    threads = threads or os.cpu_count()
    best = 0.0
    for size in (min(SWEEP_BYTES, psutil.virtual_memory().available // 2), model_bytes):
        matrix = np.ones((max(size // 4096 // threads, 1) * threads, 1024), np.float32)
        parts = matrix.reshape(threads, -1)
        with threadpool_limits(threads):
            best = max(best, matrix.nbytes / _best_seconds(lambda m=matrix: m @ m[0]))
        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            best = max(
                best, matrix.nbytes / _best_seconds(lambda p=parts, pool=pool: list(pool.map(lambda part: part.max(), p)))
            )
    return best


def _gpu_read_limit(index: int) -> float:
    import cupy

    with cupy.cuda.Device(index):
        x = cupy.ones(min(2**32, cupy.cuda.runtime.memGetInfo()[0] // 4) // 4, cupy.float32)
        y = cupy.empty_like(x)

        def copy() -> None:
            cupy.copyto(y, x)
            cupy.cuda.get_current_stream().synchronize()

        return max(x.nbytes / _best_seconds(lambda: x.sum().get()), 2 * x.nbytes / _best_seconds(copy))


def product_limit(llm: LLM, threads: int | None = None) -> float:
    """Floating-point operations a second of one large matrix product in the model's dtype, by the library that prefill uses."""
    from threadpoolctl import threadpool_limits

    if llm.device == "cpu":
        from cupaged.ops import numpy as ops
    else:
        from cupaged.ops import cuda as ops
    n = 2048 if llm.device == "cpu" else 8192
    with ops.device(int(llm.device.partition(":")[2] or 0)), threadpool_limits(threads):
        a = ops.upload(np.random.default_rng().standard_normal((n, n), np.float32), llm.dtype)  # a GPU multiplies ones faster
        row = ops.upload(np.zeros(1, np.int32))
        return 2 * n**3 / _best_seconds(lambda: ops.download(ops.embedding(row, ops.linear(a, a))))


def _best_seconds(action: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up, and the best is never the first touch of the memory
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(device: str, threads: int | None) -> str:
    """What a result file calls the machine: the GPU's name, or the CPU's and what it runs under."""
    if device != "cpu":
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(int(device.partition(":")[2] or 0))
        return properties["name"].decode()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {threads or os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}"
