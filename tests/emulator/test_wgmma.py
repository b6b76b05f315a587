"""wgmma on the emulator: right products, and every missing wait, fence or barrier shows."""

import ml_dtypes
import numpy as np
import pytest
from op_cases import SEED

from .emulator import compile_with_ptx, shows

THREADS = 128

# out [64, 128] = a [64, 64] times b [128, 64]^T, then + a's first 16 columns once more; 16-byte pieces swizzled by hand.
SHARED_OPERANDS = """
extern "C" __global__ void k(const uint4* a, const uint4* b, float* out) {
  unsigned char* s = shared_memory();
  for (int i = threadIdx.x; i < 192 * 8; i += 128) {
    int row = i / 8, piece = i % 8;
    cp_async_16(s + row * 128 + (piece ^ row % 8) * 16, row < 64 ? a + i : b + i - 512);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async_shared();
  __syncthreads();
  unsigned long long da = wgmma_descriptor(s, 0, 1024), db = wgmma_descriptor(s + 8192, 0, 1024);
  float d[64];
  wgmma_fence();
  for (int k = 0; k < 4; k++) wgmma_m64n128k16_TYPE(d, da + 2 * k, db + 2 * k, k > 0);
  wgmma_commit();
  wgmma_m64n128k16_TYPE(d, da, db, 1);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 64; i++) {
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    out[row * 128 + column] = d[i];
  }
}
"""
TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def run_shared_operands(text, dtype="bf16"):
    """Whether the product is right."""
    rng = np.random.default_rng([SEED, 5])
    a, b = (rng.standard_normal((n, 64)).astype(TYPES[dtype]) for n in (64, 128))
    out = np.zeros((64, 128), np.float32)
    kernel = compile_with_ptx(text.replace("TYPE", dtype), "k")
    kernel((1,), (THREADS,), (a, b, out), 24576)
    x, y = a.astype(np.float64), b.astype(np.float64)
    return np.abs(out - x @ y.T - x[:, :16] @ y[:, :16].T).max() < 1e-4


@pytest.mark.parametrize("dtype", TYPES)
def test_wgmma_of_operands_in_shared_memory(dtype):
    assert all(run_shared_operands(SHARED_OPERANDS, dtype) for _ in range(4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  wgmma_wait<0>();\n", "", ""),
        ("wgmma_wait<0>", "wgmma_wait<1>", ""),
        ("  wgmma_commit();\n  wgmma_wait", "  wgmma_wait", ""),
        ("  fence_proxy_async_shared();\n", "", ""),
        ("  __syncthreads();\n", "  note_store(s + 16 * threadIdx.x, 16);\n  __syncthreads();\n", ""),
        ("  cp_async_wait<0>();\n", "", ""),
        ("  __syncthreads();\n", "", ""),
        ("  wgmma_fence();\n", "", "without wgmma_fence"),
        ("k > 0", "1", ""),
        ("  wgmma_wait<0>();\n", "  s[threadIdx.x] = s[threadIdx.x + 8192] = 0;\n  wgmma_wait<0>();\n", ""),
        ("db + 2 * k", "db + (threadIdx.x < 96 ? 2 * k : 0)", "divergence"),
        ("  wgmma_fence();\n", "  if (threadIdx.x >= 96) return;\n  wgmma_fence();\n", ""),
        ("s + 8192, 0, 1024", "s + 8320, 0, 1024", "first row of an atom"),
        ("s + 8192, 0, 1024", "s + 8192, 0, 2048", "outside of the shared memory"),
    ],
)
def test_a_mistake_with_wgmma_shows(old, new, message):
    assert SHARED_OPERANDS.count(old) == 1
    assert shows(lambda: run_shared_operands(SHARED_OPERANDS.replace(old, new)), message)


