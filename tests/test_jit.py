"""Kernel sources and device checks, without a GPU: a stand-in tells what a machine with one would."""

import os
import subprocess
import sys
import threading
from pathlib import Path
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
    before = jit.read_source("rope_append.cu")
    assert before.count("long long kv_offset(") == 1, "each header once, though two files include it"
    assert 'include "paged_kv.cuh"' not in before
    header = tmp_path / "paged_kv.cuh"
    header.write_text(header.read_text() + "// edited\n")
    assert jit.read_source("rope_append.cu") != before, "the cache is keyed by this text"


@pytest.mark.parametrize(
    ("capability", "name"),
    [("80", "sm_80"), ("89", "sm_89"), ("90", "sm_90a"), ("100", "sm_100"), ("101", "compute_100"), ("120", "compute_100")],
)
def test_what_is_compiled_for(capability, name):
    assert jit.architecture_for(capability, (75, 80, 86, 89, 90, 100)) == name


class Compiler:
    """Stands in for NVRTC and the driver: notes what is compiled, and loads a file as (its content, the kernel's name)."""

    def __init__(self, monkeypatch, folder, capability="90"):
        self.compiled, self.before = [], lambda: None
        self.device = SimpleNamespace(compute_capability=capability)
        runtime = SimpleNamespace(getDevice=lambda: id(self), runtimeGetVersion=lambda: 13000)
        cuda = SimpleNamespace(runtime=runtime, Device=lambda index=0: self.device)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=self.load))
        monkeypatch.setattr(jit, "_nvrtc", lambda: SimpleNamespace(getSupportedArchs=lambda: (80, 90, 100)))
        monkeypatch.setattr(jit, "_cache_folder", lambda: folder)
        monkeypatch.setattr(jit, "compile_text", self.compile)

    def compile(self, text, architecture):
        self.before()
        self.compiled.append((text, architecture))
        if "WRONG" in text:
            raise DeviceError("error: it is wrong")
        return text.encode(), ""

    def load(self, path):
        content = Path(path).read_bytes()
        if content.startswith(b"torn"):
            raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=None, found=(content, name)))


def test_a_kernel_is_compiled_once_for_each_text_and_architecture(monkeypatch, tmp_path):
    def compiled(capability="90", **defines):
        """What a process newly started compiles for a kernel, and what it loads."""
        compiler = Compiler(monkeypatch, tmp_path, capability)
        text, name = jit.kernel("embedding.cu", "embedding", **defines).found
        assert (text.decode(), name) == (jit.source_text("embedding.cu", defines), "embedding")
        assert jit.kernel("embedding.cu", "embedding", **defines) is jit.kernel("embedding.cu", "embedding", **defines)
        return compiler.compiled

    text = jit.read_source("embedding.cu")
    assert compiled() == [(text, "sm_90a")]
    assert compiled() == []
    assert compiled(HEAD_DIM=64) == [("#define HEAD_DIM 64\n" + text, "sm_90a")]
    assert compiled("100") == [(text, "sm_100")]
    assert compiled(HEAD_DIM=64) == compiled("100") == []
    assert len(list(tmp_path.iterdir())) == 3, "nothing is left beside the three binaries"
    for file in tmp_path.iterdir():
        file.write_bytes(b"torn" + file.read_bytes())
    with pytest.raises(DeviceError, match="INVALID_IMAGE"):
        compiled()
    assert compiled() == [(text, "sm_90a")], "a file that cannot be loaded is made anew"


def test_variants_are_compiled_at_once_beside_the_body(monkeypatch, tmp_path):
    compiler = Compiler(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    together = threading.Barrier(4, timeout=60)  # the body and the three compilations wait for one another
    compiler.before = together.wait
    names = [
        ("elementwise.cu", "add_bias"),
        ("elementwise.cu", "swiglu"),
        ("embedding.cu", "embedding"),
        ("rms_norm.cu", "rms_norm"),
    ]
    with jit.compiling([(*name, {}) for name in names]):
        together.wait()
    assert len(compiler.compiled) == 3, "one text for the two kernels of a file"
    for name in names:
        jit.kernel(*name)
    assert len(compiler.compiled) == 3


def test_what_does_not_compile_is_named(monkeypatch, tmp_path):
    Compiler(monkeypatch, tmp_path)
    with pytest.raises(DeviceError, match=r"^embedding.cu does not compile \(error: it is wrong\); pip install"):
        jit.kernel("embedding.cu", "embedding", WRONG=1)
    with pytest.raises(DeviceError, match=r"embedding.cu does not compile"):  # noqa: SIM117
        with jit.compiling([("rms_norm.cu", "rms_norm", {}), ("embedding.cu", "embedding", {"WRONG": 1})]):
            pass


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
    ops, index = llm.select_device("auto")
    assert (ops.__name__, index) == ("cupaged.ops.numpy", None)
    assert (".[cuda12]" in caplog.text) == hint
