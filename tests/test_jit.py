"""Kernel sources and device checks, without a GPU: a stand-in tells what a machine with one would."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cupaged.cuda import jit
from cupaged.errors import DeviceError


class CUDARuntimeError(Exception):
    pass


def machine(monkeypatch, driver=13000, needs=12090, gpus=1, capability="90"):
    """Let `import cupy` find this machine."""

    def count():
        if gpus == 0:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return gpus

    runtime = SimpleNamespace(
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: needs,
        getDeviceCount=count,
        CUDARuntimeError=CUDARuntimeError,
    )
    device = SimpleNamespace(compute_capability=capability)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda index: device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_a_gpu_that_will_do_is_accepted(monkeypatch):
    machine(monkeypatch)
    jit.check_device(0)


@pytest.mark.parametrize(
    ("facts", "index", "says"),
    [
        ({"driver": 0}, 0, "no NVIDIA driver"),
        ({"driver": 11040}, 0, r"driver is too old: it knows CUDA 11.4 and CuPy is built for 12.9; update"),
        ({"gpus": 0}, 0, "finds no GPU"),
        ({"gpus": 2}, 2, r"no GPU cuda:2; the last one is cuda:1"),
        ({"capability": "75"}, 0, r"compute capability 7.5 and the kernels need 8.0"),
    ],
)
def test_a_machine_that_cannot_run_the_kernels_is_told_why(monkeypatch, facts, index, says):
    machine(monkeypatch, **facts)
    with pytest.raises(DeviceError, match=says) as error:
        jit.check_device(index)
    assert "\n" not in str(error.value)


def test_without_cupy_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install '.\[cuda12\]'"):
        jit.check_device(0)


def test_a_source_is_one_text_that_an_edited_header_changes(monkeypatch, tmp_path):
    for file in jit.source_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(jit, "source_folder", lambda: tmp_path)
    before = jit.read_source("paged_attention.cu")
    assert before.count("long long kv_offset(") == 1, "each header once, though two files include it"
    assert 'include "paged_kv.cuh"' not in before
    header = tmp_path / "paged_kv.cuh"
    header.write_text(header.read_text() + "// edited\n")
    assert jit.read_source("paged_attention.cu") != before, "CuPy's cache is keyed by this text"


@pytest.mark.skipif(os.name == "nt", reason="a path below a file is refused differently")
def test_an_unwritable_kernel_cache_is_one_warning(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "cupy.py").write_text("import os; assert os.environ['CUPY_CACHE_IN_MEMORY'] == '1'")
    code = "from cupaged.cuda import jit; jit.import_cupy(); jit.import_cupy()"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "CUPY_CACHE_DIR": str(tmp_path / "file" / "cache")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.count("cannot be written") == 1


@pytest.mark.parametrize(("driver", "hint"), [(True, True), (False, False)])
def test_auto_hints_at_the_extra_only_where_there_is_a_driver(monkeypatch, caplog, driver, hint):
    from cupaged import llm

    monkeypatch.setattr(jit, "has_driver", lambda: driver)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ops, index = llm._select_device("auto")
    assert (ops.__name__, index) == ("cupaged.ops.numpy", None)
    assert (".[cuda12]" in caplog.text) == hint