# out [64, COLUMNS] = a [64, 32], from registers, times b [32, COLUMNS], swizzled here: panels of [32 rows of k][64 columns].
REGISTER_OPERANDS = """
extern "C" __global__ void k(const unsigned short* a, const uint4* b, float* out) {
  unsigned char* s = shared_memory();
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = threadIdx.x; i < 32 * COLUMNS / 8; i += 128) {
    int row = i / (COLUMNS / 8), piece = i % (COLUMNS / 8);
    cp_async_16(s + piece / 8 * 4096 + row * 128 + (piece % 8 ^ row % 8) * 16, b + i);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async_shared();
  __syncthreads();
  unsigned long long db = wgmma_descriptor(s, 4096, 1024);
  float d[COLUMNS / 2] = {};
  for (int k = 0; k < 32; k += 16) {
    unsigned x[4];
    for (int i = 0; i < 4; i++) x[i] = *(const unsigned*)(a + (16 * warp + g + i % 2 * 8) * 32 + k + i / 2 * 8 + 2 * t);
    wgmma_fence();
    NAME(d, x, db + k * 128 / 16, 1);
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int i = 0; i < COLUMNS / 2; i++) out[(16 * warp + g + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + t * 2 + i % 2] = d[i];
}
"""


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [64, 128])
def test_wgmma_of_an_operand_in_registers(dtype, columns):
    rng = np.random.default_rng([SEED, 6])
    a, b = (rng.standard_normal(shape).astype(TYPES[dtype]) for shape in ((64, 32), (32, columns)))
    out = np.zeros((64, columns), np.float32)
    name = f"wgmma_m64n{columns}k16_{dtype}_ra"
    kernel = compile_with_ptx(REGISTER_OPERANDS.replace("NAME", name), "k", COLUMNS=columns)
    kernel((1,), (THREADS,), (a.view(np.uint16), b, out), 8192)
    assert np.abs(out - a.astype(np.float64) @ b.astype(np.float64)).max() < 1e-4


# Two warpgroups: the second fills two stages for the first, which multiplies a step behind what it has issued.
PIPELINE = """
struct Shared { unsigned char a[8192], stage[2][16384]; unsigned long long full[2], empty[2]; };
__device__ void fetch(unsigned char* to, const uint4* from, int rows) {
  for (int i = threadIdx.x % 128; i < rows * 8; i += 128) cp_async_16(to + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, from + i);
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async_shared();
}
extern "C" __global__ void k(const uint4* a, const uint4* b, float* out) {
  Shared& shared = *(Shared*)shared_memory();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(&shared.full[i], 128), mbarrier_init(&shared.empty[i], 128);
    fence_mbarrier_init();
  }
  if (threadIdx.x < 128) fetch(shared.a, a, 64);
  __syncthreads();
  if (threadIdx.x >= 128) {
    setmaxnreg_dec<40>();
    for (int step = 0; step < 8; step++) {
      mbarrier_wait_parity(&shared.empty[step % 2], step / 2 % 2 ^ 1);
      fetch(shared.stage[step % 2], b + step * 1024, 128);
      mbarrier_arrive(&shared.full[step % 2]);
    }
    return;
  }
  setmaxnreg_inc<240>();
  unsigned long long da = wgmma_descriptor(shared.a, 0, 1024);
  float d[64] = {};
  for (int step = 0; step < 8; step++) {
    unsigned long long db = wgmma_descriptor(shared.stage[step % 2], 0, 1024);
    mbarrier_wait_parity(&shared.full[step % 2], step / 2 % 2);
    wgmma_fence();
    for (int k = 0; k < 4; k++) wgmma_m64n128k16_bf16(d, da + 2 * k, db + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<1>();  // of the step before
    if (step) mbarrier_arrive(&shared.empty[(step - 1) % 2]);
  }
  wgmma_wait<0>();
  for (int i = 0; i < 64; i++) out[i * 128 + threadIdx.x] = d[i];
}
"""


def run_pipeline(text):
    rng = np.random.default_rng([SEED, 7])
    a, b = (rng.standard_normal((n, 64)).astype(ml_dtypes.bfloat16) for n in (64, 8 * 128))
    out = np.zeros((64, THREADS), np.float32)
    kernel = compile_with_ptx(text, "k")
    kernel((1,), (2 * THREADS,), (a, b, out), 8192 + 2 * 16384 + 32)
    i, thread = np.arange(64)[:, None], np.arange(THREADS)
    rows, columns = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    wanted = np.einsum("rk,scki->rci", a.astype(np.float64), b.astype(np.float64).reshape(8, 128, 64, 1))[:, :, 0]
    return np.abs(out - wanted[rows, columns]).max() < 1e-3


def test_a_pipeline_of_wgmma():
    assert all(run_pipeline(PIPELINE) for _ in range(6))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    wgmma_wait<1>();  // of the step before\n", ""),  # the stage is given back while wgmma may read it
        ("if (step) mbarrier_arrive(&shared.empty[(step - 1) % 2]);", "mbarrier_arrive(&shared.empty[step % 2]);"),
        ("      mbarrier_wait_parity(&shared.empty[step % 2], step / 2 % 2 ^ 1);\n", ""),
        ("    mbarrier_wait_parity(&shared.full[step % 2], step / 2 % 2);\n", ""),
        ("  fence_proxy_async_shared();\n", ""),
    ],
)
def test_a_mistake_in_a_pipeline_of_wgmma_shows(old, new):
    assert PIPELINE.count(old) == 1
    assert shows(lambda: run_pipeline(PIPELINE.replace(old, new)))
