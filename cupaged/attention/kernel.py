"""run(): the attention of one layer by one launch of cuda_src/persistent_attention.cu, from a plan that all layers share."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.attention.planner import PREFILL_ROWS, STEP, Plan
from cupaged.cuda import jit
from cupaged.errors import InvalidArgument
from cupaged.ops import cuda as ops

Array = Any  # cupy.ndarray

SOURCE, NAME = "persistent_attention.cu", "persistent_attention"
THREADS = 128
_DTYPES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}}
_HEAD_DIMS = (64, 128)
_RESERVED = 1 << 10  # bytes of shared memory that CUDA keeps for itself in every CTA
_NO_WINDOW = 2**30  # longer than any sequence; position - window must not overflow
# What the kernel reads of a plan, in the order of its arguments.
_INDEX = ("q_indptr", "seq_lens", "page_indptr", "page_indices")
_WORK = ("items", "cta_indptr", "tasks")


def run(
    plan: Plan,
    q: Array,
    k_pool: Array,
    v_pool: Array,
    scale: float | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of every row of `q` over its own sequence: out, or (out, lse). Queued on the current stream.

    q [num_tokens, num_heads, head_dim]; pools [num_kv_heads, num_blocks, block_size, head_dim], one layer's; all bfloat16 or
    all float16, C-contiguous, head_dim 64 or 128. `scale` is 1 / sqrt(head_dim) unless given. -> out like q (the array `out` if
    one is given), lse [num_tokens, num_heads] float32, natural log. A row that sees nothing gives out 0 and lse -inf.

    The plan is uploaded by the first run. Partial results lie in a workspace that all runs on a device share: use one stream
    at a time. InvalidArgument, before anything is queued, where the arrays do not fit each other or the plan.
    """
    num_tokens, head_dim = _check(plan, q, k_pool, v_pool, out)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if not 0 < scale < math.inf:
        raise InvalidArgument(f"scale is {scale}; give a positive number")
    out = ops.empty(q.shape, q.dtype) if out is None else out
    lse = ops.empty((num_tokens, plan.num_heads), "float32") if return_lse else None
    if q.size:
        uploaded, workspace = _uploaded(plan), _workspace(plan, num_tokens * plan.num_heads)
        window = _NO_WINDOW if plan.sliding_window is None else min(plan.sliding_window, _NO_WINDOW)
        sizes = (
            plan.num_kv_heads,
            plan.num_heads // plan.num_kv_heads,
            plan.num_blocks,
            plan.block_size.bit_length() - 1,
            window,
        )
        written = (out, workspace.unwanted_lse if lse is None else lse)
        arrays = (q, k_pool, v_pool, *written, *uploaded, workspace.out, workspace.lse, workspace.counters)
        args = (*arrays, *map(np.int32, sizes), np.float32(scale))
        stages = stages_of_device(head_dim)
        launch = _kernel(q.dtype.name, head_dim, stages)
        launch((plan.num_ctas,), (THREADS, 1, 1), args, shared_mem=shared_bytes(head_dim, stages))
    return (out, lse) if return_lse else out


def variants() -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) of every kernel that `run` can ask for."""
    shapes = [{"HEAD_DIM": head_dim, "STAGES": stages} for head_dim, stages in ((64, 4), (64, 2), (128, 3), (128, 2))]
    return [(SOURCE, NAME, {**dtype, **shape}) for dtype in _DTYPES.values() for shape in shapes]


def shared_bytes(head_dim: int, stages: int) -> int:
    """Dynamic shared memory of a CTA: the size of the kernel's `struct Shared`."""
    row = 2 * head_dim
    return stages * 2 * STEP * row + PREFILL_ROWS * row + 2 * 4 * 16 * 4 + 4


def num_ctas_of_device(head_dim: int, dtype: str = "bfloat16") -> int:
    """How many CTAs of the kernel the current device holds at once: the `num_ctas` to plan for."""
    return _num_ctas(head_dim, dtype, _device())


@functools.cache
def _num_ctas(head_dim: int, dtype: str, device: int) -> int:
    stages = stages_of_device(head_dim)
    kernel = _kernel(dtype, head_dim, stages)
    occupancy = ops.cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
    per_sm = occupancy(kernel.kernel.ptr, THREADS, shared_bytes(head_dim, stages))
    return per_sm * ops.cupy.cuda.Device(device).attributes["MultiProcessorCount"]


