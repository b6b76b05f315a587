"""`cupaged.attention` on a GPU: the batches of the emulator and larger ones; what it writes to is NaN before."""

import zlib
from dataclasses import replace

import attention_cases
import numpy as np
import pytest
from attention_cases import CASES, Case
from op_cases import SEED

from cupaged.attention import kernel as attention
from cupaged.attention import plan, run
from cupaged.errors import InvalidArgument, OutOfMemory
from cupaged.ops import cuda


@pytest.fixture(autouse=True)
def fresh_memory(ops, monkeypatch):
    """A workspace of NaN for every test, and results that are NaN before they are computed."""

    def poisoned(cupy, shape, dtype):
        array = cupy.empty(shape, dtype)
        if array.nbytes:
            array.data.memset(0xFF, array.nbytes)
        return array

    monkeypatch.setattr(attention, "_workspaces", {})
    monkeypatch.setattr(attention, "_empty", poisoned)


def run_case(case, times=1):
    """The case's inputs, and the (out, lse) of so many runs from one plan."""
    drawn = attention_cases.draw(case, np.random.default_rng([SEED, zlib.crc32(str(case).encode())]))
    arguments, keywords, _kept = attention_cases.arguments_of(drawn, cuda.upload)
    results = [run(drawn.plan, *arguments, return_lse=True, **keywords) for _ in range(times)]
    results = [tuple(cuda.download(x) for x in result) for result in results]
    workspace = attention._workspaces.get(0)
    if workspace is not None:
        assert not cuda.download(workspace.counters).any(), "counters are not left at zero"
        assert not cuda.download(workspace.flag).any(), "a page id is said to be out of range"
    return drawn, results


def num_ctas(head_dim, dtype="bfloat16"):
    return attention.grids_of_device(head_dim, dtype)[0].num_ctas


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(monkeypatch, case):
    room = min(attention_cases.SHARED_MEMORY[case.sm], attention._shared_memory_per_sm(0))
    monkeypatch.setattr(attention, "_shared_memory_per_sm", lambda device: room)
    drawn, results = run_case(case)
    attention_cases.check(drawn, *results[0])


LARGE = [
    ((1, 1),) * 300,
    ((9000, 1),),
    ((1000, 1), (3, 1), (2048, 1), (517, 1), (1, 1), (700, 1)) * 4,
    ((1000, 1000), (130, 130), (1, 1), (64, 64)),
    ((700, 300), (900, 1), (350, 350), (64, 1), (2000, 5), (128, 16)),
    ((13353, 1), (235, 2), (264, 1), (128, 3)),
    ((2, 235), (13353, 1), (3, 128)),
]
HEADS = [(8, 8), (8, 2), (14, 2), (20, 1)]


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_attention_of_large_batches(number, head_dim, dtype, kv):
    sequences = tuple((max(length, rows), rows) for length, rows in LARGE[number])
    window = 333 if number % 3 == 2 else None
    ctas = num_ctas(head_dim, dtype)
    case = Case(sequences, HEADS[number % 4], head_dim, 2 ** (2 * number % 9), window, ctas, dtype, kv=kv)
    drawn, results = run_case(case, times=2)
    attention_cases.check(drawn, *results[0])
    assert results[0][0].tobytes() == results[1][0].tobytes()


@pytest.mark.parametrize("number", range(60))
def test_attention_of_any_batch(number):
    rng = np.random.default_rng([SEED, 3, number])
    drawn, results = run_case(attention_cases.random_case(rng, most=700, num_ctas=int(300 ** rng.random())))
    attention_cases.check(drawn, *results[0])


def test_every_run_gives_the_same_bits():
    """Whoever merges the parts; 200 runs that follow one another without a pause."""
    drawn, results = run_case(Case(((8192, 1), (300, 200)), (8, 2), 128, num_ctas=num_ctas(128)), times=200)
    attention_cases.check(drawn, *results[0])
    assert drawn.plan.ctas[:, 6:].max() > 10, "no task is in many parts"
    assert len({out.tobytes() + lse.tobytes() for out, lse in results}) == 1


def test_a_captured_run_is_the_same(ops):
    """A graph replays the launches of a plan over queries that have changed."""
    case = Case(((3000, 1), (90, 90), (5, 1)), (8, 2), 128, num_ctas=num_ctas(128))
    first = attention_cases.draw(case, np.random.default_rng([SEED, 4]))
    second = attention_cases.with_queries(first, np.ascontiguousarray(first.q[::-1]))
    stream = ops.cupy.cuda.Stream()  # one that waits for the default stream, where results are poisoned
    with stream:
        (q, *pools), _, _ = attention_cases.arguments_of(first, ops.upload)
        out, lse = run(first.plan, q, *pools, return_lse=True)
        attention_cases.check(first, ops.download(out), ops.download(lse), "before the capture")
        stream.begin_capture()
        for _ in range(3):
            run(first.plan, q, *pools, out=out)
        graph = stream.end_capture()
        q.set(second.q)
        for _ in range(3):
            out.data.memset(0xFF, out.nbytes)
            graph.launch(stream)
            attention_cases.check(second, ops.download(out), second.lse, "replayed")


