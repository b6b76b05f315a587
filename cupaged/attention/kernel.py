"""run(): the attention of one layer by one launch of a persistent kernel, from a plan that all layers share."""

from __future__ import annotations

import functools
import itertools
import math
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged.attention import inputs
from cupaged.attention.device_plan import DevicePlanner
from cupaged.attention.planner import LEAST_PAGE, Grid, Plan
from cupaged.cuda import jit, tensor_map
from cupaged.cuda.launch import launch_dependent
from cupaged.errors import InvalidArgument, OutOfMemory

Array = Any  # cupy.ndarray

SOURCE, NAME = "persistent_attention.cu", "persistent_attention"
NAMES = {"sm80": NAME, "sm90": "persistent_attention_sm90"}
SOURCES = {kernel: f"{name}.cu" for kernel, name in NAMES.items()}
THREADS = {"sm80": 128, "sm90": 384}
STEP, TILE_ROWS = {"sm80": 16, "sm90": 128}, {"sm80": 64, "sm90": 128}
_DTYPES = {"bfloat16": {"DTYPE_BF16": 1}, "float16": {"DTYPE_F16": 1}}
_KV_DTYPES = {"uint8": {"KV_FP8": 1}, "int8": {"KV_INT8": 1}}  # a pool of float8_e4m3 is an array of uint8
_RESERVED = 1 << 10  # bytes of shared memory that CUDA keeps for itself in every CTA
_NO_WINDOW = 2**30  # longer than any sequence; position - window must not overflow

_POINTERS = "q k_pool v_pool out lse page_indices k_pages v_pages header tiles ctas mask kv_scales partial_out partial_lse"
# struct Params of cuda_src/work_list.cuh, passed by value
PARAMS = np.dtype(
    [(name, "<u8") for name in [*_POINTERS.split(), "counters", "flag"]]
    + [("head_stride", "<i8")]
    + [(name, "<i4") for name in ("num_kv_heads", "group_size", "num_blocks", "block_shift", "window", "decode_rows")]
    + [("scale", "<f4"), ("reserved", "<i4")]
)
assert PARAMS.itemsize == 176, "as in work_list.cuh"
_WORK_OFFSET = PARAMS.fields["header"][1]  # of header, tiles and ctas


