"""Host arrays to the device at the speed of the bus: threads fill pinned slices in turn, the device fetches them meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from cupaged.cuda import jit
from cupaged.errors import OutOfMemory

Array = Any  # cupy.ndarray

SLICE_BYTES = 2 << 20  # large enough for the bus, small enough that the threads end together
_THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_SLICES = 16
_FILLING = 12  # of the slices, so that no thread waits for its next one; the others are the device's to fetch


def most_pinned_bytes() -> int:
    """Host memory that copies leave pinned, at most: CuPy's pool keeps a block for each power of two up to the largest."""
    return 2 * _SLICES * SLICE_BYTES


def copy(target: Array, array: np.ndarray) -> None:
    """Put a host array into a device array of its shape, converted to the type there; it is there when this returns.

    `target` may be a part of another array whose rows (everything behind the first axis) have gaps between them.

    A file that is mapped into memory is read here, page by page: that, and the conversion, is what the threads are for. NumPy
    holds no lock of the interpreter while it copies.

    Raises:
        OutOfMemory: the system gives no pinned memory.
    """
    cuda, pieces = jit.import_cupy().cuda, list(_pieces(target, array))
    stream = cuda.get_current_stream()
    slices = _slices(cuda, min(len(pieces), _SLICES), max(into.nbytes for into, _ in pieces))
    copied = [cuda.Event(disable_timing=True) for _ in slices]
    filling: deque[tuple[Future, int, Array]] = deque()  # in the order in which they are sent

    def send() -> None:
        filled, number, into = filling[0]
        filled.result()
        _queue(cuda.runtime, into, slices[number], stream)
        copied[number].record(stream)
        filling.popleft()

    try:
        if len(pieces) == 1:  # a thread would take longer to start
            [(into, source)] = pieces
            _fill(slices[0], source, into.dtype)
            _queue(cuda.runtime, into, slices[0], stream)
            return
        with ThreadPoolExecutor(_THREADS, "cupaged-staging") as threads:
            for index, (into, source) in enumerate(pieces):
                if len(filling) == _FILLING:
                    send()
                number = index % len(slices)
                copied[number].synchronize()
                filling.append((threads.submit(_fill, slices[number], source, into.dtype), number, into))
            while filling:
                send()
    finally:  # also if it is broken off: no thread writes to a slice any more, but the device may still fetch one
        stream.synchronize()


def _pieces(target: Array, array: np.ndarray) -> Iterator[tuple[Array, np.ndarray]]:
    """(where, what) in pieces of at most a slice on the device."""
    if target.flags.c_contiguous:
        target, array = target.reshape(-1), np.ascontiguousarray(array).reshape(-1)
    step = SLICE_BYTES // (target.nbytes // len(target))
    if step:
        for start in range(0, len(target), step):
            yield target[start : start + step], array[start : start + step]
    else:
        for row, source in zip(target, array, strict=True):
            yield from _pieces(row, source)


def _slices(cuda: Any, count: int, size: int) -> list[np.ndarray]:
    """Pinned memory, from CuPy's pool and back to it."""
    try:
        memory = cuda.alloc_pinned_memory(count * size)
    except cuda.runtime.CUDARuntimeError as error:
        cause = f"the system gives no {count * size / 1e6:.0f} MB of pinned memory for copies to the GPU ({error})"
        raise OutOfMemory(f"{cause}; end other programs") from error
    return list(np.frombuffer(memory, np.uint8, count * size).reshape(count, size))


def _fill(slice_: np.ndarray, source: np.ndarray, dtype: np.dtype) -> None:
    into = slice_[: source.size * dtype.itemsize].view(dtype).reshape(source.shape)
    np.copyto(into, source, casting="unsafe")


def _queue(runtime: Any, into: Array, slice_: np.ndarray, stream: Any) -> None:
    """Queue the copy of a slice to its place on the device."""
    kind = runtime.memcpyHostToDevice
    if into.flags.c_contiguous:
        runtime.memcpyAsync(into.data.ptr, slice_.ctypes.data, into.nbytes, kind, stream.ptr)
    else:
        width = into.nbytes // len(into)
        runtime.memcpy2DAsync(into.data.ptr, into.strides[0], slice_.ctypes.data, width, width, len(into), kind, stream.ptr)