def test_a_pool_may_be_larger_than_4_gib(ops):
    drawn, _ = run_case(Case(((100, 3), (40, 40)), heads=(4, 2)))

    def put(pool, block, values):
        pool.view(np.uint16)[:, block] = ops.upload(np.ascontiguousarray(values).view(np.uint16))

    try:
        planned, *pools = attention_cases.in_large_pool(drawn, ops.empty, put)  # NaN but for what is put there
    except OutOfMemory as error:
        pytest.skip(str(error))
    results = run(planned, ops.upload(drawn.q), *pools, return_lse=True)
    attention_cases.check(drawn, *(ops.download(x) for x in results))


def test_a_bad_page_id_is_block_0_and_raises_the_flag(ops):
    drawn = attention_cases.draw(Case(((16, 1), (70, 30), (20, 1)), num_ctas=2), np.random.default_rng([SEED, 5]))
    drawn.plan.page_indices[drawn.plan.page_indptr[1] + 2] = 2**31 - 1
    drawn.slots[1][32:48, 0] = 0
    for pool in (drawn.k_pool, drawn.v_pool):
        pool[:, 0] = pool[:, drawn.slots[0][0, 0]]  # in case nobody's block was the first
    out, lse = attention_cases.results_of(drawn.q, drawn.k_pool, drawn.v_pool, drawn.slots, drawn.seen, drawn.more)
    (q, *pools), _, _ = attention_cases.arguments_of(drawn, ops.upload)
    results = run(drawn.plan, q, *pools, return_lse=True)
    attention_cases.check(replace(drawn, out=out, lse=lse), *(ops.download(x) for x in results))
    assert ops.download(attention._workspaces[0].flag).tolist() == [1]


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_plans_for_the_device(ops, number, head_dim, dtype, kv):
    """Decode and prefill by the grids that are meant for them, whichever kernels that brings."""
    rng = np.random.default_rng([SEED, 6, number])
    sequences = tuple((max(length, rows), rows) for length, rows in LARGE[number])
    heads, window = HEADS[(number + 1) % 4], 333 if number % 3 == 2 else None
    drawn = attention_cases.draw(
        Case(sequences, heads, head_dim, (16, 8, 128, 256, 64, 32, 4)[number], window, dtype=dtype, kv=kv), rng
    )
    old = drawn.plan
    batch = (old.q_indptr, old.seq_lens, old.page_indptr, old.page_indices)
    shape = {name: getattr(old, name) for name in ("num_heads", "num_kv_heads", "block_size", "num_blocks", "sliding_window")}
    grids = attention.grids_of_device(head_dim, dtype, drawn.k_pool.dtype.name)
    planned = plan(*batch, **shape, decode_grid=grids[0], prefill_grid=grids[1])
    arguments, keywords, _ = attention_cases.arguments_of(drawn, ops.upload)
    results = []
    for _ in range(5):
        out, lse = (ops.download(x) for x in run(planned, *arguments, return_lse=True, **keywords))
        attention_cases.check(drawn, out, lse)
        results.append(out.tobytes() + lse.tobytes())
    assert len(set(results)) == 1
    assert not ops.download(attention._workspaces[0].flag).any()


def test_what_does_not_fit_is_refused(ops):
    drawn, _ = run_case(Case(((20, 1), (30, 30)), heads=(4, 2)))
    (q, k_pool, v_pool), _, _ = attention_cases.arguments_of(drawn, ops.upload)
    strided = ops.empty((*k_pool.shape[:3], 2 * k_pool.shape[3]), "bfloat16")[..., : k_pool.shape[3]]
    for arguments, message in [
        ((q[1:], k_pool, v_pool), "q has shape"),
        ((q, k_pool[:, 1:], v_pool), "k_pool has shape"),
        ((q, k_pool, ops.empty(v_pool.shape, "float16")), "v_pool is float16"),
        ((ops.empty(q.shape, "float32"), k_pool, v_pool), "q is float32"),
        ((q, strided, v_pool), "k_pool has strides"),
        ((q[..., :32], k_pool, v_pool), "head_dim 32"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            run(drawn.plan, *arguments)
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="scale"):
            run(drawn.plan, q, k_pool, v_pool, scale=scale)


def test_two_ctas_fit_an_sm(ops):
    attributes = ops.cupy.cuda.Device().attributes
    per_sm = num_ctas(128) / attributes["MultiProcessorCount"]
    assert per_sm == (2 if attributes["MaxSharedMemoryPerMultiprocessor"] >= 164 << 10 else 1)
