"""The kernels of cuda_src on the CPU: compiled with g++ against simt.h and called like a `cupy.RawKernel` over NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from cupaged.cuda import jit

COMPILER = None if sys.platform == "win32" else shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
HERE = Path(__file__).parent
MOST_SHARED = 227 << 10  # bytes a block can have on sm_90
CACHE = Path(tempfile.gettempdir()) / f"cupaged-emulator-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
# Undefined behaviour that a GPU may let pass (a misaligned vector load, an overflowing offset) traps here.
CHECKS = "alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow"
FLAGS = f"-std=c++17 -O1 -w -shared -fPIC -U_FORTIFY_SOURCE -fsanitize={CHECKS} -fsanitize-undefined-trap-on-error".split()
if sys.platform == "darwin":
    FLAGS += ["-undefined", "dynamic_lookup"]
GLUE = """
extern "C" const char* simt_signature() {{ return simt::Entry<{name}>::signature(); }}
extern "C" const char* simt_launch(void* const* args, const unsigned* grid, unsigned threads, size_t shared, unsigned seed) {{
  return simt::launch(simt::Entry<{name}>::run, args, grid, threads, shared, seed);
}}
"""
schedules = random.Random()  # draws a fresh schedule for every launch


class EmulationError(Exception):
    """A kernel did what it must not do, or was called as it must not be."""


def emulate(source: str, name: str, **defines: object) -> Kernel:
    """The kernel `name` of the file `source` in cuda_src."""
    return compile_kernel(jit.read_source(source), name, **defines)


def compile_kernel(text: str, name: str, **defines: object) -> Kernel:
    """The kernel `name` of a source text; built once, then found again by this and later processes."""
    return Kernel(name, _library(text, name, tuple(f"-D{key}={value}" for key, value in defines.items())))


def compile_with_ptx(text: str, name: str, **defines: object) -> Kernel:
    """The same for a text that uses the instructions of ptx.cuh."""
    return compile_kernel(jit.read_source("ptx.cuh") + text, name, **defines)


def shows(attempt: Callable[[], bool], message: str = "", times: int = 12) -> bool:
    """Whether one of several schedules ends in an error that says so, or in a wrong result: `attempt()` is then false."""
    for _ in range(times):
        try:
            if not attempt():
                return True
        except EmulationError as error:
            return message in str(error)
    return False


@functools.cache
def _library(text: str, name: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    text += GLUE.format(name=name)
    _load_scheduler()
    library = ctypes.CDLL(str(built(f"{name}.so", text, *defines)))
    library.simt_signature.restype = library.simt_launch.restype = ctypes.c_char_p
    library.simt_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint]
    return library


@functools.cache
def _load_scheduler() -> None:
    """Loaded once and for all to see: the kernels' calls of simt find it."""
    text = "".join(f'#include "{file.name}"\n' for file in sorted(HERE.glob("*.cpp")))
    ctypes.CDLL(str(built("simt.so", text, "-O3")), ctypes.RTLD_GLOBAL)


def built(name: str, text: str, *options: str) -> Path:
    """The shared library that the compiler makes of a text."""
    command = [COMPILER, *FLAGS, f"-I{HERE}", *options, "-x", "c++", "-"]
    key = "\0".join([*command, text, *(file.read_text() for file in sorted(HERE.glob("*.h")))])
    if name == "simt.so":
        key += "\0".join(file.read_text() for file in sorted(HERE.glob("*.cpp")))
    path = CACHE / hashlib.sha256(key.encode()).hexdigest()[:32] / name
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", unfinished], input=text, text=True, capture_output=True)
        if result.returncode:
            raise EmulationError(f"{name} does not compile:\n{result.stderr}")
        unfinished.replace(path)
    return path