def run(
    plan: Plan | DevicePlanner,
    q: Array,
    k_pool: Array | None,
    v_pool: Array | None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    out: Array | None = None,
    mask: Array | None = None,
    kv_scales: Array | None = None,
    block_k_ptrs: Array | None = None,
    block_v_ptrs: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of every row of `q` over its own sequence: out, or (out, lse). Queued on the current stream.

    q            [num_tokens, num_heads, head_dim]  bfloat16 or float16; head_dim 64 or 128
    k_pool, v_pool  [num_kv_heads, num_blocks, block_size, head_dim]  one layer's; like q, or int8, or uint8 (float8_e4m3)
    scale        1 / sqrt(head_dim) unless given
    mask         [words]  uint32, as `pack_mask` makes it; exactly if the plan has a mask_indptr
    kv_scales    of 8-bit pools, k's first: int8 float16 [num_kv_heads, num_blocks, block_size, 2], of the token's head vector;
                 float8_e4m3 float32 [num_kv_heads, 2], all 1 unless given
    block_k_ptrs, block_v_ptrs  like the plan's page_indices, uint64: the addresses of pages [num_kv_heads, block_size,
                 head_dim], multiples of 16, instead of blocks of pools (which may then be None: K/V are like q, or float8_e4m3
                 if there are kv_scales); not with int8. What is not a page of such a size is read all the same
    -> out like q (the array `out` if one is given), lse [num_tokens, num_heads] float32, natural log

    A row that sees nothing gives out 0 and lse -inf. All arrays are C-contiguous CuPy arrays of the current device; but mask,
    scales and pointers may be NumPy's, they are uploaded then. The plan is uploaded by its first run. Partial results lie in a
    workspace that all runs on a device share: use one stream at a time. InvalidArgument, before anything is queued, where the
    arrays do not fit each other or the plan.
    """
    cupy = jit.import_cupy()
    device = cupy.cuda.runtime.getDevice()
    for name, array in (("q", q), ("k_pool", k_pool), ("v_pool", v_pool)):
        if not isinstance(array, cupy.ndarray) and (array is not None or block_k_ptrs is None or name == "q"):
            raise InvalidArgument(f"{name} is a {type(array).__module__}.{type(array).__name__}; give a CuPy array")
    kv = None if k_pool is None else k_pool.dtype
    key = device, q.dtype, q.shape[-1:], kv, mask is None, kv_scales is None, block_k_ptrs is None, block_v_ptrs is None
    launch = plan.uploaded.get(key)
    if launch is None:
        launch = plan.uploaded[key] = _Launch(cupy, plan, *key)
    launch.check("q", q, launch.q_shape, q.dtype)
    if kv is not None:
        launch.check("k_pool", k_pool, launch.pool_shape, kv)
        launch.check("v_pool", v_pool, launch.pool_shape, kv)
    if out is None:
        out = _empty(cupy, launch.q_shape, q.dtype)
    else:
        launch.check("out", out, launch.q_shape, q.dtype)
    if launch.has_more:
        launch.take_more(cupy, plan, mask, kv_scales, block_k_ptrs, block_v_ptrs)
    if scale != launch.scale:
        launch.set_scale(scale)
    lse = _empty(cupy, launch.q_shape[:2], np.float32) if return_lse else None
    if launch.function is not None:
        pools = (k_pool.data.ptr, v_pool.data.ptr) if block_k_ptrs is None else (0, 0)
        addresses = (q.data.ptr, *pools, out.data.ptr)
        if (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % 16:
            inputs.refuse_unaligned(addresses)
        struct.pack_into("=5Q", launch.buffer, 0, *addresses, lse.data.ptr if return_lse else 0)
        arguments = launch.arguments if launch.map is None else (*launch.arguments, *map(launch.map, pools))
        for work in launch.passes:
            struct.pack_into("=3Q", launch.buffer, _WORK_OFFSET, *work)
            launch_dependent(launch.function, launch.grid, launch.block, arguments, shared_mem=launch.shared_bytes)
    return (out, lse) if return_lse else out


class _Launch:
    """All that the runs of one plan on one device, by one variant of the kernel, have in common."""

    def __init__(self, cupy, plan, device, dtype, head_dim, kv, no_mask, no_scales, no_k_pages, no_v_pages) -> None:
        name, head_dim, kernel = dtype.name, head_dim[0] if head_dim else 0, plan.kernel
        kv = inputs.kv_dtype(plan, dtype, head_dim, kv, no_mask, no_scales, no_k_pages, no_v_pages)
        if plan.grid.step != STEP[kernel]:
            raise InvalidArgument(f"the plan's grid has step {plan.grid.step}; give plan grids of step {STEP[kernel]}")
        self.check = functools.partial(inputs.check_array, cupy.ndarray, device)
        self.q_shape = (plan.num_tokens, plan.num_heads, head_dim)
        self.pool_shape = (plan.num_kv_heads, *plan.pool_shape, head_dim)
        self.kv, self.has_more = kv, kv != dtype or not no_mask or not no_k_pages
        self.scale: float | None = 0.0
        self.buffer = bytearray(PARAMS.itemsize)
        self.params = np.frombuffer(self.buffer, PARAMS)
        self.arguments: tuple = (self.params.reshape(()),)
        self.function, self.map, self.kept = None, None, {}
        self.set_scale(None)
        if plan.num_tokens == 0:
            return
        row_bytes = head_dim * kv.itemsize
        work, addresses, self.passes = _uploaded(cupy, plan, device)
        workspace = _workspace(cupy, plan, device)
        values = {
            "partial_out": workspace.out.data.ptr,
            "partial_lse": workspace.lse.data.ptr,
            "counters": workspace.counters.data.ptr,
            "flag": workspace.flag.data.ptr,
            **addresses,
            "head_stride": plan.pool_shape[1] * row_bytes * (plan.pool_shape[0] if no_k_pages else 1),
            "num_kv_heads": plan.num_kv_heads,
            "group_size": plan.num_heads // plan.num_kv_heads,
            "num_blocks": plan.num_blocks,
            "block_shift": plan.block_size.bit_length() - 1,
            "window": _NO_WINDOW if plan.sliding_window is None else min(plan.sliding_window, _NO_WINDOW),
            "decode_rows": plan.decode_rows,
        }
        for what, value in values.items():
            self.params[what] = value
        self.kept = {"work": work, "workspace": workspace}
        if kv == np.uint8 and no_scales:
            self._take("kv_scales", workspace.unit_scales(cupy, plan.num_kv_heads))
        defines = _defines(name, head_dim, kv.name, not no_mask, not no_k_pages, plan.decode_only)
        made_for, fits = (plan.grid.tile_rows, plan.grid.step), (TILE_ROWS[kernel], STEP[kernel])
        if made_for != fits:
            raise InvalidArgument(f"the plan's grid has tile_rows and step {made_for}; give {fits}, the {kernel} kernel's")
        if kernel == "sm90":
            defines, rows = variant_sm90(name, head_dim, kv.name), math.prod(self.pool_shape[:3])
            box_rows = min(plan.block_size, STEP["sm90"])
            if kv == dtype:
                self.map = lambda address: tensor_map.encode_atoms(address, rows, head_dim, box_rows, name)
        self.function, self.shared_bytes = _kernel(kernel, head_dim, kv.itemsize, defines)
        self.grid, self.block = (plan.num_ctas, 1, 1), (THREADS[kernel], 1, 1)

    def set_scale(self, scale: float | None) -> None:
        value = 1 / math.sqrt(self.q_shape[2]) if scale is None else scale
        if not 0 < value < math.inf:
            raise InvalidArgument(f"scale is {scale}; give a positive number")
        self.params["scale"], self.scale = value, scale

    def take_more(self, cupy, plan: Plan, mask, kv_scales, k_pages, v_pages) -> None:
        """Check and point to what only some variants read."""
        if mask is not None:
            mask = self._on_device(cupy, "mask", mask, None, np.uint32)
            if mask.size < plan.mask_words:
                raise InvalidArgument(f"mask has {mask.size} words; give the {plan.mask_words} of mask_indptr")
            self._take("mask", mask)
        if kv_scales is not None:
            shape, dtype = ((*self.pool_shape[:3], 2), "float16") if self.kv == np.int8 else ((plan.num_kv_heads, 2), "float32")
            self._take("kv_scales", self._on_device(cupy, "kv_scales", kv_scales, shape, dtype))
        for name, field_name, pages in (("block_k_ptrs", "k_pages", k_pages), ("block_v_ptrs", "v_pages", v_pages)):
            if pages is not None:
                inputs.check_addresses(name, pages)
                pages = self._on_device(cupy, name, pages, None, np.uint64)
                self._take(field_name, inputs.page_pointers(cupy, plan, name, pages, self.q_shape[2] * self.kv.itemsize))

    def _on_device(self, cupy, name: str, array: Array, shape: tuple[int, ...] | None, dtype: Any) -> Array:
        """A small argument, uploaded if it is NumPy's, and checked; shape None: any."""
        array = cupy.asarray(array) if type(array) is np.ndarray else array
        self.check(name, array, shape, np.dtype(dtype))
        return array

    def _take(self, name: str, array: Array) -> None:
        self.kept[name] = array  # a captured graph reads it as long as the plan lives
        self.params[name] = array.data.ptr


