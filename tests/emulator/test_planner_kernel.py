"""cuda_src/plan.cu and merge_states.cu, emulated: the host's plan, bit by bit; and attention over parts, joined."""

import re

import attention_cases
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from op_cases import SEED
from test_attention_cascade import prefixes_of, tree
from test_attention_planner import COSTS, batch, interpret, sequences

from cupaged import attention
from cupaged.attention import DevicePlanner, Grid, merge_states, plan, plan_cascade, run_cascade
from cupaged.cuda import jit
from cupaged.errors import CupagedError, InvalidArgument

from . import emulator
from .emulator import EmulationError
from .guarded_memory import GuardedMemory

FEW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def device(monkeypatch):
    memory = GuardedMemory()

    def kernel(source, name, **defines):
        kernel = emulator.emulate(source, name, **defines)
        kernel.after_launch = memory.check
        return kernel

    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(attention.kernel, "_workspaces", {})
    monkeypatch.setattr(attention.kernel, "_shared_memory_per_sm", lambda device: attention_cases.SHARED_MEMORY[90])
    return memory


def planner(arguments, max_sequences=20, max_tokens=9000, max_pages=70000, max_tokens_each=None):
    names = ("num_heads", "num_kv_heads", "block_size", "num_blocks", "sliding_window")
    shape = {name: arguments[name] for name in names if name in arguments}
    sizes = {"max_sequences": max_sequences, "max_tokens": max_tokens, "max_pages": max_pages}
    return DevicePlanner(**shape, grid=arguments["decode_grid"], **sizes, max_tokens_each=max_tokens_each)


def index_of(arguments):
    return [arguments[name] for name in ("q_indptr", "seq_lens", "page_indptr", "page_indices")]


def records(planned):
    """What plan.cu has written: header, and as many tiles and CTAs as that says."""
    memory, starts = planned._memory, planned._starts
    header = np.array(memory[starts["header"] :][:4])
    tiles = np.array(memory[starts["tiles"] :][: 12 * header[0]]).reshape(-1, 12)
    return header, tiles, np.array(memory[starts["ctas"] :][: 8 * header[2]]).reshape(-1, 8)


@st.composite
def arguments(draw):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    tile_rows, step = draw(st.sampled_from([(64, 16), (128, 128)]))
    return batch(
        draw(sequences(3000)),
        draw(st.sampled_from([1, 16, 256])),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        decode_grid=Grid(draw(st.integers(1, 700)), tile_rows, step, *draw(COSTS)),
        sliding_window=draw(st.none() | st.integers(1, 3000)),
    )


@FEW
@given(arguments())
def test_the_device_makes_the_plan_of_the_host(device, arguments):
    made, planned = plan(**arguments), planner(arguments)
    planned.update(*index_of(arguments))
    planned.launch()
    header, tiles, ctas = records(planned)
    assert header.tolist() == made.header.tolist()
    assert tiles.tolist() == made.tiles.tolist()
    assert ctas.tolist() == made.ctas.tolist()
    planned.check()


def test_a_batch_of_4096_sequences(device):
    """More sequences and tiles than threads; then one that is smaller in the same arrays."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(0, 300, 4096)
    rows = np.where(rng.random(4096) < 0.1, lengths // 4, np.minimum(lengths, 1))
    for number in (4096, 70):
        arguments = batch([*zip(lengths[:number], rows[:number], strict=True)], decode_grid=Grid(264), num_blocks=10**6)
        if number == 4096:
            planned = planner(arguments, 4096, int(rows.sum()), arguments["page_indices"].size)
        planned.update(*index_of(arguments))
        planned.launch()
        made = plan(**arguments)
        for got, expected in zip(records(planned), (made.header, made.tiles, made.ctas), strict=True):
            assert (got == expected).all()


SOURCE = (jit.source_folder() / "plan.cu").read_text()


@pytest.mark.parametrize("place", [match.span() for match in re.finditer(r"__syncthreads\(\);", SOURCE)])
def test_no_barrier_can_be_missing(device, monkeypatch, place):
    text = jit.read_source("plan.cu")
    offset = text.index(SOURCE[place[0] - 40 : place[1] + 40]) + 40
    monkeypatch.setattr(jit, "read_source", lambda source: text[:offset] + text[offset + place[1] - place[0] :])
    lengths = np.random.default_rng(SEED).integers(1, 300, 1100)
    shapes = [
        zip(lengths, np.where(lengths % 5 == 0, lengths, 1), strict=True),
        ((length, length % 2) for length in lengths),
        [(9000, 1)],
    ]
    for shape in shapes:
        arguments = batch([*shape], decode_grid=Grid(1200))
        planned, made = planner(arguments, 1100, 200000, 30000), plan(**arguments)
        planned.update(*index_of(arguments))
        for _ in range(30):
            planned._memory[planned._starts["header"] : planned._starts["flag"]] = -1
            try:
                planned.launch()
            except EmulationError:
                return
            if [x.tolist() for x in records(planned)] != [x.tolist() for x in (made.header, made.tiles, made.ctas)]:
                return
    raise AssertionError("the kernel works as well without it")


def test_runs_follow_a_batch_that_changes(device):
    """What a captured graph replays: launch() and run() with nothing but the arrays' contents changed."""
    rng = np.random.default_rng([SEED, 7])
    shape = {"heads": (8, 2), "head_dim": 64, "num_ctas": 3}
    cases = [((70, 1), (19, 1), (130, 1)), ((200, 1),), ((0, 0), (33, 1), (64, 1), (5, 1)), ((20, 1), (129, 1))]
    planned = None
    for sequences_of_case in cases:
        drawn = attention_cases.draw(attention_cases.Case(sequences_of_case, **shape), rng)
        index = [getattr(drawn.plan, name) for name in ("q_indptr", "seq_lens", "page_indptr", "page_indices")]
        num_blocks = drawn.k_pool.shape[1]
        planned = planner(
            {"num_heads": 8, "num_kv_heads": 2, "block_size": 16, "num_blocks": num_blocks, "decode_grid": Grid(3)}, 4, 4, 80, 1
        )
        q = device.empty((4, 8, 64), drawn.q.dtype)
        q[: len(drawn.q)] = drawn.q
        planned.update(*index)
        for _ in range(2):
            planned.launch()
            out, lse = attention.run(planned, q, *(device.asarray(x) for x in (drawn.k_pool, drawn.v_pool)), return_lse=True)
            attention_cases.check(drawn, out[: len(drawn.q)], lse[: len(drawn.q)])
            assert np.isnan(out[len(drawn.q) :].astype(np.float32)).all(), "rows of no sequence are written to"
        planned.check()


