"""The limits of a machine, and what it is called: how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import statistics
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
    """Bytes of weights that one decoded token reads, as they are kept, and of K/V for each token before it."""
    from cupaged.engine.dtypes import kv_bytes_per_token
    from cupaged.model.parameters import bytes_of_a_step

    weight_bytes = bytes_of_a_step(llm.config, llm.dtype, llm.quantization)
    return weight_bytes, kv_bytes_per_token(llm.config, llm.kv_cache_dtype)


def weight_count(llm: LLM) -> int:
    """Weights that a token is multiplied with, however they are kept."""
    from cupaged.model.parameters import bytes_of_a_step

    return bytes_of_a_step(llm.config, llm.dtype) // np.dtype(llm.dtype).itemsize


def read_limit(device: str, model_bytes: int, threads: int | None = None) -> float:
    """Bytes a second that plain reads of the device's memory reach, the best of several ways and sizes.

    CPU: a matrix-vector product by BLAS and a search for the maximum, over 2 GiB and over as much as the model's weights.
    The second size matters where a shared L3 of hundreds of MB keeps a part of the weights from one token to the next: no
    figure of decode may then be held to memory alone. GPU: `gpu_read_limits`.
    """
    if device != "cpu":
        from cupaged.ops import cuda

        with cuda.device(int(device.partition(":")[2] or 0)):
            return max(gpu_read_limits().values())
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


def gpu_read_limits() -> dict[str, float]:
    """Bytes a second that reads of the current GPU reach over 8 GiB, or a third of what is free, by the way of reading.

    "plain": loads of 16 bytes, the best of several grids. "ring", from sm_90 on: bulk copies. The data is random.
    """
    from cupaged.cuda import jit

    cupy = jit.import_cupy()
    size = min(2**33, cupy.cuda.runtime.memGetInfo()[0] // 3) // 2**20 * 2**20
    data, sink = cupy.empty(size, "uint8"), cupy.empty(1, "uint32")
    jit.kernel("limits.cu", "fill")((2048,), (256, 1, 1), (data, np.int64(size // 4), np.uint32(1), np.uint32(0)))
    attributes = cupy.cuda.Device().attributes
    sms = attributes["MultiProcessorCount"]
    plain, args = jit.kernel("limits.cu", "read_plain"), (data, np.int64(size // 16), sink)
    limits = {"plain": size / min(gpu_seconds(lambda n=n: plain((n * sms,), (256, 1, 1), args)) for n in (4, 8, 32))}
    if int(cupy.cuda.Device().compute_capability) >= 90:
        ring, shared = jit.kernel("limits.cu", "read_ring"), 5 * 4 * (8192 + 8)
        ring.max_dynamic_shared_size_bytes = shared
        ring_args = (data, np.int64(size // 8192), sink)
        limits["ring"] = size / gpu_seconds(lambda: ring((sms,), (160, 1, 1), ring_args, shared_mem=shared))
    return limits


def gpu_seconds(action: Callable[[], object], repeats: int = 9) -> float:
    """Median time that the device takes for what an action queues on the current stream, by events."""
    from cupaged.cuda import jit

    cuda = jit.import_cupy().cuda
    events = [cuda.Event() for _ in range(repeats + 3)]
    for event in events:
        event.record()
        action()
    cuda.get_current_stream().synchronize()
    # the first repeats warm up; each interval holds one whole action
    return statistics.median(cuda.get_elapsed_time(a, b) for a, b in itertools.pairwise(events[2:])) / 1e3


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


def host_copy_limit(device: str) -> float:
    """Bytes a second that copies to the device reach from memory of the host: pinned for a GPU, of one thread on the CPU."""
    if device == "cpu":
        source = np.ones(2**29, np.uint8)
        target = np.ones_like(source)
        return source.nbytes / _best_seconds(lambda: np.copyto(target, source))
    from cupaged.cuda import jit
    from cupaged.ops import cuda

    cupy = jit.import_cupy()
    runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
    source, target = cuda.pinned((2**28,), "uint8"), cuda.empty((2**28,), "uint8")
    copy = target.data.ptr, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr
    return source.nbytes / gpu_seconds(lambda: runtime.memcpyAsync(*copy))


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