def variants(
    dtype: str | None = None,
    head_dim: int | None = None,
    kv_dtype: str | None = None,
    *,
    mask: bool | None = None,
    pointers: bool | None = None,
    stages: int | None = None,
) -> list[tuple[str, str, dict[str, int]]]:
    """(source, kernel, defines) of every kernel that `run` can ask for; what is given is held to that.

    kv_dtype: dtype's own name, "uint8" (float8_e4m3) or "int8". `stages`: see `stages_of_device`.
    """
    found = []
    flags = (False, True)
    for name, dim in itertools.product(_DTYPES, inputs.HEAD_DIMS):
        for kv, with_mask, with_pointers, decode_only in itertools.product((name, *_KV_DTYPES), flags, flags, flags):
            wanted = dtype in (None, name) and head_dim in (None, dim) and kv_dtype in (None, kv)
            wanted &= mask in (None, with_mask) and pointers in (None, with_pointers)
            if wanted and not (kv == "int8" and with_pointers):
                defines = _defines(name, dim, kv, with_mask, with_pointers, decode_only)
                for n in (stages,) if stages else sorted({_most_stages(dim, np.dtype(kv).itemsize, room) for room in _ROOMS}):
                    found.append((SOURCE, NAME, {**defines, "STAGES": n}))
    return found


