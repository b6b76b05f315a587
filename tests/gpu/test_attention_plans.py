"""Plans made on a GPU, graphs that replay them, cascades and merges; what attention writes to is NaN before."""

import attention_cases
import numpy as np
import pytest
from attention_cases import Case
from op_cases import SEED
from test_attention_cascade import prefixes_of, tree
from test_attention_planner import batch, interpret

from cupaged import attention
from cupaged.attention import DevicePlanner, Grid, merge_states, plan, plan_cascade, run_cascade
from cupaged.errors import CupagedError, InvalidArgument

INDEX = ("q_indptr", "seq_lens", "page_indptr", "page_indices")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = attention.kernel._empty

    def nan(cupy, shape, dtype):
        array = empty(cupy, shape, dtype)
        if array.nbytes:
            array.data.memset_async(0xFF, array.nbytes)
        return array

    monkeypatch.setattr(attention.kernel, "_empty", nan)
    monkeypatch.setattr(attention.kernel, "_workspaces", {})


def index_of(planned):
    return [getattr(planned, name) for name in INDEX]


def records(ops, planned):
    memory, starts = ops.download(planned._memory), planned._starts
    header = memory[starts["header"] :][:4]
    tiles = memory[starts["tiles"] :][: 12 * header[0]].reshape(-1, 12)
    return header, tiles, memory[starts["ctas"] :][: 8 * header[2]].reshape(-1, 8)


@pytest.mark.parametrize("number", range(20))
def test_the_device_makes_the_plan_of_the_host(ops, number):
    rng = np.random.default_rng([SEED, number])
    n = int(4096 ** rng.random())
    lengths = (3000 ** rng.random(n)).astype(int)
    rows = np.where(rng.random(n) < rng.random(), np.minimum(lengths, 200), rng.random(n) < 0.9)
    grid = [Grid(int(600 ** rng.random())), Grid(132, 128, 128, 3, 2, kernel="sm90")][number % 2]
    arguments = batch([*zip(lengths, rows, strict=True)], decode_grid=grid, sliding_window=None if number % 3 else 300)
    made = plan(**arguments)
    shape = {name: arguments[name] for name in ("num_heads", "num_kv_heads", "block_size", "num_blocks", "sliding_window")}
    sizes = {"max_sequences": n, "max_tokens": max(int(rows.sum()), 1), "max_pages": max(arguments["page_indices"].size, 1)}
    planned = DevicePlanner(**shape, grid=grid, **sizes)
    planned.update(*(arguments[name] for name in INDEX))
    planned.launch()
    for got, expected in zip(records(ops, planned), (made.header, made.tiles, made.ctas), strict=True):
        assert got.tolist() == expected.tolist()
    planned.check()


