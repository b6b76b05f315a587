"""`cupaged.attention` on a GPU: the batches of the emulator and larger ones; what it writes to is NaN before."""

import zlib

import attention_cases
import numpy as np
import pytest
from attention_cases import CASES, Case
from op_cases import SEED

from cupaged.attention import kernel as attention
from cupaged.errors import InvalidArgument, OutOfMemory


@pytest.fixture(autouse=True)
def fresh_workspace(ops, monkeypatch):
    """A workspace of NaN for every test."""
    monkeypatch.setattr(attention, "_workspaces", {})


def run(case, times=1):
    """The case's inputs, and the (out, lse) of so many runs from one plan."""
    drawn = attention_cases.draw(case, np.random.default_rng([SEED, zlib.crc32(str(case).encode())]))
    arrays = upload(drawn)
    results = [attention.run(drawn.plan, *arrays, return_lse=True) for _ in range(times)]
    results = [tuple(attention.ops.download(x) for x in result) for result in results]
    assert not attention.ops.download(attention._workspaces[attention._device()].counters).any(), (
        "counters are not left at zero"
    )
    return drawn, results


def upload(drawn):
    return [attention.ops.upload(x) for x in (drawn.q, drawn.k_pool, drawn.v_pool)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(monkeypatch, case):
    room = min(attention_cases.SHARED_MEMORY[case.sm], attention._shared_memory_per_sm(attention._device()))
    monkeypatch.setattr(attention, "_shared_memory_per_sm", lambda device: room)
    drawn, results = run(case)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_attention_of_large_batches(number, head_dim, dtype):
    sequences = tuple((max(length, rows), rows) for length, rows in LARGE[number])
    num_ctas = attention.num_ctas_of_device(head_dim, dtype)
    window = 333 if number % 3 == 2 else None
    case = Case(sequences, HEADS[number % 4], head_dim, 2 ** (2 * number % 9), window, num_ctas, dtype)
    drawn, results = run(case, times=2)
    attention_cases.check(drawn, *results[0])
    assert results[0][0].tobytes() == results[1][0].tobytes()


@pytest.mark.parametrize("number", range(40))
def test_attention_of_any_batch(number):
    rng = np.random.default_rng([SEED, 3, number])
    drawn, results = run(attention_cases.random_case(rng, most=700, num_ctas=int(300 ** rng.random())))
    attention_cases.check(drawn, *results[0])


def test_every_run_gives_the_same_bits():
    """Whoever merges the parts; 200 runs that follow one another without a pause."""
    case = Case(((8192, 1), (300, 200)), (8, 2), 128, num_ctas=attention.num_ctas_of_device(128))
    drawn, results = run(case, times=200)
    attention_cases.check(drawn, *results[0])
    assert drawn.plan.tasks[:, 1].max() > 10
    assert len({out.tobytes() + lse.tobytes() for out, lse in results}) == 1


def test_a_captured_run_is_the_same():
    """A graph replays the launches of a plan over queries that have changed."""
    case = Case(((3000, 1), (90, 90), (5, 1)), (8, 2), 128, num_ctas=attention.num_ctas_of_device(128))
    first = attention_cases.draw(case, np.random.default_rng([SEED, 4]))
    pools = first.k_pool, first.v_pool
    second = attention_cases.with_results(case, first.plan, np.ascontiguousarray(first.q[::-1]), *pools)
    stream = attention.ops.cupy.cuda.Stream()  # one that waits for the default stream, where `ops.empty` poisons
    with stream:
        q, *pools = upload(first)
        out, lse = attention.run(first.plan, q, *pools, return_lse=True)
        attention_cases.check(first, attention.ops.download(out), attention.ops.download(lse), "before the capture")
        stream.begin_capture()
        for _ in range(3):
            attention.run(first.plan, q, *pools, out=out)
        graph = stream.end_capture()
        q.set(second.q)
        for _ in range(3):
            out.data.memset(0xFF, out.nbytes)
            graph.launch(stream)
            attention_cases.check(second, attention.ops.download(out), second.lse, "replayed")


def test_a_pool_may_be_larger_than_4_gib(ops):
    drawn, _ = run(Case(((100, 3), (40, 40)), heads=(4, 2)))

    def put(pool, block, values):
        pool.view(np.uint16)[:, block] = ops.upload(np.ascontiguousarray(values).view(np.uint16))

    try:
        planned, *pools = attention_cases.in_large_pool(drawn, ops.empty, put)  # NaN but for what is put there
    except OutOfMemory as error:
        pytest.skip(str(error))
    results = attention.run(planned, ops.upload(drawn.q), *pools, return_lse=True)
    attention_cases.check(drawn, *(ops.download(x) for x in results))


def test_what_does_not_fit_is_refused(ops):
    drawn, _ = run(Case(((20, 1), (30, 30)), heads=(4, 2)))
    q, k_pool, v_pool = upload(drawn)
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
            attention.run(drawn.plan, *arguments)
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="scale"):
            attention.run(drawn.plan, q, k_pool, v_pool, scale=scale)


def test_two_ctas_fit_an_sm():
    cupy = attention.ops.cupy
    attributes = cupy.cuda.Device().attributes
    per_sm = attention.num_ctas_of_device(128) / attributes["MultiProcessorCount"]
    assert per_sm == (2 if attributes["MaxSharedMemoryPerMultiprocessor"] >= 164 << 10 else 1)