def variants_of_device(
    dtype: str,
    head_dim: int,
    kv_dtype: str | None = None,
    block_size: int = 16,
    *,
    prefill: bool = True,
    batch_invariant: bool = False,
) -> list[tuple[str, str, dict[str, int]]]:
    """What `run` asks for on the current device with plans made with `grids_of_device`, without masks and pointers."""
    kv = np.dtype(kv_dtype or dtype)
    found = variants(dtype, head_dim, kv.name, mask=False, pointers=False, stages=stages_of_device(head_dim, kv.itemsize))
    if batch_invariant:
        return [variant for variant in found if "DECODE_ONLY" not in variant[2]]
    wide = _takes_sm90(kv.name) and block_size >= LEAST_PAGE
    if not prefill or wide:
        found = [variant for variant in found if "DECODE_ONLY" in variant[2]]
    if prefill and wide:
        found.append((SOURCES["sm90"], NAMES["sm90"], variant_sm90(dtype, head_dim, kv.name)))
    return found


def _defines(dtype: str, head_dim: int, kv: str, mask: bool, pointers: bool, decode_only: bool) -> dict[str, int]:
    """The macros of a variant but STAGES."""
    defines = {**_DTYPES[dtype], "HEAD_DIM": head_dim, **({} if kv == dtype else _KV_DTYPES[kv])}
    flags = {"MASK": mask, "POINTERS": pointers, "DECODE_ONLY": decode_only}
    return defines | {name: 1 for name, given in flags.items() if given}


def shared_bytes(head_dim: int, stages: int, kv_bytes: int = 2) -> int:
    """Dynamic shared memory of a CTA of the sm80 kernel, the size of its `struct Shared`; kv_bytes of an element of K/V."""
    row_bytes = head_dim * kv_bytes
    chunk = 64 if row_bytes == 256 else 128  # positions
    stage = 2 * chunk * row_bytes + (4 * chunk if kv_bytes == 1 else 0)  # K, V, scales
    return stages * stage + 2 * 4 * 16 * 4 + 4


