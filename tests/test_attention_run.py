"""`cupaged.attention.run` up to the launch: what the kernel is given, and what is refused before; no kernel runs here."""

import ctypes
import types

import numpy as np
import pytest
from emulator.guarded_memory import DeviceArray, GuardedMemory
from op_cases import DTYPES, SEED

from cupaged import attention
from cupaged.attention import Grid, pack_mask, plan, planner
from cupaged.attention.kernel import PARAMS
from cupaged.cuda import jit, launch
from cupaged.errors import InvalidArgument

BF16, F16 = DTYPES["bfloat16"], DTYPES["float16"]


class Recorder:
    """A kernel that keeps what it is launched with."""

    def __init__(self, source, name, defines):
        self.variant = source, name, defines
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.launches = []

    def __call__(self, grid, block, args, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.launches.append((grid, block, args[0].copy()))


@pytest.fixture
def device(monkeypatch):
    memory, kernels = GuardedMemory(), {}

    def kernel(source, name, **defines):
        return kernels.setdefault((source, name, *defines.items()), Recorder(source, name, defines))

    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(launch, "_knows_dependent_launches", lambda device: False)
    monkeypatch.setattr(attention.kernel, "_workspaces", {})
    monkeypatch.setattr(attention.kernel, "_shared_memory_per_sm", lambda device: 233472)
    return types.SimpleNamespace(asarray=memory.asarray, empty=memory.empty, kernels=kernels)


NUM_BLOCKS = 20


def batch(**changed):
    """Arguments of `plan`: a chunk of 20 rows and a decode."""
    arguments = {
        "q_indptr": np.array([0, 20, 21], np.int32),
        "seq_lens": np.array([100, 33], np.int32),
        "page_indptr": np.array([0, 7, 10], np.int32),
        "page_indices": np.random.default_rng(SEED).permutation(NUM_BLOCKS)[:10].astype(np.int32),
        "num_heads": 8,
        "num_kv_heads": 2,
        "block_size": 16,
        "num_blocks": NUM_BLOCKS,
        "decode_grid": Grid(5),
    }
    return arguments | changed


def arrays(device, dtype=BF16, kv=None, head_dim=64):
    """q, k_pool and v_pool."""
    pool = (2, NUM_BLOCKS, 16, head_dim)
    return [device.empty((21, 8, head_dim), dtype), *(device.empty(pool, kv or dtype) for _ in range(2))]


def at(address, dtype, *shape):
    """What lies at an address."""
    size = np.prod(shape, dtype=int) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(int(address), size), dtype).reshape(shape)


def test_the_kernel_is_given_what_it_reads_and_writes(device):
    made = plan(**batch(sliding_window=50))
    q, k_pool, v_pool = arrays(device, head_dim=128)
    out, lse = attention.run(made, q, k_pool, v_pool, 0.25, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, BF16, (21, 8), np.float32)
    (kernel,) = device.kernels.values()
    ((grid, block, params),) = kernel.launches
    assert (grid, block, params.dtype, params.shape) == ((5, 1, 1), (128, 1, 1), PARAMS, ())
    addresses = [array.data.ptr for array in (q, k_pool, v_pool, out, lse)]
    assert [params[name] for name in ("q", "k_pool", "v_pool", "out", "lse")] == addresses
    for name, array in (
        ("header", made.header),
        ("tiles", made.tiles),
        ("ctas", made.ctas),
        ("page_indices", made.page_indices),
    ):
        assert (at(params[name], np.int32, *array.shape) == array).all()
        assert params[name] % 16 == 0
    numbers = ("head_stride", "num_kv_heads", "group_size", "num_blocks", "block_shift", "window", "decode_rows", "scale")
    assert [params[name] for name in numbers] == [NUM_BLOCKS * 16 * 256, 2, 4, NUM_BLOCKS, 4, 50, 16, 0.25]
    assert [params[name] for name in ("k_pages", "v_pages", "mask", "kv_scales")] == [0] * 4
    slots = 2 * 5
    assert not at(params["counters"], np.uint32, slots).any()
    assert not at(params["flag"], np.uint32, 1).any()
    assert np.isnan(at(params["partial_out"], np.float32, slots * 64 * 128)).all()
    assert np.isnan(at(params["partial_lse"], np.float32, slots * 64)).all()


