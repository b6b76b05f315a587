"""NumPy arrays in the place of CuPy's: poisoned with NaN, between guard zones that show a write outside of them."""

from __future__ import annotations

import contextlib
import ctypes
import math
from types import SimpleNamespace

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
        self._launches: list = []

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        Kernel.captured = self._launches = []

    def end_capture(self) -> Stream:
        Kernel.captured = None
        return self

    def launch(self, stream: Stream) -> None:  # of the graph
        for launch in self._launches:
            launch()


class GuardedMemory:
    """The functions of the module `cupy` that ops/cuda.py uses, and `check`."""

    ndarray = DeviceArray

    def __init__(self) -> None:
        runtime = SimpleNamespace(getDevice=lambda: 0, memcpy2DAsync=_memcpy_2d, memcpyDeviceToDevice=3)
        runtime.memcpyAsync, runtime.memcpyHostToDevice, runtime.memcpyDefault = _memcpy, 1, 4
        self.cuda = SimpleNamespace(
            alloc_pinned_memory=bytearray,
            Device=lambda index: contextlib.nullcontext(),
            runtime=runtime,
            get_current_stream=Stream,
            Stream=Stream,
            Event=Stream,
        )
        self._guards: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: object) -> DeviceArray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * GUARD + ALIGNMENT, POISON, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % ALIGNMENT
        self._guards += [memory[:start], memory[start + size :]]
        return memory[start : start + size].view(dtype).reshape(shape).view(DeviceArray)

    def asarray(self, array: np.ndarray, dtype: object = None) -> DeviceArray:
        out = self.empty(array.shape, array.dtype if dtype is None else dtype)
        out[...] = array
        return out

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