def shared_bytes_sm90(head_dim: int, stages: int, kv_bytes: int = 2) -> int:
    """Of the sm90 kernel: rings of K/V with their barriers, queries and their parts, what decode tiles' warps meet in."""
    codes = 1 if kv_bytes == 1 else 0  # stages beside those of 16 bits
    rings = stages * 2 * STEP["sm90"] * head_dim * (2 + codes) + (4 + 2 * codes) * stages * 8
    rest = TILE_ROWS["sm90"] * head_dim * 2 + 2 * 192 + 2 * 8 * 16 * 4 + 4
    return -(-(-(-rings // 1024) * 1024 + rest) // 1024) * 1024


def variant_sm90(dtype: str, head_dim: int, kv_dtype: str) -> dict[str, int]:
    """The macros of the sm90 kernel; kv_dtype as for `variants`, but not int8."""
    if kv_dtype == dtype:
        return {**_DTYPES[dtype], "HEAD_DIM": head_dim, "STAGES": 384 // head_dim}
    return {**_DTYPES[dtype], "HEAD_DIM": head_dim, **_KV_DTYPES[kv_dtype], "STAGES": 256 // head_dim}


def grids_of_device(head_dim: int, dtype: str = "bfloat16", kv_dtype: str | None = None) -> tuple[Grid, Grid]:
    """(decode_grid, prefill_grid) to plan with for runs on the current device; kv_dtype: of the pools, if it is not dtype.

    The second is of the sm90 kernel where the device has what that needs; plan with the first alone for runs with pointers.
    """
    kv = np.dtype(kv_dtype or dtype)
    device = _device()
    decode = Grid(_num_ctas("sm80", head_dim, dtype, kv.name, device), step=STEP["sm80"], item_cost=4)
    if not _takes_sm90(kv.name):
        return decode, replace(decode, item_cost=24)  # a tile's border is computed in full, and its end is not hidden
    num_ctas = _num_ctas("sm90", head_dim, dtype, kv.name, device)
    costs = {"decode_cost": 3, "prefill_cost": 4, "item_cost": 8}  # of mixed batches on one H200
    return decode, Grid(num_ctas, TILE_ROWS["sm90"], STEP["sm90"], **costs, kernel="sm90", deals=True)


def num_ctas_of_device(head_dim: int, dtype: str = "bfloat16") -> int:
    """How many CTAs of the sm80 kernel the current device holds at once."""
    return grids_of_device(head_dim, dtype)[0].num_ctas


def _takes_sm90(kv: str) -> bool:
    there = (jit.source_folder() / SOURCES["sm90"]).exists()
    return there and kv != "int8" and int(jit.import_cupy().cuda.Device().compute_capability) == 90


@functools.cache
def _num_ctas(kernel: str, head_dim: int, dtype: str, kv: str, device: int) -> int:
    cuda = jit.import_cupy().cuda
    defines = (
        variant_sm90(dtype, head_dim, kv)
        if kernel == "sm90"
        else _defines(dtype, head_dim, kv, False, False, decode_only=_takes_sm90(kv))
    )
    function, size = _kernel(kernel, head_dim, np.dtype(kv).itemsize, defines)
    per_sm = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function.kernel.ptr, THREADS[kernel], size)
    return per_sm * cuda.Device(device).attributes["MultiProcessorCount"]


_ROOMS = (102400, 167936, 233472)  # bytes of shared memory of an SM: of sm_86, 89 and 120; of sm_80; of sm_90 and 100


def stages_of_device(head_dim: int, kv_bytes: int = 2) -> int:
    """As many stages of K/V, up to six, as let two CTAs fit into an SM of the current device, or up to four of one CTA."""
    return _most_stages(head_dim, kv_bytes, _shared_memory_per_sm(_device()))


def _most_stages(head_dim: int, kv_bytes: int, room: int) -> int:
    sizes = {n: shared_bytes(head_dim, n, kv_bytes) + _RESERVED for n in (6, 5, 4, 3, 2)}
    return next((n for n in sizes if 2 * sizes[n] <= room), 0) or next(n for n in sizes if n <= 4 and sizes[n] <= room)


@functools.cache
def _shared_memory_per_sm(device: int) -> int:
    return jit.import_cupy().cuda.Device(device).attributes["MaxSharedMemoryPerMultiprocessor"]


def _device() -> int:
    return jit.import_cupy().cuda.runtime.getDevice()


def _kernel(kernel: str, head_dim: int, kv_bytes: int, defines: dict[str, int]) -> tuple[Any, int]:
    """(the kernel, its bytes of shared memory) for the current device."""
    if kernel == "sm90":
        size = shared_bytes_sm90(head_dim, defines["STAGES"], kv_bytes)
    else:
        stages = stages_of_device(head_dim, kv_bytes)
        defines, size = {**defines, "STAGES": stages}, shared_bytes(head_dim, stages, kv_bytes)
    function = jit.kernel(SOURCES[kernel], NAMES[kernel], **defines)
    if function.max_dynamic_shared_size_bytes < size:
        function.max_dynamic_shared_size_bytes = size
        function.preferred_shared_memory_carveout = 100  # percent; or the driver may leave room for one CTA only
    return function, size


def _empty(cupy: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    try:
        return cupy.empty(shape, dtype)
    except MemoryError as error:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise OutOfMemory(f"the GPU has no room for another {size / 1e6:.1f} MB; run fewer rows at a time") from error


def _uploaded(cupy: Any, plan: Plan | DevicePlanner, device: int) -> tuple[Array, dict[str, int], list[tuple[int, ...]]]:
    """The plan's arrays on the current device, one copy of all of them kept with the plan.

    -> that; addresses, by the name in Params; those of header, tiles and ctas for each launch.
    """
    if isinstance(plan, DevicePlanner) and device != plan.device:
        raise InvalidArgument(f"the plan is of device {plan.device} and {device} is current; make a DevicePlanner for each")
    if device not in plan.uploaded:
        arrays = [array for one in (plan, *plan.later) for array in (one.header, one.tiles, one.ctas)]
        if plan.page_indices is not None:
            arrays.append(plan.page_indices)
        # every one begins at a multiple of 16 bytes, as the kernel's loads need
        starts = list(itertools.accumulate((-(-array.size // 4) * 4 for array in arrays), initial=0))
        together = np.zeros(starts[-1], np.int32)
        for start, array in zip(starts, arrays, strict=False):
            together[start : start + array.size] = array.reshape(-1)
        on_device = cupy.asarray(together)
        places = [on_device.data.ptr + 4 * start for start in starts]
        passes = [tuple(places[i : i + 3]) for i in range(0, 3 * (1 + len(plan.later)), 3)]
        pages = {} if plan.page_indices is None else {"page_indices": places[3 * len(passes)]}
        plan.uploaded[device] = on_device, pages, passes
    return plan.uploaded[device]


@dataclass
class _Workspace:
    """Where the parts of cut tasks meet. The kernel wants the counters zero and leaves them so."""

    out: Array  # float32 [num_slots, tile_rows, head_dim], flat
    lse: Array  # float32 [num_slots, tile_rows], flat
    counters: Array  # uint32 [num_slots]
    flag: Array  # uint32 [1], 1 after a page id was out of range
    ones: dict[int, Array] = field(default_factory=dict)

    def unit_scales(self, cupy: Any, num_kv_heads: int) -> Array:
        """Scales of float8_e4m3 pools that have none."""
        if num_kv_heads not in self.ones:
            self.ones[num_kv_heads] = cupy.asarray(np.ones((num_kv_heads, 2), np.float32))
        return self.ones[num_kv_heads]


_workspaces: dict[int, _Workspace] = {}


def _workspace(cupy: Any, plan: Plan, device: int) -> _Workspace:
    """The device's workspace, made anew where it is too small: for any plan with as many CTAs, or of as many fixed parts."""
    kept = _workspaces.get(device)
    slots = max(2 * plan.num_ctas, plan.num_slots)
    rows = slots * plan.grid.tile_rows
    if kept is None or kept.counters.size < slots or kept.lse.size < rows:
        kept = _workspaces[device] = _Workspace(
            _empty(cupy, (rows * max(inputs.HEAD_DIMS),), np.float32),
            _empty(cupy, (rows,), np.float32),
            cupy.asarray(np.zeros(slots, np.uint32)),
            cupy.asarray(np.zeros(1, np.uint32)),
        )
    return kept
