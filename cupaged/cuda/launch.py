"""Launches by the driver: with attributes that CuPy does not pass on."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from cupaged.cuda import jit
from cupaged.errors import DeviceError

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):  # CUlaunchAttribute: an id and a union of 64 bytes
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_DEPENDENT = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))


def launch_dependent(
    kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0, cluster: int = 1
) -> None:
    """Queue a kernel of `jit.kernel` on the current stream, called like that; a dependent launch where the device knows those.

    It may then begin while the kernel before it still runs, once all CTAs of that one have said so or ended (programmatic
    dependent launch, CUDA Programming Guide, section 4.5). So every CTA executes griddepcontrol.wait before it reads or writes
    what other kernels do. With `cluster`, so many neighbours each form one (sm_90).
    """
    if not _knows_dependent_launches(jit.import_cupy().cuda.runtime.getDevice()):
        kernel(grid, block, args, shared_mem=shared_mem)
        return
    values = [_value(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    config = _Config()
    config.grid[:], config.block[:] = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
    config.shared_bytes, config.stream = shared_mem, jit.import_cupy().cuda.get_current_stream().ptr
    attributes = (_DEPENDENT, _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(cluster, 1, 1)))
    config.attributes, config.num_attributes = (_Attribute * 2)(*attributes), 1 if cluster == 1 else 2
    result = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None)
    if result:
        raise DeviceError(f"the driver refuses to launch a kernel (error {result}); restart, and report it if it stays")


def _value(arg: Any) -> np.ndarray:
    """What the kernel gets: the address of a device array, or a NumPy scalar or structure as it is."""
    return np.asarray(arg) if isinstance(arg, (np.ndarray, np.generic)) else np.array(arg.data.ptr, np.uint64)


@functools.cache
def _knows_dependent_launches(device: int) -> bool:
    if int(jit.import_cupy().cuda.Device(device).compute_capability) < 90:
        return False
    return hasattr(_driver(), "cuLaunchKernelEx")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
