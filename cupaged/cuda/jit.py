"""cuda_src -> kernels of the current device: compiled by NVRTC, several at once, and kept on disk."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from cupaged.errors import DeviceError

logger = logging.getLogger("cupaged")

OPTIONS = ("--std=c++17", "-ftz=true")
_LEAST_CAPABILITY = 80  # cp.async, bfloat16
_WITH_OWN_FEATURES = ("90",)  # devices that have instructions of no other, which sources use: wgmma
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)

Variant = tuple[str, str, dict[str, int]]  # file of cuda_src, kernel in it, macros


def kernel(source: str, name: str, **defines: int) -> Any:
    """The kernel `name` of the file `source` of cuda_src, compiled for the current device with each define as a macro.

    Called as kernel(grid, block, args, shared_mem=0) with tuples; args are CuPy arrays and NumPy scalars of the exact C types.
    A cupy.RawKernel; made once for each device. DeviceError where it cannot be compiled or loaded.
    """
    return _kernel(source, name, tuple(defines.items()), import_cupy().cuda.runtime.getDevice())


@contextlib.contextmanager
def compiling(variants: Iterable[Variant]) -> Iterator[None]:
    """Compiles what no cache holds of the variants while the body runs, a thread for each, and loads all of them at its end.

    For the current device; `kernel` then has them at hand. DeviceError as there.
    """
    variants = list(variants)
    capability = import_cupy().cuda.Device().compute_capability
    _cache_folder(), _compiler_version()  # found out once, not by each thread
    with ThreadPoolExecutor(os.cpu_count(), "cupaged-nvrtc") as pool:  # NVRTC computes without Python's lock
        sources = {source_text(source, defines): source for source, _, defines in variants}
        jobs = [pool.submit(_binary, text, source, capability) for text, source in sources.items()]
        yield
        for job in jobs:
            job.result()
    for source, name, defines in variants:
        kernel(source, name, **defines)


@functools.cache
def _kernel(source: str, name: str, defines: tuple[tuple[str, int], ...], device: int) -> Any:
    cupy = import_cupy()
    path = _binary(source_text(source, dict(defines)), source, cupy.cuda.Device(device).compute_capability)
    try:
        module = cupy.RawModule(path=str(path))
        loaded = module.get_function(name)
        loaded.kernel  # noqa: B018  (loads it)
        # Kept to the end of the process: unloaded while Python itself shuts down, CuPy prints errors.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
        return loaded
    except (RuntimeError, OSError) as error:  # a driver's refusal
        path.unlink(missing_ok=True)  # in case that the file is the reason
        cause = f"{source} cannot be loaded on this GPU ({first_error(str(error))})"
        raise DeviceError(f"{cause}; try once more, and if that fails too, update the driver") from error


def _binary(text: str, source: str, capability: str) -> Path:
    """The file that holds a source text compiled for devices of a compute capability; made if it is not there.

    Its name tells all that it depends on. NVRTC is not asked for its version: to load that library takes longer than the rest.
    """
    folder = _cache_folder()
    key = "\0".join([capability, _compiler_version(), *OPTIONS, text])
    path = folder / f"cupaged-{hashlib.sha256(key.encode()).hexdigest()[:40]}.cubin"
    if not path.exists():
        try:
            binary, _ = compile_text(text, architecture_for(capability, _nvrtc().getSupportedArchs()))
            _write(path, binary)
        except DeviceError as error:
            raise DeviceError(
                f"{source} does not compile ({error}); {install_command()} brings compiler and headers"
            ) from error
        except (RuntimeError, ImportError, OSError) as error:  # no NVRTC, no room in the cache
            cause = f"{source} cannot be compiled for this GPU"
            raise DeviceError(f"{cause} ({first_error(str(error))}); {install_command()} brings what is needed") from error
    return path


def _write(path: Path, content: bytes) -> None:
    """Make a file that nobody sees unfinished."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def compile_text(text: str, architecture: str, options: Iterable[str] = ()) -> tuple[bytes, str]:
    """(code, the compiler's log) of a source text, by NVRTC; DeviceError with the first error where it does not compile.

    `architecture` is like "sm_90a" (machine code) or "compute_90" (PTX, which a driver compiles on). No GPU is needed.
    """
    nvrtc, folder = _nvrtc(), _header_folder()
    include = [] if folder is None else [f"-I{folder}"]
    program = nvrtc.createProgram(text, "kernel.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*OPTIONS, *include, f"--gpu-architecture={architecture}", *options])
        code = nvrtc.getCUBIN(program) if architecture.startswith("sm_") else nvrtc.getPTX(program)
        return code + b"\0", nvrtc.getProgramLog(program)  # CuPy drops the last byte
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(first_error(log or str(error))) from error
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> ModuleType:
    """CuPy's face of NVRTC."""
    import_cupy()
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")


def architecture_for(capability: str, known: Iterable[int]) -> str:
    """NVRTC's name of what to compile for on devices of a compute capability ("90"), of the capabilities that it knows.

    "sm_90a" where the device has instructions of its own; "compute_120", which the driver compiles on, where NVRTC is older.
    """
    if int(capability) in known:
        return f"sm_{capability}a" if capability in _WITH_OWN_FEATURES else f"sm_{capability}"
    return f"compute_{max(number for number in known if number < int(capability))}"


def _header_folder() -> str | None:
    """Where cuda_bf16.h and the like are."""
    from cuda.pathfinder import find_nvidia_header_directory

    return find_nvidia_header_directory("cudart")


@functools.cache
def _compiler_version() -> str:
    """Of the NVRTC that was installed by pip; empty where it comes from elsewhere, and then an update does not recompile."""
    major = import_cupy().cuda.runtime.runtimeGetVersion() // 1000
    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return ""


def source_text(source: str, defines: dict[str, int]) -> str:
    """What is compiled for a variant: the macros, then the file."""
    return "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items())) + read_source(source)


def source_folder() -> Path:
    """cuda_src: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    raise DeviceError("the CUDA sources (cuda_src) are missing from this installation; reinstall cupaged")


def read_source(file: str) -> str:
    """A file of cuda_src with those of its includes that are in cuda_src put in their place, each once.

    One text, because the cache is keyed by the text: an edited .cuh that came by -I would leave a stale binary in use.
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
    _cache_folder()
    try:
        return importlib.import_module("cupy")
    except (ImportError, OSError) as error:
        raise DeviceError(f"CuPy cannot be imported ({first_error(str(error))}); reinstall it: {install_command()}") from error


@functools.cache
def _cache_folder() -> Path:
    """Where compiled kernels are kept: CuPy's folder, or where that cannot be written one that goes when the process ends.

    CuPy is then told to keep none either; else its import or its first kernel would fail.
    """
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return Path(folder)
    except OSError as error:
        logger.warning("kernels are compiled anew at every start, because CuPy's cache folder cannot be written: %s", error)
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    os.environ["CUPY_CACHE_DIR"] = str(source_folder())  # any that exists: CuPy would make it, but writes nothing
    temporary = tempfile.mkdtemp(prefix="cupaged-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


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