def test_runs_of_a_plan_differ_by_their_arrays_alone(device):
    made = plan(**batch())
    first, second = arrays(device), arrays(device)
    out = device.empty(first[0].shape, BF16)
    assert attention.run(made, *first, out=out) is out
    attention.run(made, *second, 0.5)
    attention.run(made, *first, out=out)
    attention.run(made, *arrays(device, F16))
    one, other = device.kernels.values()
    assert (one.variant[2]["DTYPE_BF16"], other.variant[2]["DTYPE_F16"]) == (1, 1)
    a, b, c = (params for _, _, params in one.launches)
    assert (a == c, a["q"], b["q"], a["lse"]) == (True, first[0].data.ptr, second[0].data.ptr, 0)
    assert (a["scale"], b["scale"]) == (0.125, 0.5)
    for name in ("q", "k_pool", "v_pool", "out", "scale"):
        a[name] = b[name] = 0
    assert a == b


@pytest.mark.parametrize(
    ("kv", "macro", "dtype", "shape"),
    [
        (np.uint8, "KV_FP8", np.float32, (2, 2)),
        (np.int8, "KV_INT8", np.float16, (2, NUM_BLOCKS, 16, 2)),
    ],
    ids=str,
)
def test_kv_of_8_bits_has_scales(device, kv, macro, dtype, shape):
    made = plan(**batch())
    scales = device.asarray(np.random.default_rng(SEED).random(shape).astype(dtype))
    attention.run(made, *arrays(device, kv=kv), kv_scales=scales)
    (kernel,) = device.kernels.values()
    assert kernel.variant[2][macro] == 1
    params = kernel.launches[0][2]
    assert (params["kv_scales"], params["head_stride"]) == (scales.data.ptr, NUM_BLOCKS * 16 * 64)
    for wrong, message in (
        (device.empty(shape[1:], dtype), "kv_scales has shape"),
        (device.empty(shape, np.float64), "kv_scales is float64"),
        (device.empty((*shape[:-1], 4), dtype)[..., :2], "kv_scales has strides"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            attention.run(made, *arrays(device, kv=kv), kv_scales=wrong)
    if kv is np.uint8:
        attention.run(made, *arrays(device, kv=kv))
        assert (at(kernel.launches[1][2]["kv_scales"], dtype, *shape) == 1).all()
    else:
        with pytest.raises(InvalidArgument, match="kv_scales is None and k_pool int8"):
            attention.run(made, *arrays(device, kv=kv))
    with pytest.raises(InvalidArgument, match="kv_scales is given and K/V are bfloat16"):
        attention.run(made, *arrays(device), kv_scales=scales)


def test_a_mask_is_what_decides(device):
    rng = np.random.default_rng(SEED)
    seen = [rng.random((20, 100)) < 0.5, rng.random((1, 33)) < 0.5]
    mask, mask_indptr = pack_mask(seen)
    made = plan(**batch(mask_indptr=mask_indptr))
    attention.run(made, *arrays(device), mask=mask)
    on_device = device.asarray(mask)
    attention.run(made, *arrays(device), mask=on_device)
    (kernel,) = device.kernels.values()
    assert kernel.variant[2]["MASK"] == 1
    (_, _, one), (_, _, other) = kernel.launches
    assert other["mask"] == on_device.data.ptr
    assert (at(one["mask"], np.uint32, mask.size) == mask).all()
    for tile in made.tiles:
        b = int(tile[5] == 20)
        tokens, length = seen[b].shape
        assert (tile[2], tile[3]) == (0, length), "a row may see any position"
        words = mask[tile[7] : tile[7] + tokens * tile[8]].reshape(tokens, tile[8])
        bits = [[words[r, p // 32] >> (p % 32) & 1 for p in range(length)] for r in range(tokens)]
        assert (np.array(bits, bool) == seen[b]).all()
    for wrong, message in (
        (mask[:-1], "mask has 81 words; give the 82"),
        (mask.astype(np.int32), "mask is int32; give uint32"),
        (list(mask), "mask is a builtins.list"),
        (None, "mask is None and the plan has a mask_indptr"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            attention.run(made, *arrays(device), mask=wrong)
    with pytest.raises(InvalidArgument, match="mask is given and the plan has no mask_indptr"):
        attention.run(plan(**batch()), *arrays(device), mask=mask)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 80, 82], "mask_indptr is a list"),
        (np.array([0, 80], np.int32), "mask_indptr has 2 entries; give 3"),
        (np.array([1, 81, 83], np.int32), "mask_indptr begins with 1"),
        (np.array([0, 79, 82], np.int32), "mask_indptr gives sequence 0 79; give it 80 words"),
        (np.array([0, 80, 81], np.int32), "mask_indptr gives sequence 1 1; give it 2 words"),
    ],
    ids=str,
)
def test_a_wrong_mask_indptr_is_refused(value, message):
    plan(**batch(mask_indptr=np.array([0, 80, 82], np.int32)))
    with pytest.raises(InvalidArgument, match=message):
        plan(**batch(mask_indptr=value))


def test_a_window_goes_with_neither_mask_nor_full_attention():
    with pytest.raises(InvalidArgument, match="sliding_window is 5 beside mask_indptr"):
        plan(**batch(mask_indptr=np.array([0, 80, 82], np.int32), sliding_window=5))
    with pytest.raises(InvalidArgument, match="sliding_window is 5 beside causal=False"):
        plan(**batch(causal=False, sliding_window=5))


@pytest.mark.parametrize("seen", [[[True]], np.ones(3, bool), np.ones((2, 3), np.uint8)], ids=["list", "1-D", "uint8"])
def test_pack_mask_takes_arrays_of_bool(seen):
    with pytest.raises(InvalidArgument, match=r"masks\[1\] is .*; give a NumPy array of bool with two axes"):
        pack_mask([np.ones((1, 1), bool), seen])


def test_pack_mask_of_nothing():
    mask, indptr = pack_mask([])
    assert (mask.size, indptr.tolist()) == (0, [0])
    mask, indptr = pack_mask([np.ones((0, 40), bool), np.ones((3, 0), bool), np.ones((1, 33), bool)])
    assert (mask.tolist(), indptr.tolist(), mask.dtype, indptr.dtype) == ([2**32 - 1, 1], [0, 0, 0, 2], np.uint32, np.int32)


def test_pages_may_be_pointed_to(device):
    made = plan(**batch(page_indices=None))
    rng = np.random.default_rng(SEED)
    k_pages, v_pages = (16 * rng.integers(1, 2**40, 10).astype(np.uint64) for _ in range(2))
    on_device = [device.asarray(x) for x in (k_pages, v_pages)]
    q, *_ = arrays(device)
    attention.run(made, q, None, None, block_k_ptrs=k_pages, block_v_ptrs=v_pages)
    attention.run(made, q, None, None, block_k_ptrs=on_device[0], block_v_ptrs=on_device[1])
    (kernel,) = device.kernels.values()
    assert kernel.variant[2]["POINTERS"] == 1
    (_, _, one), (_, _, other) = kernel.launches
    assert (at(one["k_pages"], np.uint64, 10) == k_pages).all()
    assert (at(one["v_pages"], np.uint64, 10) == v_pages).all()
    assert (other["k_pages"], other["v_pages"]) == tuple(x.data.ptr for x in on_device)
    assert (one["head_stride"], one["k_pool"], one["v_pool"]) == (16 * 128, 0, 0)
    for wrong, message in (
        ({"block_k_ptrs": k_pages}, "block_v_ptrs is None and block_k_ptrs is not"),
        ({"block_v_ptrs": v_pages}, "k_pool is a builtins.NoneType"),
        (
            {"block_k_ptrs": k_pages + np.uint64(8), "block_v_ptrs": v_pages},
            "block_k_ptrs holds address 0x[0-9a-f]+; give multiples",
        ),
        ({"block_k_ptrs": k_pages, "block_v_ptrs": v_pages[:9]}, "block_v_ptrs has 9 entries; give the 10"),
        ({"block_k_ptrs": k_pages.astype(np.int64), "block_v_ptrs": v_pages}, "block_k_ptrs is int64; give uint64"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            attention.run(made, q, None, None, **wrong)
    with pytest.raises(InvalidArgument, match="block_k_ptrs is None and the plan has no page_indices"):
        attention.run(made, *arrays(device))
    scales = device.empty((2, NUM_BLOCKS, 16, 2), F16)
    with pytest.raises(InvalidArgument, match="block_k_ptrs is given and K/V are int8"):
        attention.run(made, *arrays(device, kv=np.int8), block_k_ptrs=k_pages, block_v_ptrs=v_pages, kv_scales=scales)


def partly_filled(rng, padded):
    """A batch whose pages are filled in part: the arguments of `plan`, and (page, slot, entry) of each position."""
    tables = [rng.permutation(NUM_BLOCKS)[:n] for n in (9, 4, 0)]
    valid = [rng.integers(0, 17, table.size) for table in tables]
    valid[0][2:4] = 0, 16
    width = max(map(len, tables)) + 1
    begin = [0, width, 2 * width] if padded else [0, 9, 13]
    places = [
        [(page, slot, first + i) for i, (page, n) in enumerate(zip(table, count, strict=True)) for slot in range(n)]
        for first, table, count in zip(begin, tables, valid, strict=True)
    ]
    lengths = np.array([sum(count) for count in valid], np.int32)
    both = []
    for values, fill in ((tables, 2147480000), (valid, 0)):
        if padded:
            array = np.full((3, width), fill, np.int32)
            for row, value in zip(array, values, strict=True):
                row[: value.size] = value
            both.append(array)
        else:
            both.append(np.concatenate(values).astype(np.int32))
    q_indptr = np.array([0, min(5, lengths[0]), min(5, lengths[0]) + min(1, lengths[1]), min(5, lengths[0]) + 1], np.int32)
    q_indptr[-1] = q_indptr[-2]
    page_indptr = None if padded else np.array([0, 9, 13, 13], np.int32)
    given = {"q_indptr": q_indptr, "seq_lens": lengths, "page_indptr": page_indptr}
    return batch(**given, page_indices=both[0], block_valid_lengths=both[1]), places


@pytest.mark.parametrize("padded", [False, True])
def test_pages_that_are_filled_in_part_become_pages_of_one_position(device, padded):
    arguments, places = partly_filled(np.random.default_rng(SEED), padded)
    made = plan(**arguments)
    assert (made.block_size, made.num_blocks) == (1, NUM_BLOCKS * 16)
    for tile in made.tiles:
        b = int(np.flatnonzero(arguments["q_indptr"] == tile[5])[0])
        assert made.page_indices[tile[4] : tile[4] + len(places[b])].tolist() == [
            16 * page + slot for page, slot, _ in places[b]
        ]
    q, k_pool, v_pool = (device.empty((made.q_indptr[-1], 8, 64), BF16), *arrays(device)[1:])
    attention.run(made, q, k_pool, v_pool)
    (kernel,) = device.kernels.values()
    params = kernel.launches[0][2]
    assert [params[name] for name in ("num_blocks", "block_shift", "head_stride")] == [
        NUM_BLOCKS * 16,
        0,
        NUM_BLOCKS * 16 * 128,
    ]

    pages = 16 * np.arange(1, arguments["page_indices"].size + 1).astype(np.uint64) * np.uint64(1000)
    attention.run(made, q, None, None, block_k_ptrs=pages, block_v_ptrs=pages[::-1].copy())
    params = [*device.kernels.values()][1].launches[0][2]
    flat = [place for of_sequence in places for place in of_sequence]
    assert at(params["k_pages"], np.uint64, len(flat)).tolist() == [int(pages[entry]) + slot * 128 for _, slot, entry in flat]
    assert at(params["v_pages"], np.uint64, len(flat)).tolist() == [
        int(pages[-1 - entry]) + slot * 128 for _, slot, entry in flat
    ]
    assert params["head_stride"] == 16 * 128


def test_wrong_valid_lengths_are_refused():
    arguments, _ = partly_filled(np.random.default_rng(SEED), False)
    valid = arguments["block_valid_lengths"]
    more, less = valid.copy(), valid.copy()
    more[3], less[0] = 17, -1
    longer = arguments["seq_lens"] + np.array([0, 1, 0], np.int32)
    outside = arguments["page_indices"].copy()
    outside[3] = NUM_BLOCKS
    unused = arguments["page_indices"].copy()
    unused[2] = -5
    plan(**arguments | {"page_indices": unused})  # no token is there
    for changed, message in (
        ({"block_valid_lengths": valid[:-1]}, r"block_valid_lengths has shape \(12,\); give the 13 entries of page_indptr"),
        ({"block_valid_lengths": valid.astype(np.int64)}, "block_valid_lengths is int64"),
        ({"block_valid_lengths": more}, "block_valid_lengths holds 17; give lengths from 0 to 16"),
        ({"block_valid_lengths": less}, "block_valid_lengths holds -1"),
        (
            {"seq_lens": longer},
            f"seq_lens gives sequence 1 {longer[1]}; give the sum of its block_valid_lengths, {longer[1] - 1}",
        ),
        ({"page_indices": outside}, f"page_indices holds block {NUM_BLOCKS}"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            plan(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page_indices": np.zeros(10, np.int32)}, r"page_indices is int32 of shape \(10,\); give .* two axes"),
        ({"page_indices": np.zeros((3, 7), np.int32)}, "page_indices has 3 rows; give 2"),
        ({"page_indices": np.zeros((2, 6), np.int32)}, "page_indices gives sequence 0 6; give as many columns"),
        ({"page_indices": np.full((2, 7), NUM_BLOCKS, np.int32)}, f"page_indices holds block {NUM_BLOCKS}"),
        ({"page_indices": np.zeros((2, 14), np.int32)[:, ::2]}, "page_indices has strides"),
        ({"page_indices": None}, "page_indices is a NoneType"),
    ],
    ids=str,
)
def test_a_wrong_padded_table_is_refused(changed, message):
    plan(**batch(page_indptr=None, page_indices=np.zeros((2, 7), np.int32)))
    with pytest.raises(InvalidArgument, match=message):
        plan(**batch(page_indptr=None) | changed)


def test_what_does_not_fit_is_refused(device):
    made = plan(**batch())
    q, k_pool, v_pool = arrays(device)
    wide = device.empty((*k_pool.shape[:3], 2 * k_pool.shape[3]), BF16)[..., : k_pool.shape[3]]
    shifted = device.empty((q.size + 8,), BF16)
    elsewhere = v_pool.view(type("Elsewhere", (DeviceArray,), {"device": types.SimpleNamespace(id=1)}))
    for arguments, more, message in [
        ((q[1:], k_pool, v_pool), {}, r"q has shape \(20, 8, 64\); give \(21, 8, 64\)"),
        ((q, k_pool[:, 1:], v_pool), {}, "k_pool has shape"),
        ((q, k_pool, device.empty(v_pool.shape, F16)), {}, "v_pool is float16; give bfloat16"),
        ((q, device.empty(k_pool.shape, F16), v_pool), {}, "k_pool is float16; give bfloat16, as q is, or int8"),
        ((device.empty(q.shape, "float32"), k_pool, v_pool), {}, "q is float32"),
        ((q, wide, v_pool), {}, "k_pool has strides"),
        ((q[..., :32], k_pool, v_pool), {}, "q has head_dim 32; give 64 or 128"),
        ((q, k_pool, elsewhere), {}, "v_pool is on device 1; give it on the current one, 0"),
        ((np.zeros(q.shape, BF16), k_pool, v_pool), {}, "q is a numpy.ndarray; give a CuPy array"),
        ((q, [1], v_pool), {}, "k_pool is a builtins.list"),
        ((q, k_pool, None), {}, "v_pool is a builtins.NoneType"),
        ((shifted[4:-4].reshape(q.shape), k_pool, v_pool), {}, "q begins at address 0x[0-9a-f]+8; give an array"),
        ((q, k_pool, v_pool), {"out": q[:4]}, "out has shape"),
        ((q, k_pool, v_pool), {"out": np.zeros(q.shape, BF16)}, "out is a numpy.ndarray"),
        *(((q, k_pool, v_pool, scale), {}, "scale is .*; give a positive number") for scale in (0, -1, np.nan, np.inf)),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            attention.run(made, *arguments, **more)
    assert not any(kernel.launches for kernel in device.kernels.values())


def test_a_plan_for_another_kernel_is_refused(device):
    with pytest.raises(InvalidArgument, match="the plan's grid has step 64"):
        attention.run(plan(**batch(decode_grid=Grid(5, step=64))), *arrays(device))
    made = plan(**batch(prefill_grid=Grid(5, 128, 128, kernel="sm90")))
    with pytest.raises(InvalidArgument, match="the sm90 kernel, which takes no int8 K/V"):
        attention.run(made, *arrays(device, kv=np.int8), kv_scales=device.empty((2, NUM_BLOCKS, 16, 2), np.float16))


def test_a_plan_of_several_passes_is_as_many_launches(device, monkeypatch):
    monkeypatch.setattr(planner, "MOST_SLOTS", 8)
    long = {"seq_lens": np.array([2100, 3000], np.int32), "page_indptr": np.array([0, 132, 320], np.int32)}
    made = plan(**batch(**long, page_indices=np.zeros(320, np.int32), batch_invariant=True))
    assert (len(made.later), made.num_slots) == (2, 6)  # two tiles of the first sequence and one of the other, in 3 parts each
    q, k_pool, v_pool = arrays(device)
    for _ in range(2):
        out, lse = attention.run(made, q, k_pool, v_pool, return_lse=True)
    (kernel,) = device.kernels.values()
    assert len(kernel.launches) == 6
    for (_, _, params), one in zip(kernel.launches[3:], (made, *made.later), strict=True):
        assert [params[name] for name in ("q", "out", "lse")] == [array.data.ptr for array in (q, out, lse)]
        for name in ("header", "tiles", "ctas"):
            assert (at(params[name], np.int32, *getattr(one, name).shape) == getattr(one, name)).all()


def test_a_batch_without_rows_is_not_launched(device):
    made = plan(**batch(q_indptr=np.zeros(3, np.int32)))
    out, lse = attention.run(made, device.empty((0, 8, 64), BF16), *arrays(device)[1:], return_lse=True)
    assert (out.shape, lse.shape, device.kernels) == ((0, 8, 64), (0, 8), {})