def stages_of_device(head_dim: int) -> int:
    """As many stages of K/V, up to four, as let two CTAs fit into an SM of the current device; two at least."""
    room = _shared_memory_per_sm(_device())
    return next((n for n in (4, 3) if 2 * (shared_bytes(head_dim, n) + _RESERVED) <= room), 2)


@functools.cache
def _shared_memory_per_sm(device: int) -> int:
    return ops.cupy.cuda.Device(device).attributes["MaxSharedMemoryPerMultiprocessor"]


def _device() -> int:
    return ops.cupy.cuda.runtime.getDevice()


def _kernel(dtype: str, head_dim: int, stages: int) -> Any:
    kernel = jit.kernel(SOURCE, NAME, **_DTYPES[dtype], HEAD_DIM=head_dim, STAGES=stages)
    size = shared_bytes(head_dim, stages)
    if kernel.max_dynamic_shared_size_bytes < size:
        kernel.max_dynamic_shared_size_bytes = size
        kernel.preferred_shared_memory_carveout = 100  # percent; or the driver may leave room for one CTA only
    return kernel


def _check(plan: Plan, q: Array, k_pool: Array, v_pool: Array, out: Array | None) -> tuple[int, int]:
    """(num_tokens, head_dim), once everything is seen to fit."""
    num_tokens = int(plan.q_indptr[-1])
    head_dim = q.shape[-1] if q.ndim else 0
    if head_dim not in _HEAD_DIMS:
        raise InvalidArgument(f"q has head_dim {head_dim}; the kernel knows 64 and 128")
    if q.dtype.name not in _DTYPES:
        raise InvalidArgument(f"q is {q.dtype.name}; the kernel takes {' and '.join(_DTYPES)}")
    rows = (num_tokens, plan.num_heads, head_dim)
    pool = (plan.num_kv_heads, plan.num_blocks, plan.block_size, head_dim)
    for name, array, shape in (("q", q, rows), ("k_pool", k_pool, pool), ("v_pool", v_pool, pool), ("out", out, rows)):
        if array is None:
            continue
        if array.shape != shape:
            raise InvalidArgument(f"{name} has shape {array.shape}; the plan was made for {shape}")
        if array.dtype != q.dtype:
            raise InvalidArgument(f"{name} is {array.dtype.name} and q {q.dtype.name}; give both one dtype")
        if not array.flags.c_contiguous:
            raise InvalidArgument(f"{name} has strides {array.strides}; give a C-contiguous array")
    return num_tokens, head_dim


def _uploaded(plan: Plan) -> list[Array]:
    """The plan's arrays on the current device, one copy of all of them, kept with the plan."""
    device = _device()
    if device not in plan.uploaded:
        arrays = [getattr(plan, name).reshape(-1) for name in (*_INDEX, *_WORK)]
        sizes = [-(-array.size // 4) * 4 for array in arrays]  # every one begins at 16 bytes, as the kernel's loads need
        starts = np.cumsum([0, *sizes])
        together = np.zeros(starts[-1], np.int32)
        for start, array in zip(starts, arrays, strict=False):
            together[start : start + array.size] = array
        on_device = ops.upload(together)
        plan.uploaded[device] = [on_device[a:b] for a, b in itertools.pairwise(starts)]
    return plan.uploaded[device]


@dataclass
class _Workspace:
    """Where the parts of cut tasks meet. The kernel wants the counters zero and leaves them so."""

    out: Array  # float32 [num_slots, PREFILL_ROWS, head_dim], flat
    lse: Array  # float32 [num_slots, PREFILL_ROWS], flat
    counters: Array  # uint32 [num_cut_tasks]
    unwanted_lse: Array  # float32 [num_tokens * num_heads]


_workspaces: dict[int, _Workspace] = {}


def _workspace(plan: Plan, num_rows: int) -> _Workspace:
    """The device's workspace, made anew where it is too small: for any plan for as many CTAs, and twice as many rows."""
    device = _device()
    kept = _workspaces.get(device)
    slots = 2 * plan.num_ctas  # no plan has more slots or cut tasks
    if kept is None or kept.counters.size < slots or kept.unwanted_lse.size < num_rows:
        kept = _workspaces[device] = _Workspace(
            ops.empty((slots * PREFILL_ROWS * max(_HEAD_DIMS),), "float32"),
            ops.empty((slots * PREFILL_ROWS,), "float32"),
            ops.upload(np.zeros(slots, np.uint32)),
            ops.empty((2 * num_rows,), "float32"),
        )
    return kept