WRONG = [  # of arrays on the device
    ("q_indptr", [0, 5, 3, 12]),
    ("q_indptr", [0, -1, 3, 12]),
    ("q_indptr", [0, 5, 10, 2**31 - 1]),
    ("q_indptr", [0, 40, 2, 40]),
    ("seq_lens", [100, -7, 40]),
    ("seq_lens", [100, 2147480000, 40]),
    ("seq_lens", [3, 50, 40]),
    ("page_indptr", [0, 7, 2, 14]),
    ("page_indptr", [0, 7, 11, 2147480000]),
    ("page_indptr", [-5, 7, 11, 14]),
]


@pytest.mark.parametrize(("name", "values"), WRONG, ids=str)
def test_what_cannot_be_is_clamped_and_reported(device, name, values):
    arguments = batch([(100, 5), (50, 5), (40, 2)], decode_grid=Grid(5))
    planned = planner(arguments, 3, 40, 14)
    planned.update(*index_of(arguments))
    planned.launch()
    planned.check()
    getattr(planned, name)[...] = values
    planned.launch()
    header, tiles, ctas = records(planned)
    room = planned._starts["ctas"] - planned._starts["tiles"]
    assert 12 * header[0] <= room
    assert (ctas[:, :2] >= 0).all()
    assert ctas[-1, 2] == header[0] * 2
    for first_row, num_rows, kv_start, kv_stop, page_begin, first_token, *_ in tiles.tolist():
        assert 0 <= first_token + first_row // 4 <= first_token + (first_row + num_rows - 1) // 4 < 40
        assert 0 <= kv_start <= kv_stop
        assert kv_stop == 0 or 0 <= page_begin <= page_begin + (kv_stop - 1) // 16 < 14
    with pytest.raises(CupagedError, match="a batch planned on the device had a length or a page id that cannot be"):
        planned.check()
    planned.check()  # reported once
    planned.update(*index_of(arguments))
    planned.launch()
    assert (records(planned)[2] == plan(**arguments).ctas).all()
    planned.check()


def test_a_wrong_page_id_is_reported(device):
    drawn = attention_cases.draw(attention_cases.Case(((70, 1), (19, 1)), heads=(8, 2)), np.random.default_rng(SEED))
    shape = {"num_heads": 8, "num_kv_heads": 2, "block_size": 16, "num_blocks": drawn.k_pool.shape[1], "decode_grid": Grid(3)}
    planned = planner(shape, 2, 2, 30, 1)
    index = [getattr(drawn.plan, name) for name in ("q_indptr", "seq_lens", "page_indptr", "page_indices")]
    planned.update(*index)
    arrays = [device.asarray(x) for x in (drawn.q, drawn.k_pool, drawn.v_pool)]
    for wrong in (-1, drawn.k_pool.shape[1], 2147480000):
        planned.page_indices[2] = wrong
        planned.launch()
        attention.run(planned, *arrays)
        with pytest.raises(CupagedError, match="page id"):
            planned.check()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([(5, 1)] * 4, "seq_lens gives 4 sequences; give 3 at most"),
        ([(50, 41)], "q_indptr gives 41 rows; give 40 at most"),
        ([(50, 9)], "q_indptr gives 9 rows in one sequence; give 8 at most"),
        ([(230, 1)], "page_indptr gives 15 entries; give 14 at most"),
    ],
    ids=str,
)
def test_a_batch_too_large_is_refused(device, sequences, message):
    arguments = batch([(100, 5)])
    planned = planner(arguments | {"num_blocks": 99}, 3, 40, 14, 8 if sequences[0][1] == 9 else None)
    with pytest.raises(InvalidArgument, match=message):
        planned.update(*index_of(batch(sequences, num_blocks=99)))


