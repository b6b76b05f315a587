"""The instructions of cuda_src/ptx.cuh on the emulator compute what PTX says, and a missing wait, fence or arrival shows."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from op_cases import SEED

from cupaged.cuda import jit

from .emulator import EmulationError, compile_with_ptx, shows, tensor_map

THREADS = 128
TIMES = 12  # schedules of what is right


def run(body, *args, parameters, grid=(1,), threads=THREADS, shared=4096):
    text = f'extern "C" __global__ void k({parameters}) {{ {body} }}'
    kernel = compile_with_ptx(text, "k")
    kernel.max_dynamic_shared_size_bytes = shared
    kernel(grid, (threads,), args, shared)


def without(text, line):
    assert text.count(line) == 1
    return text.replace(line, "")


def test_every_instruction_has_a_body_on_the_cpu():
    device = jit.read_source("ptx.cuh").partition('#include "ptx_on_cpu.h"')[0]
    host = (Path(__file__).parent / "ptx_on_cpu.h").read_text()
    names = set(re.findall(r"^(?:__device__ __forceinline__ .*?|WGMMA_\w+\()(\w+)[(,]", device, re.MULTILINE))
    assert {"ldmatrix_x4", "store_for_others", "wgmma_wait", "wgmma_m64n64k16_f16_ra"} <= names
    on_cpu = set(re.findall(r"^inline .*?(\w+)\(", host, re.MULTILINE))
    assert names - on_cpu == {"shared_address", "f16x2_of_e4m3x2", "e4m3_of_float"}  # device's own; and those for both


# ---- conversions --------------------------------------------------------------------------------------------------------
def e4m3(codes):
    return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("function", ["cvt_f16x2_e4m3x2", "f16x2_of_e4m3x2", "cvt_f16x2_e4m3x2_upper"])
def test_all_pairs_of_e4m3_codes_become_float16(function):
    codes = np.arange(65536, dtype=np.uint16)
    argument = "codes[i] << 16 | 77" if "upper" in function else "codes[i]"
    pairs = np.zeros(65536, np.uint32)
    run(f"int i = blockIdx.x * 128 + threadIdx.x; pairs[i] = {function}({argument});", codes, pairs,
        parameters="const unsigned short* codes, unsigned* pairs", grid=(512,))  # fmt: skip
    wanted = e4m3(codes.view(np.uint8)).astype(np.float16)
    wanted = np.where(np.isnan(wanted), np.uint16(0x7FFF).view(np.float16), wanted)
    assert pairs.view(np.uint16).tolist() == wanted.view(np.uint16).tolist()


@pytest.mark.parametrize("function", ["cvt_e4m3_satfinite", "e4m3_of_float"])
def test_floats_become_e4m3(function):
    rng = np.random.default_rng([SEED, 1])
    finite = e4m3(np.arange(127)).astype(np.float32)
    middle = (finite[1:] + finite[:-1]) / 2
    edges = np.concatenate([finite, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    large = np.float32(
        [448.1, 463.9, 464, 465, 1e9, np.inf, 2.0**-10, np.nextafter(np.float32(2.0**-10), np.float32(1)), 1e-38]
    )
    drawn = (rng.standard_normal(20000) * np.exp2(rng.uniform(-13, 12, 20000))).astype(np.float32)
    x = np.concatenate([edges, large, drawn])
    x = np.concatenate([x, -x, np.float32([np.nan])])
    x = np.concatenate([x, np.zeros(-len(x) % THREADS, np.float32)])
    codes = np.zeros(len(x), np.uint8)
    run(f"int i = blockIdx.x * 128 + threadIdx.x; codes[i] = {function}(x[i]);", x, codes,
        parameters="const float* x, unsigned char* codes", grid=(len(x) // THREADS,))  # fmt: skip
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    wanted[np.isnan(x)] = 0x7F
    assert codes.tolist() == wanted.tolist()


def test_pairs_of_float16_and_bytes():
    rng = np.random.default_rng([SEED, 2])
    a, b = ((rng.standard_normal(2 * THREADS) * np.exp2(rng.uniform(-9, 9, 2 * THREADS))).astype(np.float16) for _ in range(2))
    out = np.zeros((3, THREADS), np.uint32)
    body = """
      int i = threadIdx.x;
      out[i] = mul_f16x2(a[i], b[i]);
      out[128 + i] = sub_f16x2(a[i], b[i]);
      out[256 + i] = prmt(a[i], b[i], 0xf3640 + i % 8);
    """
    words = [x.view(np.uint32) for x in (a, b)]
    run(body, *words, out, parameters="const unsigned* a, const unsigned* b, unsigned* out")
    assert out[0].view(np.float16).tolist() == (a.astype(np.float64) * b).astype(np.float16).tolist()
    assert out[1].view(np.float16).tolist() == (a.astype(np.float64) - b).astype(np.float16).tolist()
    source = np.concatenate([word.view(np.uint8).reshape(-1, 4) for word in words], axis=1)
    i = np.arange(THREADS)
    wanted = np.stack([source[i, i % 8], source[i, 4], source[i, 6], source[i, 3]], axis=1)
    assert out[2].view(np.uint8).reshape(-1, 4).tolist() == wanted.tolist()
    run("out[threadIdx.x] = prmt(0x80ff7f00, 0, 0xba98);", out, parameters="unsigned* out")
    assert (out[0] == 0xFFFF0000).all()


def test_pairs_of_bfloat16():
    rng = np.random.default_rng([SEED, 3])
    a, b = (rng.standard_normal(2 * THREADS).astype(ml_dtypes.bfloat16) for _ in range(2))
    a[:6], b[3:9] = [np.nan, np.inf, -np.inf] * 2, [np.nan, np.inf, -np.inf] * 2
    out = np.zeros((2, THREADS), np.uint32)
    body = """
      int i = threadIdx.x;
      out[i] = min_nan_bf16x2(a[i], b[i]);
      out[128 + i] = max_nan_bf16x2(a[i], b[i]);
    """
    run(body, a.view(np.uint32), b.view(np.uint32), out, parameters="const unsigned* a, const unsigned* b, unsigned* out")
    for row, function in zip(out, (np.minimum, np.maximum), strict=True):  # NaN where either is
        wanted = function(a.astype(np.float32), b.astype(np.float32))
        np.testing.assert_array_equal(row.view(ml_dtypes.bfloat16).astype(np.float32), wanted)


# ---- copies of 4 bytes ---------------------------------------------------------------------------------------------------
def test_copies_of_4_bytes():
    x = np.arange(1, THREADS + 1, dtype=np.float32)
    out = np.zeros((3, THREADS), np.float32)
    body = """
      float* s = (float*)shared_memory();
      int i = threadIdx.x;
      cp_async_4(s + i, x + i);
      cp_async_4_or_zeros(s + 128 + i, i % 3 ? x + i : nullptr, i % 3);
      cp_async_commit();
      WAIT
      __syncthreads();
      for (int j = 0; j < 2; j++) out[128 * j + i] = s[128 * j + 127 - i];
    """
    run(body.replace("WAIT", "cp_async_wait<0>();"), x, out, parameters="const float* x, float* out")
    assert out[0].tolist() == x[::-1].tolist()
    assert out[1].tolist() == np.where((x - 1) % 3, x, 0)[::-1].tolist()
    run(body.replace("WAIT", ""), x, out, parameters="const float* x, float* out")
    assert np.isnan(out[:2]).any()


# ---- mbarriers and the copy engine -----------------------------------------------------------------------------------------
# Sums the columns of x [16 steps, 1024]: warp 0 fetches 4 KB a step into a ring of two stages, warps 1 to 3 read them.
RING = """
struct Shared { float stage[2][1024]; unsigned long long full[2], empty[2]; };
extern "C" __global__ void k(const float* x, float* out, const __grid_constant__ TensorMap map) {
  Shared& shared = *(Shared*)shared_memory();
  int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier_init(&shared.full[i], FULL);
      mbarrier_init(&shared.empty[i], 96);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // barriers made
  if (thread < 32) {
    for (int step = 0; step < 16; step++) {
      float* stage = shared.stage[step % 2];
      unsigned long long* full = &shared.full[step % 2];
      mbarrier_wait_parity(&shared.empty[step % 2], step / 2 % 2 ^ 1);  // read
      FETCH
      __syncwarp();  // or a lane that has nothing to fetch falls two phases behind, and takes one for the other
    }
  } else {
    float sums[11] = {};
    for (int step = 0; step < 16; step++) {
      mbarrier_wait_parity(&shared.full[step % 2], step / 2 % 2);  // filled
      for (int i = thread - 32, n = 0; i < 1024; i += 96, n++) sums[n] += shared.stage[step % 2][i ^ 7];
      mbarrier_arrive(&shared.empty[step % 2]);
    }
    for (int i = thread - 32, n = 0; i < 1024; i += 96, n++) out[i ^ 7] = sums[n];
  }
}
"""
FETCH = {  # (arrivals at `full`, how a step is fetched)
    "bulk": (1, """if (thread == 0) {
        mbarrier_arrive_expect_tx(full, 4096);
        for (int i = 0; i < 1024; i += 256) bulk_copy(stage + i, x + step * 1024 + i, 1024, full);
      }"""),
    "tensor": (1, """if (thread == 0) {
        mbarrier_arrive_expect_tx(full, 4096);
        for (int i = 0; i < 32; i += 8) tensor_copy_3d(stage + i * 32, &map, 0, step * 32 + i, 0, full);
      }"""),
    "cp.async": (32, """for (int i = thread; i < 256; i += 32) cp_async_16(stage + 4 * i, x + step * 1024 + 4 * i);
      cp_async_mbarrier_arrive_noinc(full);"""),
}  # fmt: skip


def run_ring(text, way, body=None):
    """Whether the sums are right."""
    x = np.random.default_rng([SEED, 3]).standard_normal((16, 1024)).astype(np.float32)
    aligned = np.zeros(x.nbytes + 16, np.uint8)
    aligned = aligned[-aligned.ctypes.data % 16 :][: x.nbytes].view(np.float32).reshape(x.shape)
    aligned[...] = x
    out = np.zeros(1024, np.float32)
    count, fetch = FETCH[way]
    kernel = compile_with_ptx(text.replace("FULL", str(count)).replace("FETCH", body or fetch), "k")
    as_it_is = tensor_map(aligned.reshape(1, 512, 32), (1, 8, 32), swizzled=False)
    kernel((1,), (THREADS,), (aligned, out, as_it_is), 2 * 4096 + 32)
    return np.abs(out - x.sum(axis=0, dtype=np.float64)).max() < 1e-4


@pytest.mark.parametrize("way", FETCH)
def test_a_ring_of_mbarriers(way):
    assert all(run_ring(RING, way) for _ in range(TIMES))


@pytest.mark.parametrize("way", FETCH)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mbarrier_wait_parity(&shared.full[step % 2], step / 2 % 2);  // filled", "", ""),
        ("mbarrier_wait_parity(&shared.empty[step % 2], step / 2 % 2 ^ 1);  // read", "", ""),
        ("step / 2 % 2);  // filled", "step / 2 % 2 ^ 1);", ""),
        ("step / 2 % 2 ^ 1);  // read", "step / 2 % 2);", "deadlock"),
        ("mbarrier_arrive(&shared.empty[step % 2]);", "", "deadlock"),
        ("&shared.empty[i], 96", "&shared.empty[i], 97", "deadlock"),
        ("&shared.empty[i], 96", "&shared.empty[i], 64", ""),
        ("mbarrier_init(&shared.full[i], FULL)", "", "not initialised"),
        ("__syncthreads();  // barriers made", "", "not initialised"),
        (
            "FETCH",
            "if (step < 15) { FETCH }",
            "deadlock: every thread waits for another, 96 of 96 at an mbarrier, thread 32 of block 0 "
            "for parity 1 of the one at byte 8200",
        ),
        ("FETCH", "FETCH if (step == 0) shared.full[1] = 0;", "overwritten"),
    ],
)
def test_a_mistake_with_mbarriers_shows(way, old, new, message):
    assert RING.count(old) == 1
    assert shows(lambda: run_ring(RING.replace(old, new), way), message)


@pytest.mark.parametrize(
    ("way", "old", "new", "message"),
    [
        ("bulk", "(full, 4096)", "(full, 4080)", ""),
        ("bulk", "(full, 4096)", "(full, 4112)", "deadlock"),
        ("bulk", "x + step * 1024 + i, 1024", "x + step * 1024 + i, 1020", "multiples of 16"),
        ("bulk", "bulk_copy(stage + i,", "bulk_copy(stage + i + 1,", "multiples of 16"),
        ("bulk", "bulk_copy(stage + i,", "bulk_copy(stage + i + 16000,", "not an address in the shared memory"),
        ("bulk", "x + step * 1024 + i,", "x + (1ll << 40),", "memory that is not there"),
        ("tensor", "0, step * 32 + i", "4, step * 32 + i", ""),
        ("cp.async", "cp_async_mbarrier_arrive_noinc", "mbarrier_arrive", ""),
    ],
)
def test_a_mistake_with_copies_shows(way, old, new, message):
    fetch = FETCH[way][1]
    assert fetch.count(old) == 1
    assert shows(lambda: run_ring(RING, way, fetch.replace(old, new)), message)


def test_a_bulk_copy_to_an_mbarrier_that_is_not_fenced_is_an_error():
    assert shows(lambda: run_ring(without(RING, "    fence_mbarrier_init();\n"), "bulk"), "fence_mbarrier_init")


def test_a_block_may_not_end_before_its_bulk_copies():
    body = """
      unsigned long long* barrier = (unsigned long long*)shared_memory();
      if (threadIdx.x) return;
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(barrier, 1024);
      bulk_copy(shared_memory() + 1024, x, 1024, barrier);
    """
    x = np.zeros(1024, np.float32)
    assert shows(lambda: run(body, x, parameters="const float* x") is None, "before its bulk copies had landed")


@pytest.mark.parametrize("fence", ["fence_proxy_async_shared();", ""])
def test_a_bulk_copy_over_what_was_stored_needs_a_fence(fence):
    body = """
      float* s = (float*)shared_memory();
      unsigned long long* barrier = (unsigned long long*)(s + 256);
      if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
      }
      s[threadIdx.x] = 7;
      note_store(s + threadIdx.x, 4);
      FENCE
      __syncthreads();
      if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, 512);
        bulk_copy(s, x, 512, barrier);
      }
      mbarrier_wait_parity(barrier, 0);
      out[threadIdx.x] = s[threadIdx.x];
    """
    x, out = np.arange(THREADS, dtype=np.float32), np.zeros(THREADS, np.float32)
    run(body.replace("FENCE", fence), x, out, parameters="const float* x, float* out")
    assert (out == x).all() == bool(fence)


def test_a_box_of_a_tensor_is_swizzled_and_zero_outside():
    x = np.random.default_rng([SEED, 4]).standard_normal((40, 96)).astype(np.float16)
    out = np.zeros((16, 64), np.float16)
    body = """
      unsigned char* s = shared_memory();
      unsigned long long* barrier = (unsigned long long*)(s + 2048);
      if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barrier, 2048);
        tensor_copy_3d(s, &map, x, y, 0, barrier);
      }
      __syncthreads();
      mbarrier_wait_parity(barrier, 0);
      for (int i = threadIdx.x; i < 128; i += 32) out[i] = ((uint4*)s)[i ^ i / 8 % 8];
    """
    parameters = "uint4* out, int x, int y, const __grid_constant__ TensorMap map"
    padded = np.pad(x, ((16, 16), (64, 64)))
    for column, row in ((0, 0), (32, 24), (64, 30), (-8, -3)):
        run(
            body,
            out,
            np.int32(column),
            np.int32(row),
            tensor_map(x[np.newaxis], (1, 16, 64)),
            parameters=parameters,
            threads=32,
        )
        assert out.tolist() == padded[16 + row : 32 + row, 64 + column : 128 + column].tolist()


# ---- named barriers -----------------------------------------------------------------------------------------------------
# Warps 0 and 1 write for warps 2 and 3, round by round.
NAMED = """
extern "C" __global__ void k(int* out) {
  int* s = (int*)shared_memory();
  int thread = threadIdx.x % 64;
  for (int round = 0; round < 4; round++) {
    if (threadIdx.x < 64) {
      named_barrier_sync(2, 128);  // free
      s[thread] = 100 * round + thread;
      named_barrier_arrive(1, 128);  // written
    } else {
      named_barrier_arrive(2, 128);
      named_barrier_sync(1, 128);  // wait
      out[64 * round + thread] = s[63 - thread];
    }
  }
}
"""


def run_named(text):
    out = np.zeros((4, 64), np.int32)
    compile_with_ptx(text, "k")((1,), (THREADS,), (out,), 256)
    return (out == 100 * np.arange(4)[:, None] + 63 - np.arange(64)).all()


def test_named_barriers():
    assert all(run_named(NAMED) for _ in range(TIMES))


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        ("named_barrier_sync(2, 128);  // free", "", ""),
        ("named_barrier_sync(1, 128);  // wait", "", ""),
        ("named_barrier_arrive(1, 128);  // written", "", "deadlock"),
        ("named_barrier_sync(1, 128);  // wait", "named_barrier_sync(1, 96);", "divergence"),
        ("named_barrier_sync(1, 128);  // wait", "named_barrier_sync(16, 128);", "1 to 15"),
    ],
)
def test_a_mistake_with_named_barriers_shows(line, new, message):
    assert NAMED.count(line) == 1
    assert shows(lambda: run_named(NAMED.replace(line, new)), message)


@pytest.mark.parametrize(
    ("array", "box"),
    [
        (np.zeros((8, 64), np.float32), (8, 64)),  # box rows of 256 bytes
        (np.zeros((8, 65), np.float16)[:, :64], (8, 64)),  # rows of 130 bytes
        (np.zeros((300, 64), np.float16), (257, 64)),
        (np.zeros(64, np.float16), (1, 64)),
    ],
)
def test_a_tensor_map_that_no_driver_makes_is_an_error(array, box):
    with pytest.raises(EmulationError):
        tensor_map(array, box)