class Kernel:
    """Callable as kernel(grid, block, args, shared_mem=0); raises EmulationError where a GPU would fail or might.

    An argument is an array for a pointer, a NumPy scalar of the exact type, a structured array of no dimensions for a struct.
    """

    preferred_shared_memory_carveout = -1  # percent; the driver's choice
    captured: ClassVar[list[Callable[[], None]] | None] = None  # launches, while a graph is captured: none is made then

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.name = name
        self.max_dynamic_shared_size_bytes = 48 << 10  # what a kernel gets without asking for more
        self.after_launch: Callable[[], None] = lambda: None
        self._launch = library.simt_launch
        self._parameters = library.simt_signature().decode().split()

    @property
    def kernel(self) -> SimpleNamespace:
        """As a RawKernel's `kernel.ptr`: a handle that nothing here uses."""
        return SimpleNamespace(ptr=id(self))

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0, seed: int | None = None
    ) -> None:
        grid = (*grid, 1, 1)[:3]
        threads, *rest = block
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise EmulationError(f"{self.name}: no GPU launches a grid of {grid}")
        if not 0 < threads <= 1024 or threads % 32 or any(n != 1 for n in rest):
            raise EmulationError(f"{self.name}: a block must be 32 to 1024 threads in whole warps, not {block}")
        if not shared_mem <= self.max_dynamic_shared_size_bytes <= MOST_SHARED:
            allowed = f"more than the {self.max_dynamic_shared_size_bytes} asked for or the {MOST_SHARED} of an SM"
            raise EmulationError(f"{self.name}: {shared_mem} bytes of shared memory, {allowed}")
        if len(args) != len(self._parameters):
            raise EmulationError(f"{self.name} takes {len(self._parameters)} arguments, not {len(args)}")
        values = [self._pass(i, arg, kind) for i, (arg, kind) in enumerate(zip(args, self._parameters, strict=True))]
        if Kernel.captured is not None:
            Kernel.captured.append(lambda: self._run(grid, threads, values, shared_mem, schedules.getrandbits(31)))
            return
        self._run(grid, threads, values, shared_mem, schedules.getrandbits(31) if seed is None else seed)

    def _run(self, grid: tuple[int, ...], threads: int, values: list[np.ndarray], shared_mem: int, seed: int) -> None:
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        failure = self._launch(pointers, (ctypes.c_uint * 3)(*grid), threads, shared_mem, seed)
        if failure:
            raise EmulationError(f"{self.name}: {failure.decode()} (schedule {seed})")
        self.after_launch()

    def _pass(self, index: int, arg: object, parameter: str) -> np.ndarray:
        """The argument's bytes, once its type is seen to be the parameter's ("*f4": to float, "?2": a 2-byte struct)."""
        pointer = parameter.startswith("*")
        kind, size = parameter.lstrip("*")[0], int(parameter.lstrip("*")[1:])
        if kind == "?" and size and not pointer:
            return self._pass_struct(index, arg, size)
        if not isinstance(arg, np.ndarray if pointer else np.generic):
            wanted = "an array" if pointer else "a NumPy scalar"
            raise EmulationError(f"{self.name}, argument {index}: {wanted} is wanted, not {arg!r}")
        fits = (arg.dtype.kind, arg.dtype.itemsize) == (kind, size)
        if kind == "?":  # bf16 or f16; void and vectors are for arrays of any type
            fits = size != 2 or arg.dtype.itemsize == 2
        if not fits:
            raise EmulationError(f"{self.name}, argument {index}: {arg.dtype} passed for a {kind}{size}")
        if pointer and not arg.flags.c_contiguous:
            raise EmulationError(f"{self.name}, argument {index}: the array is not contiguous")
        return np.array(arg.ctypes.data, np.uint64) if pointer else np.array(arg)

    def _pass_struct(self, index: int, arg: object, size: int) -> np.ndarray:
        """A copy of the struct at a multiple of 64, as much as one may ask for."""
        if not isinstance(arg, np.ndarray) or arg.shape != () or arg.dtype.names is None:
            raise EmulationError(f"{self.name}, argument {index}: a structured array of no dimensions is wanted, not {arg!r}")
        if arg.dtype.itemsize != size:
            raise EmulationError(f"{self.name}, argument {index}: {arg.dtype.itemsize} bytes passed for a struct of {size}")
        room = np.empty(size + 64, np.uint8)
        start = -room.ctypes.data % 64
        room[start : start + size] = np.frombuffer(arg.tobytes(), np.uint8)
        return room[start : start + size]


def tensor_map(array: np.ndarray, box: tuple[int, ...], swizzled: bool = True) -> np.ndarray:
    """The TensorMap argument for an array of 2 to 4 dimensions and a box in it; a box row that is swizzled has 128 bytes."""
    if swizzled and box[-1] * array.itemsize != 128:
        raise EmulationError(f"a box row of {box[-1] * array.itemsize} bytes cannot be swizzled by 128")
    aligned = all(stride % 16 == 0 for stride in array.strides[:-1]) and array.ctypes.data % 16 == 0
    if not 2 <= array.ndim == len(box) <= 4 or array.strides[-1] != array.itemsize or not aligned or max(box) > 256:
        raise EmulationError("a tensor map has 2 to 4 dimensions, rows from multiples of 16 bytes on, and a box of at most 256")
    more = 4 - array.ndim
    sizes, strides, box = (*array.shape[::-1], *[1] * more), (*array.strides[::-1], *[0] * more), (*box[::-1], *[1] * more)
    out = np.zeros((), [("opaque", np.uint64, 16)])
    out["opaque"][:15] = [array.ctypes.data, array.itemsize, swizzled, *sizes, *strides, *box]
    return out