def test_what_plan_refuses_update_refuses(device):
    arguments = batch([(100, 5), (50, 5), (40, 2)])
    planned = planner(arguments | {"num_blocks": 3}, 3, 40, 14)
    with pytest.raises(InvalidArgument, match="page_indices holds block 3"):
        planned.update(*index_of(arguments))
    with pytest.raises(InvalidArgument, match="max_sequences is 4097"):
        planner(arguments, 4097)
    with pytest.raises(InvalidArgument, match="max_pages is 0"):
        planner(arguments, max_pages=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(5, 3, 64), (257, 128), (1, 8), (0, 64)], ids=str)
def test_merge_states(device, dtype, shape):
    rng = np.random.default_rng(SEED)
    outs = [rng.standard_normal(shape).astype(attention_cases.DTYPES[dtype]) for _ in range(2)]
    lses = [(20 * rng.standard_normal(shape[:-1])).astype(np.float32) for _ in range(2)]
    for out, lse in zip(outs, lses, strict=True):
        unseen = rng.random(shape[:-1]) < 0.3
        lse[unseen], out[unseen] = -np.inf, np.nan
    exact = [x.astype(np.float64) for pair in zip(outs, lses, strict=True) for x in pair]
    expected, expected_lse = merge_states(*exact)
    arrays = [device.asarray(x) for pair in zip(outs, lses, strict=True) for x in pair]
    got, lse = merge_states(*arrays)
    assert (got.dtype, lse.dtype) == (outs[0].dtype, np.float32)
    tolerance = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert merge_states(*arrays, out=arrays[0])[0] is arrays[0]
    assert arrays[0].tobytes() == got.tobytes()


def test_merge_states_refuses_what_does_not_fit(device):
    out, lse = device.empty((4, 64), np.float16), device.empty((4,), np.float32)
    for arguments, message in (
        ((out, lse[:3], out, lse), r"lse_a has shape \(3,\)"),
        ((out, lse, out, lse.astype(np.float64)), "lse_b is float64; give float32"),
        ((out, lse, device.empty((4, 64), np.float32), lse), "out_b is float32; give float16"),
        ((out.astype(np.float64), lse, out, lse), "out_a is float64; give bfloat16 or float16 or float32"),
        ((out, lse, np.zeros((4, 64), np.float16), lse), "out_b is a numpy.ndarray; give a CuPy array"),
        ((out, lse, device.empty((4, 128), np.float16)[:, ::2], lse), "out_b has strides"),
        ((out[:, :9].copy().view(type(out)), lse, device.empty((4, 9), np.float16), lse), "out_a has head_dim 9"),
        ((out, lse, out, lse, device.empty((5, 64), np.float16)), "out has shape"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            merge_states(*arguments)


@pytest.mark.parametrize(
    ("groups", "heads", "dtype"),
    [
        ([(5, [(3, 1)] * 6)], (8, 2), "bfloat16"),
        ([(0, [(30, 1)]), (8, [(40, 1), (20, 18), (9, 1)]), (0, [(50, 50)]), (2, [(1, 1), (17, 3)])], (4, 2), "float16"),
    ],
    ids=["decodes", "mixed"],
)
def test_cascade(device, groups, heads, dtype):
    index, shape, k_pool, v_pool, q = tree(groups, 16, heads, head_dim=64)
    q, k_pool, v_pool = (device.asarray(x.astype(attention_cases.DTYPES[dtype])) for x in (q, k_pool, v_pool))
    grids = {"decode_grid": Grid(3)}
    made = plan_cascade(**index, prefixes=prefixes_of(groups), **shape, **grids)
    out, lse = run_cascade(made, q, k_pool, v_pool, return_lse=True)
    exact = [x.astype(np.float64) for x in (q, k_pool, v_pool)]
    expected = interpret(plan(**index, **shape, **grids), *exact, 1 / 8)
    error = np.linalg.norm(out.astype(np.float64) - expected[0], axis=-1)
    assert (error <= attention_cases.TOLERANCE[dtype] * np.linalg.norm(expected[0], axis=-1)).all()
    assert abs(lse - expected[1]).max() <= attention_cases.LSE_TOLERANCE
    given_out = device.empty(out.shape, out.dtype)
    assert run_cascade(made, q, k_pool, v_pool, out=given_out) is given_out
    assert given_out.tobytes() == out.tobytes()
