"""NumPy arrays in the place of CuPy's: poisoned with NaN, between guard zones that show a write outside of them."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from .emulator import EmulationError, Kernel

GUARD = 64 << 10  # bytes before and after every array
ALIGNMENT = 512  # as in CuPy
POISON = 0xFF  # a NaN in every float type, -1 in every integer


class DeviceArray(np.ndarray):
    """A NumPy array with address and device where CuPy has them: `array.data.ptr`, `array.device.id`."""

    device = SimpleNamespace(id=0)

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.ctypes.data)


class Stream:
    """CuPy's names for streams, events and graphs of launches. Everything happens at once here."""

    ptr = 0

    def __init__(self, **_: bool) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        Kernel.captured = []

    def end_capture(self) -> Graph:
        launches, Kernel.captured = Kernel.captured, None
        return Graph(launches)


class Graph:
    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self._launches = launches

    def launch(self, stream: Stream) -> None:
        for memory in MemoryPool.taken:  # may be anything by now, as graphs share it
            memory[...] = POISON
        for launch in self._launches:
            launch()


class MemoryPool:
    """CuPy's name for a memory that graphs have for themselves; `taken` is all of it, of all pools."""

    taken: ClassVar[list[np.ndarray]] = []

    def __init__(self, allocator: object) -> None:
        pass

    def malloc(self, memory: np.ndarray) -> None:
        self.taken.append(memory)

    def free_all_blocks(self, stream: Stream) -> None:
        pass


class GuardedMemory:
    """The functions of the module `cupy` that ops/cuda.py uses, and `check`."""

    ndarray = DeviceArray

    def __init__(self) -> None:
        MemoryPool.taken.clear()
        runtime = SimpleNamespace(getDevice=lambda: 0, memcpy2DAsync=_memcpy_2d, memcpyDeviceToDevice=3)
        runtime.memcpyAsync, runtime.memcpyHostToDevice, runtime.memcpyDefault = _memcpy, 1, 4
        self.cuda = SimpleNamespace(
            alloc_pinned_memory=bytearray,
            Device=lambda index: contextlib.nullcontext(),
            runtime=runtime,
            get_current_stream=Stream,
            Stream=Stream,
            Event=Stream,
            MemoryPool=MemoryPool,
            using_allocator=self._using_allocator,
            UnownedMemory=lambda ptr, size, owner: (ctypes.c_char * size).from_address(ptr),
            MemoryPointer=lambda memory, offset: memory,
        )
        self._allocator: Callable[[np.ndarray], None] = lambda memory: None
        self._guards: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: object) -> DeviceArray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * GUARD + ALIGNMENT, POISON, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % ALIGNMENT
        self._guards += [memory[:start], memory[start + size :]]
        self._allocator(memory[start : start + size])
        return memory[start : start + size].view(dtype).reshape(shape).view(DeviceArray)

    def asarray(self, array: np.ndarray, dtype: object = None) -> DeviceArray:
        out = self.empty(array.shape, array.dtype if dtype is None else dtype)
        out[...] = array
        return out

    def get_default_memory_pool(self) -> MemoryPool:
        return MemoryPool(None)

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Callable[[np.ndarray], None]) -> Iterator[None]:
        before, self._allocator = self._allocator, allocator
        yield
        self._allocator = before

    def asnumpy(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def check(self) -> None:
        """Raise EmulationError if anything was written outside of the arrays."""
        for guard in self._guards:
            if (guard != POISON).any():
                raise EmulationError("a write outside of an array")


def _memcpy(target: int, source: int, size: int, *_: int) -> None:
    ctypes.memmove(target, source, size)


def _memcpy_2d(target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, *_: int) -> None:
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
