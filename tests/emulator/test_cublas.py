"""How `cupaged.cuda.cublas` calls the library: with a stand-in for it, compiled."""

import ctypes
from types import SimpleNamespace

import pytest

from cupaged.cuda import cublas, jit

from .emulator import built

LIBRARY = """
extern "C" {
long long seen[32];
int status = 0, count = 0;
int cublasSetStream_v2(void* handle, void* stream) {
  seen[count++] = (long long)handle; seen[count++] = (long long)stream;
  return 0;
}
int cublasSetWorkspace_v2(void* handle, void* workspace, unsigned long size) {
  seen[count++] = (long long)handle; seen[count++] = (long long)workspace; seen[count++] = size;
  return 0;
}
int cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                 const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algo) {
  const long long all[] = {(long long)handle, ta, tb, m, n, k, (long long)alpha, (long long)a, a_type, lda, (long long)b,
                           b_type, ldb, (long long)beta, (long long)c, c_type, ldc, compute, algo};
  for (long long value : all) seen[count++] = value;
  return status;
}
}
"""


class Refused(RuntimeError):
    def __init__(self, status):
        super().__init__(status)
        self.status = status


@pytest.fixture
def cupy_with(monkeypatch):
    """Puts a CuPy in place whose module of cuBLAS is linked to a library of this text."""
    allocated, called = [], []

    def make(text):
        path = str(built("cublas.so", text))
        module = SimpleNamespace(__file__=path, CUBLASError=Refused, gemmEx=lambda *args: called.append(args))
        monkeypatch.setattr(cublas, "module", lambda: module)
        cuda = SimpleNamespace(
            runtime=SimpleNamespace(getDevice=lambda: 0),
            get_current_stream=lambda: SimpleNamespace(ptr=2**40 + 8),
            alloc=lambda size: (allocated.append(size), SimpleNamespace(ptr=2**46 + 256))[1],
        )
        monkeypatch.setattr(jit, "import_cupy", lambda: SimpleNamespace(cuda=cuda))
        return ctypes.CDLL(path), allocated, called

    for cached in (cublas._library, cublas._workspace):
        cached.cache_clear()
    yield make
    for cached in (cublas._library, cublas._workspace):
        cached.cache_clear()


ARGUMENTS = (1, 0, 11, 12, 13, 2**41 + 4, 2**42 + 16, 14, 13, 2**43 + 16, 14, 13, 2**41 + 8, 2**44 + 16, 0, 11, 68, -1)


def test_a_product_goes_to_the_current_stream_with_a_workspace_that_stays(cupy_with):
    library, allocated, called = cupy_with(LIBRARY)
    handle = 2**45 + 64
    for _ in range(2):
        ctypes.c_int.in_dll(library, "count").value = 0
        cublas.gemm_ex(handle, *ARGUMENTS)
        seen = list((ctypes.c_longlong * 32).in_dll(library, "seen"))
        assert seen[:5] == [handle, 2**40 + 8, handle, 2**46 + 256, allocated[0]]
        assert seen[5 : 6 + len(ARGUMENTS)] == [handle, *ARGUMENTS]
    assert len(allocated) == 1
    assert not called
    ctypes.c_int.in_dll(library, "count").value = 0
    ctypes.c_int.in_dll(library, "status").value = 14
    with pytest.raises(Refused) as refused:
        cublas.gemm_ex(handle, *ARGUMENTS)
    assert refused.value.status == 14
    ctypes.c_int.in_dll(library, "status").value = 0


def test_where_the_library_is_not_found_cupy_calls_it(cupy_with):
    _, allocated, called = cupy_with("int nothing;")
    cublas.gemm_ex(5, *ARGUMENTS)
    assert called == [(5, *ARGUMENTS)]
    assert not allocated