def test_a_captured_graph_follows_a_batch_that_shrinks_and_grows(ops):
    rng = np.random.default_rng([SEED, 1])
    sizes = {"max_sequences": 6, "max_tokens": 6, "max_pages": 2000, "max_tokens_each": 1}
    lengths = [(3000, 40, 700, 1, 64, 129), (65,), (5, 0, 9000), (17,) * 6, (4096, 4096, 8, 4096)]
    cases = [Case(tuple((n, min(n, 1)) for n in one), (32, 8), 128, 16) for one in lengths]
    drawn = [attention_cases.draw(case, rng) for case in cases]
    most = max(one.k_pool.shape[1] for one in drawn)
    grid = attention.grids_of_device(128)[0]
    shape = {"num_heads": 32, "num_kv_heads": 8, "block_size": 16, "num_blocks": most}
    stream = ops.cupy.cuda.Stream(non_blocking=True)
    with stream:
        planned = DevicePlanner(**shape, grid=grid, **sizes)
        q, out = (ops.cupy.zeros((6, 32, 128), "bfloat16") for _ in range(2))
        pools = [ops.cupy.zeros((8, most, 16, 128), "bfloat16") for _ in range(2)]
        planned.launch()
        attention.run(planned, q, *pools, out=out)
        stream.synchronize()
        stream.begin_capture()
        planned.launch()
        for _ in range(3):
            attention.run(planned, q, *pools, out=out)
        graph = stream.end_capture()
        for one in [*drawn, drawn[0]]:
            for target, source in zip((q, *pools), (one.q, one.k_pool, one.v_pool), strict=True):
                target.data.memset_async(0xFF, target.nbytes, stream)
                if target is q:
                    target[: len(source)] = ops.upload(source)
                else:
                    target[:, : source.shape[1]] = ops.upload(source)
            out.data.memset_async(0xFF, out.nbytes, stream)
            planned.update(*index_of(one.plan))
            graph.launch(stream)
            planned.check()
            attention_cases.check(one, ops.download(out)[: len(one.q)], one.lse, "replayed")
            assert np.isnan(ops.download(out)[len(one.q) :].astype(np.float32)).all(), "rows of no sequence are written to"
        for wrong in (-1, most, 2147480000):
            planned.page_indices[1] = wrong
            graph.launch(stream)
            with pytest.raises(CupagedError, match="page id"):
                planned.check()
            planned.update(*index_of(drawn[0].plan))
        planned.seq_lens[...] = 2**31 - 1
        graph.launch(stream)
        with pytest.raises(CupagedError, match="length"):
            planned.check()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cascade(ops, dtype, head_dim):
    groups = [(0, [(300, 1)]), (80, [(40, 1), (20, 18), (900, 1)] * 8), (0, [(500, 500)]), (20, [(1, 1)] * 3), (0, [(5, 1)])]
    index, shape, k_pool, v_pool, q = tree(groups, 16, (8, 2), head_dim)
    q, k_pool, v_pool = (x.astype(attention_cases.DTYPES[dtype]) for x in (q, k_pool, v_pool))
    grids = dict(zip(("decode_grid", "prefill_grid"), attention.grids_of_device(head_dim, dtype), strict=True))
    made = plan_cascade(**index, prefixes=prefixes_of(groups), **shape, **grids)
    out, lse = run_cascade(made, *(ops.upload(x) for x in (q, k_pool, v_pool)), return_lse=True)
    exact = [x.astype(np.float64) for x in (q, k_pool, v_pool)]
    expected = interpret(plan(**index, **shape, decode_grid=Grid(4)), *exact, head_dim**-0.5)
    error = np.linalg.norm(ops.download(out).astype(np.float64) - expected[0], axis=-1)
    assert (error <= attention_cases.TOLERANCE[dtype] * np.linalg.norm(expected[0], axis=-1)).all()
    assert abs(ops.download(lse) - expected[1]).max() <= attention_cases.LSE_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merge_states(ops, dtype):
    rng = np.random.default_rng(SEED)
    outs = [rng.standard_normal((3001, 5, 128)).astype(attention_cases.DTYPES[dtype]) for _ in range(2)]
    lses = [(20 * rng.standard_normal((3001, 5))).astype(np.float32) for _ in range(2)]
    for out, lse in zip(outs, lses, strict=True):
        unseen = rng.random(lse.shape) < 0.3
        lse[unseen], out[unseen] = -np.inf, np.nan
    pairs = [x for pair in zip(outs, lses, strict=True) for x in pair]
    expected, expected_lse = merge_states(*(x.astype(np.float64) for x in pairs))
    got, lse = (ops.download(x) for x in merge_states(*map(ops.upload, pairs)))
    tolerance = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-5)


def test_host_arrays_are_refused_by_name():
    drawn = attention_cases.draw(Case(((20, 1), (30, 30)), heads=(4, 2)), np.random.default_rng(SEED))
    with pytest.raises(InvalidArgument, match=r"q is a numpy\.ndarray; give a CuPy array"):
        attention.run(drawn.plan, drawn.q, drawn.k_pool, drawn.v_pool)
