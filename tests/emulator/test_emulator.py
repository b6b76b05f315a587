"""The emulator itself: it computes what CUDA defines, and it catches what a GPU may let pass."""

import numpy as np
import pytest

from .emulator import EmulationError, compile_kernel, compile_with_ptx
from .guarded_memory import GuardedMemory

THREADS = 128

# Sums every row of x [rows, width] over the threads of a block: copies through a ring of two stages, then a tree.
ROW_SUM = """
#include "simt.h"
extern "C" __global__ void row_sum(const float* x, float* sums, int width) {
  float* ring = (float*)simt::shared_memory();
  float* partial = ring + 2 * 128;
  int thread = threadIdx.x;
  const float* row = x + (long long)blockIdx.x * width;
  auto fetch = [&](int start) {
    int i = start + thread;
    if (i < width) simt::copy_async(&ring[i / 128 % 2 * 128 + thread], &row[i], 4);
    simt::commit_copies();
  };
  fetch(0);
  float sum = 0;
  for (int start = 0; start < width; start += 128) {
    fetch(start + 128);
    simt::wait_copies(1);
    __syncthreads();  // filled
    int other = 127 - thread;
    if (start + other < width) sum += ring[start / 128 % 2 * 128 + other];
    __syncthreads();  // read
  }
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();  // partial
  if (thread == 0) sums[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}
"""


def run_row_sum(text=ROW_SUM, rows=5, width=1000, seed=None, shared=(2 * 128 + 4) * 4):
    x = np.random.default_rng().standard_normal((rows, width)).astype(np.float32)
    sums = np.full(rows, np.nan, np.float32)
    compile_kernel(text, "row_sum")((rows,), (THREADS,), (x, sums, np.int32(width)), shared, seed=seed)
    return np.abs(sums - x.sum(axis=1, dtype=np.float64)).max()


def run(body, *args, parameters="int* out", grid=(1,), threads=THREADS, shared=4096, seed=None):
    """Run a kernel of one body over the arguments."""
    text = f'#include "simt.h"\nextern "C" __global__ void k({parameters}) {{ {body} }}'
    compile_kernel(text, "k")(grid, (threads,), args, shared, seed=seed)


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_a_right_kernel_is_right_under_every_schedule(rows):
    assert max(run_row_sum(rows=rows) for _ in range(5)) < 1e-3


def test_the_same_seed_gives_the_same_schedule():
    body = "out[atomicAdd(ticket, 1)] = threadIdx.x + 1000 * blockIdx.x;"
    orders = []
    for seed in (1, 1, 2):
        order, ticket = np.zeros(3 * THREADS, np.int32), np.zeros(1, np.int32)
        run(body, order, ticket, parameters="int* out, int* ticket", grid=(3,), seed=seed)
        orders.append(order.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [t + 1000 * b for b in range(3) for t in range(THREADS)]


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("barrier after filling", "    __syncthreads();  // filled\n"),
        ("barrier before refilling", "    __syncthreads();  // read\n"),
        ("barrier before the last sum", "  __syncthreads();  // partial\n"),
        ("wait for the copies", "    simt::wait_copies(1);\n"),
    ],
)
def test_a_missing_line_shows(what, line):
    assert ROW_SUM.count(line) == 1
    wrong = [not run_row_sum(ROW_SUM.replace(line, "")) < 1e-3 for _ in range(8)]
    assert any(wrong), what


def test_a_late_copy_read_early_shows():
    wrong = [not run_row_sum(ROW_SUM.replace("wait_copies(1)", "wait_copies(2)")) < 1e-3 for _ in range(4)]
    assert any(wrong)


def test_uninitialised_shared_memory_is_nan():
    out = np.zeros(THREADS, np.float32)
    run("out[threadIdx.x] = ((float*)simt::shared_memory())[threadIdx.x];", out, parameters="float* out")
    assert np.isnan(out).all()


def test_a_read_outside_shared_memory_is_nan():
    out = np.zeros(1, np.float32)
    run("out[0] = ((float*)simt::shared_memory())[1024];", out, parameters="float* out")
    assert np.isnan(out[0])


