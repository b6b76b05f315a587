"""`cupaged.ops.cuda` without a GPU: its host code over guarded NumPy arrays, its kernels emulated."""

from pathlib import Path

import numpy as np
import pytest

from cupaged import attention
from cupaged.cuda import jit, launch
from cupaged.ops import cuda

from . import emulator
from .guarded_memory import GuardedMemory


def pytest_collection_modifyitems(items):
    if emulator.COMPILER is None:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason="no C++ compiler (g++ or c++) to build the kernels with"))


@pytest.fixture(autouse=True)
def plain_launches(monkeypatch):
    """A kernel begins when the one before has ended."""
    monkeypatch.setattr(launch, "_knows_dependent_launches", lambda device: False)


@pytest.fixture
def ops(monkeypatch):
    """The module cupaged.ops.cuda over GuardedMemory, its guard zones checked after every launch."""
    memory = GuardedMemory()

    def kernel(source, name, **defines):
        kernel = emulator.emulate(source, name, **defines)
        kernel.after_launch = memory.check
        return kernel

    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(cuda, "cupy", memory)
    monkeypatch.setattr(attention, "grids_of_device", lambda *types: (attention.Grid(num_ctas=7), None))
    monkeypatch.setattr(attention.kernel, "_shared_memory_per_sm", lambda device: 100 << 10)
    monkeypatch.setattr(attention.kernel, "_workspaces", {})
    monkeypatch.setattr(cuda, "_gemm", gemm)
    return cuda


def gemm(x, weight, out, add=False):
    """What cuBLAS is asked for: float32 sums, with `add` also of what `out` holds, rounded once; captured as a kernel is."""
    if emulator.Kernel.captured is not None:
        emulator.Kernel.captured.append(lambda: gemm(x, weight, out, add))
        return
    product = x.astype(np.float32) @ weight.astype(np.float32).T
    out[...] = product + out.astype(np.float32) if add else product
