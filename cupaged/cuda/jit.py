"""cuda_src -> kernels of the current device: NVRTC behind `cupy.RawModule`, compiled once and cached on disk by CuPy."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from cupaged.errors import DeviceError

logger = logging.getLogger("cupaged")

OPTIONS = ("--std=c++17",)
_LEAST_CAPABILITY = 80  # cp.async, bfloat16
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def kernel(source: str, name: str, **defines: int) -> Any:
    """The kernel `name` of the file `source` of cuda_src, compiled for the current device with -DKEY=VALUE for each define.

    Called as kernel(grid, block, args, shared_mem=0) with tuples; args are CuPy arrays and NumPy scalars of the exact C types.
    A cupy.RawKernel; made once for each device. DeviceError where it cannot be compiled or loaded.
    """
    return _kernel(source, name, tuple(defines.items()), import_cupy().cuda.runtime.getDevice())


@functools.cache
def _kernel(source: str, name: str, defines: tuple[tuple[str, int], ...], device: int) -> Any:
    cupy = import_cupy()
    try:
        module = cupy.RawModule(code=read_source(source), options=options_of(dict(defines)))  # CuPy keeps one for each text
        return module.get_function(name)  # compiles, or loads what is cached
    except cupy.cuda.compiler.CompileException as error:
        cause = f"{source} does not compile"
        raise DeviceError(f"{cause} ({first_error(str(error))}); {install_command()} brings compiler and headers") from error
    except (RuntimeError, ImportError, OSError) as error:  # no NVRTC, no headers, no room in the cache, a driver's refusal
        cause = f"{source} cannot be compiled for this GPU"
        raise DeviceError(f"{cause} ({first_error(str(error))}); {install_command()} brings what is needed") from error


def options_of(defines: dict[str, int]) -> tuple[str, ...]:
    """NVRTC's options for a variant of a kernel."""
    return (*OPTIONS, *(f"-D{key}={value}" for key, value in defines.items()))


def source_folder() -> Path:
    """cuda_src: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    raise DeviceError("the CUDA sources (cuda_src) are missing from this installation; reinstall cupaged")


def read_source(file: str) -> str:
    """A file of cuda_src with those of its includes that are in cuda_src put in their place, each once.

    One text, because CuPy's cache is keyed by the text: an edited .cuh that came by -I would leave a stale binary in use.
    """
    folder, seen = source_folder(), set()

    def read(name: str) -> str:
        seen.add(name)
        return _INCLUDE.sub(include, (folder / name).read_text(encoding="utf-8")).replace("#pragma once\n", "")

    def include(match: re.Match[str]) -> str:
        if not (folder / match[1]).is_file():
            return match[0]
        return "" if match[1] in seen else read(match[1])

    return read(file)


def first_error(log: str) -> str:
    """The first line of a compiler's log that tells of an error, or its first line."""
    lines = [line.strip() for line in log.replace("\0", "").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def install_command() -> str:
    """The line that installs what the kernels need, for the CUDA version of the CuPy in use."""
    cupy = sys.modules.get("cupy")
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000 if cupy else 12
    return f"pip install '.[cuda{major}]' in a checkout of cupaged"


def import_cupy() -> ModuleType:
    """CuPy, with a kernel cache that can be written or none; DeviceError where it is not installed."""
    if sys.modules.get("cupy") is not None:
        return sys.modules["cupy"]
    if importlib.util.find_spec("cupy") is None:
        raise DeviceError(f"CuPy, which runs the CUDA kernels, is not installed; {install_command()}")
    _provide_kernel_cache()
    try:
        return importlib.import_module("cupy")
    except (ImportError, OSError) as error:
        raise DeviceError(f"CuPy cannot be imported ({first_error(str(error))}); reinstall it: {install_command()}") from error


@functools.cache
def _provide_kernel_cache() -> None:
    """Where CuPy's cache folder cannot be written, have it compile uncached; else its import or its first kernel would fail."""
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning("kernels are compiled anew at every start, because CuPy's cache folder cannot be written: %s", error)
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        os.environ["CUPY_CACHE_DIR"] = str(source_folder())  # any that exists: CuPy would make it, but writes nothing


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed; on Linux, the one system that the CUDA kernels run on."""
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_device(index: int = 0) -> None:
    """DeviceError, saying why, unless GPU `index` can run the kernels."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise DeviceError("no NVIDIA driver is installed; install one, or use device 'cpu'")
    try:
        count, problem = runtime.getDeviceCount(), "it counts none"
    except runtime.CUDARuntimeError as error:
        count, problem = 0, str(error)
    if driver // 1000 < needed // 1000 or "InsufficientDriver" in problem:  # within a major version most drivers will do
        versions = f"it knows CUDA {_version(driver)} and CuPy is built for {_version(needed)}"
        raise DeviceError(f"the NVIDIA driver is too old: {versions}; update the driver, or use device 'cpu'")
    if count == 0:
        raise DeviceError(f"the NVIDIA driver finds no GPU ({problem}); make one visible, or use device 'cpu'")
    if not 0 <= index < count:
        raise DeviceError(f"there is no GPU cuda:{index}; the last one is cuda:{count - 1}")
    capability = int(cupy.cuda.Device(index).compute_capability)
    if capability < _LEAST_CAPABILITY:
        versions = f"{capability / 10:.1f} and the kernels need {_LEAST_CAPABILITY / 10:.1f} (Ampere) or newer"
        raise DeviceError(f"cuda:{index} has compute capability {versions}; use another GPU, or device 'cpu'")


def _version(number: int) -> str:
    """CUDA's 12040 -> "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"