@pytest.mark.parametrize("index", [-1, 32, 1000])
def test_a_write_outside_an_array_is_an_error_and_a_read_is_nan(index):
    memory = GuardedMemory()
    array, other = memory.empty((32,), "float32"), memory.asarray(np.ones(1, np.float32))
    assert np.isnan(array).all()
    run(f"out[threadIdx.x] = out[{index}];", array, parameters="float* out", threads=32)
    assert np.isnan(array).all()
    memory.check()
    run(f"if (threadIdx.x == 7) out[{index}] = 1;", array, parameters="float* out", threads=32)
    with pytest.raises(EmulationError, match="outside of an array"):
        memory.check()
    assert other[0] == 1


WRONG = {
    "if (threadIdx.x % 32) __syncwarp();": "deadlock",
    "if (threadIdx.x < 64) { __syncthreads(); } else {\n __syncthreads(); }": "divergence",
    "if (threadIdx.x % 2) __syncwarp(); else __shfl_xor_sync(~0u, 1, 1);": "divergence",
    "__syncwarp(0xffff);": "partial warp mask",
    "while (*(volatile int*)out == 0) simt::yield();": "livelock",
    "out[1ll << 40] = 1;": "memory that is not there",
    "*(int2*)(out + 1) = {1, 2};": "undefined behaviour",
    "out[0] = (int)gridDim.x * 0x7fffffff * 2;": "undefined behaviour",
    "int a[4]; a[threadIdx.x] = 1; out[0] = a[0];": "undefined behaviour",
    "((int*)simt::shared_memory())[(int)threadIdx.x - 1] = 1;": "outside the shared memory",
    "((int*)simt::shared_memory())[threadIdx.x + 1000] = 1;": "outside the shared memory",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_cannot_go_on_is_an_error(body):
    every_body = "".join(f"if (which == {i}) {{ {b} }}\n" for i, b in enumerate([*WRONG, "out[threadIdx.x % 4] = 7;"]))
    out = np.zeros(4, np.int32)
    with pytest.raises(EmulationError, match=WRONG[body]):
        run(every_body, out, np.int32([*WRONG].index(body)), parameters="int* out, int which")
    run(every_body, out, np.int32(len(WRONG)), parameters="int* out, int which")  # the next launch is none the worse
    assert out.tolist() == [7] * 4


def test_threads_that_have_ended_count_at_the_barrier():
    out = np.zeros(1, np.int32)
    run("if (threadIdx.x >= 64) return; __syncthreads(); atomicAdd(out, 1);", out)
    assert out[0] == 64


def test_every_block_of_a_grid_runs_once():
    out = np.zeros((5, 6, 7), np.int32)
    body = "atomicAdd(&out[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x], 1);"
    run(body, out, grid=(7, 6, 5), threads=32)
    assert (out == 32).all()


def test_shuffles_votes_and_atomics():
    out = np.zeros((9, 32), np.int32)
    body = """
      int lane = threadIdx.x;
      out[lane] = __shfl_sync(~0u, lane, 5);
      out[32 + lane] = __shfl_xor_sync(~0u, lane, 16);
      out[64 + lane] = __shfl_down_sync(~0u, lane, 4);
      out[96 + lane] = __shfl_up_sync(~0u, lane, 4);
      out[128 + lane] = __shfl_sync(~0u, lane, 1, 8);
      out[160 + lane] = __ballot_sync(~0u, lane % 2) == 0xaaaaaaaa;
      atomicMax(&out[192], lane);
      atomicAdd((float*)&out[193], 0.5f);
      out[224 + lane] = __umulhi(0x80000000u, lane);
      out[256 + lane] = (int)__float_as_uint(1.0f) + min(lane, 3u) + max(lane, 30);
    """
    run(body, out, threads=32)
    lane = np.arange(32)
    assert (out[0] == 5).all()
    assert (out[1] == lane ^ 16).all()
    assert (out[2] == np.where(lane < 28, lane + 4, lane)).all()
    assert (out[3] == np.where(lane >= 4, lane - 4, lane)).all()
    assert (out[4] == lane // 8 * 8 + 1).all()
    assert (out[5] == 1).all()
    assert out[6, 0] == 31
    assert out[6, 1:2].view(np.float32)[0] == 16
    assert (out[7] == lane // 2).all()
    assert (out[8] == 0x3F800000 + np.minimum(lane, 3) + np.maximum(lane, 30)).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros(4, np.float32), np.int32(1)), "float32 passed for a i4"),
        ((np.zeros(4, np.int32), np.int64(1)), "int64 passed for a i4"),
        ((np.zeros(4, np.int32), 1), "NumPy scalar"),
        ((np.zeros(4, np.int32), np.zeros(1, np.int32)), "NumPy scalar"),
        ((np.int32(0), np.int32(0)), "array is wanted"),
        ((np.zeros(8, np.int32)[::2], np.int32(1)), "not contiguous"),
        ((np.zeros(4, np.int32),), "takes 2 arguments"),
    ],
)
def test_an_argument_of_another_type_is_an_error(args, message):
    with pytest.raises(EmulationError, match=message):
        run("out[0] = n;", *args, parameters="int* out, int n")


@pytest.mark.parametrize("shape", [{"grid": (0,)}, {"grid": (1, 65536)}, {"threads": 48}, {"shared": 60000}])
def test_a_launch_that_no_gpu_takes_is_an_error(shape):
    with pytest.raises(EmulationError):
        run("", np.zeros(1, np.int32), **shape)


def test_a_kernel_gets_the_shared_memory_that_it_asks_for():
    text = """#include "simt.h"
    extern "C" __global__ void k(int* out, int words) {
      int* s = (int*)simt::shared_memory();
      for (int i = threadIdx.x; i < words; i += 128) s[i] = i;
      __syncthreads();
      if (threadIdx.x == 0) out[0] = s[words - 1];
    }"""
    out = np.zeros(1, np.int32)
    kernel = compile_kernel(text, "k")
    size = 227 << 10
    assert kernel.max_dynamic_shared_size_bytes == 48 << 10
    kernel.max_dynamic_shared_size_bytes = size
    kernel((1,), (THREADS,), (out, np.int32(size // 4)), size)
    assert out[0] == size // 4 - 1
    with pytest.raises(EmulationError, match="bytes of shared memory"):
        kernel((1,), (THREADS,), (out, np.int32(1)), size + 1)
    kernel.max_dynamic_shared_size_bytes = size + 1
    with pytest.raises(EmulationError, match="bytes of shared memory"):
        kernel((1,), (THREADS,), (out, np.int32(1)), size)


def test_a_struct_goes_by_value():
    text = """#include "simt.h"
    struct Params { const float* x; double* out; long long offset; int n; float scale; };
    extern "C" __global__ void k(const __grid_constant__ Params params, int extra) {
      int i = threadIdx.x;
      if (i < params.n) params.out[i] = params.scale * params.x[params.offset + i] + extra;
    }"""
    layout = np.dtype([("x", "u8"), ("out", "u8"), ("offset", "i8"), ("n", "i4"), ("scale", "f4")])
    memory = GuardedMemory()
    x, out = memory.asarray(np.arange(50, dtype=np.float32)), memory.empty((32,), "float64")
    params = np.zeros((), layout)
    params["x"], params["out"], params["offset"], params["n"], params["scale"] = x.data.ptr, out.data.ptr, 20, 30, 0.5
    kernel = compile_kernel(text, "k")
    kernel((1,), (32,), (params, np.int32(7)))
    assert out[:30].tolist() == [0.5 * (20 + i) + 7 for i in range(30)]
    assert np.isnan(out[30:]).all()
    memory.check()
    for wrong in (np.zeros((), [("x", "u8", 4), ("y", "u1")]), np.zeros(1, layout), np.int64(0), np.zeros((), np.int64)):
        with pytest.raises(EmulationError, match="argument 0"):
            kernel((1,), (32,), (wrong, np.int32(7)))


# ---- what one block leaves for another ----------------------------------------------------------------------------------
# What comes between the stores of all threads and one thread's count, and whether that suffices.
ORDERS = {
    "__syncthreads(); COUNT(atom_add_acq_rel_gpu)": True,
    "named_barrier_sync(1, 128); COUNT(atom_add_acq_rel_gpu)": True,
    "mbarrier_arrive(barrier); mbarrier_wait_parity(barrier, 0); COUNT(atom_add_acq_rel_gpu)": True,
    "__syncthreads(); fence_acq_rel_gpu(); COUNT(atom_add_relaxed_gpu)": True,
    "__syncthreads(); __threadfence(); COUNT(atomicAdd)": True,
    "fence_acq_rel_gpu(); __syncthreads(); COUNT(atom_add_relaxed_gpu)": True,  # each thread fences its own stores
    "__syncthreads(); COUNT(atom_add_relaxed_gpu)": False,
    "__syncthreads(); COUNT(atomicAdd)": False,
    "COUNT(atom_add_acq_rel_gpu)": False,
    "__syncwarp(); COUNT(atom_add_acq_rel_gpu)": False,
    "__shfl_sync(~0u, 1, 1); COUNT(atom_add_acq_rel_gpu)": False,
    "fence_acq_rel_gpu(); COUNT(atom_add_relaxed_gpu)": False,
    "if (thread == 40) fence_acq_rel_gpu(); __syncthreads(); COUNT(atom_add_relaxed_gpu)": False,
    "if (thread < 64) named_barrier_sync(1, 64); COUNT(atom_add_acq_rel_gpu)": False,
    "if (thread < 64) named_barrier_arrive(1, 128); else named_barrier_sync(1, 128); COUNT(atom_add_acq_rel_gpu)": False,
    "mbarrier_arrive(barrier); COUNT(atom_add_acq_rel_gpu)": False,
}
BETWEEN_BLOCKS = """
#define COUNT(add) if (thread == 40) *counted = add(counter, 1);
extern "C" __global__ void k(float* data, unsigned* counter, float* seen, int order, int last_reads) {
  unsigned* counted = (unsigned*)shared_memory();
  unsigned long long* barrier = (unsigned long long*)shared_memory() + 1;
  int thread = threadIdx.x, own = blockIdx.x * 128, other = 128 - own;
  if (thread == 0) mbarrier_init(barrier, 128);
  __syncthreads();
  if (last_reads || blockIdx.x == 0) {
    store_for_others(&data[own + thread], own + thread + 1.0f);
    ORDER
  } else if (thread == 0) {
    while (atom_add_acq_rel_gpu(counter, 0) == 0) simt::yield();
  }
  __syncthreads();
  if (last_reads ? *counted == 1 : blockIdx.x == 1) seen[thread] = load_from_others(&data[other + 127 - thread]) - other;
}
"""


@pytest.mark.parametrize("last_reads", [True, False], ids=["the last to count reads", "one block waits for the other"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_a_block_leaves_for_another_needs_a_barrier_and_a_release(order, last_reads):
    orders = "".join(f"if (order == {i}) {{ {text} }}\n" for i, text in enumerate(ORDERS))
    kernel = compile_with_ptx(BETWEEN_BLOCKS.replace("ORDER", orders), "k")

    def all_is_seen():
        data, seen = np.zeros(256, np.float32), np.zeros(THREADS, np.float32)
        kernel(
            (2,), (THREADS,), (data, np.zeros(1, np.uint32), seen, np.int32([*ORDERS].index(order)), np.int32(last_reads)), 64
        )
        if last_reads:
            assert (data == 1 + np.arange(256)).all(), "at the launch's end everything is there"
        return (seen == 128 - np.arange(THREADS)).all()

    assert all(all_is_seen() for _ in range(20 if ORDERS[order] else 200)) == ORDERS[order]


def test_a_store_for_others_is_seen_by_those_who_know_of_it():
    """Its own thread, and its block after a barrier; and stores to one place keep their order."""
    out = np.zeros((3, THREADS), np.float32)
    body = """
      int thread = threadIdx.x;
      for (int i = 0; i < 5; i++) store_for_others(&out[thread], i + 1.0f);
      out[128 + thread] = load_from_others(&out[thread]);
      __syncthreads();
      out[256 + thread] = load_from_others(&out[127 - thread]);
    """
    text = f'extern "C" __global__ void k(float* out) {{ {body} }}'
    for _ in range(5):
        out[:] = 0
        compile_with_ptx(text, "k")((1,), (THREADS,), (out,))
        assert (out == 5).all()
