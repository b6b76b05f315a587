"""The plan of paged attention: its items cover what must be computed once, evenly, and are enough to compute it from."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from op_cases import SEED, draw_batch

from cupaged.attention import merge_states, plan
from cupaged.attention.planner import DECODE_COST, ITEM_COST, PREFILL_COST, STEP
from cupaged.errors import InvalidArgument
from cupaged.ops import numpy as ops

FEW = settings(deadline=None, max_examples=60)
MANY = settings(deadline=None, max_examples=120)


def sequences(longest: int):
    """(length, query rows) of the sequences of a batch: decodes, prefills, chunks, without rows, without tokens."""
    length = st.integers(1, longest) | st.sampled_from([STEP - 1, STEP, STEP + 1, 2 * STEP])
    decode = st.tuples(length, st.just(1))
    few = length.map(lambda n: (n, min(n, 3)))
    prefill = st.integers(1, longest // 4).map(lambda n: (n, n))
    chunk = st.tuples(st.integers(1, longest // 4), st.integers(0, longest // 2)).map(lambda s: (s[0] + s[1], s[0]))
    idle = length.map(lambda n: (n, 0))
    empty = st.integers(0, 70).map(lambda n: (0, n))
    return st.lists(decode | decode | few | prefill | chunk | idle | empty, max_size=12)


def batch(sequences, block_size=16, **changed):
    """The arguments of `plan`, with page tables of ascending ids."""
    lengths, rows = np.array([*sequences], int).reshape(-1, 2).T
    page_indptr = np.cumsum([0, *(-(-lengths // block_size))], dtype=np.int32)
    return {
        "q_indptr": np.cumsum([0, *rows], dtype=np.int32),
        "seq_lens": lengths.astype(np.int32),
        "page_indptr": page_indptr,
        "page_indices": np.arange(page_indptr[-1], dtype=np.int32),
        "num_heads": 8,
        "num_kv_heads": 2,
        "block_size": block_size,
        "num_blocks": int(page_indptr[-1]) + 1,
        "num_ctas": 13,
        "sliding_window": None,
        **changed,
    }


@st.composite
def arguments(draw, longest=3000):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    return batch(
        draw(sequences(longest)),
        draw(st.sampled_from([1, 16, 256])),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        num_ctas=draw(st.integers(1, 400)),
        sliding_window=draw(st.none() | st.integers(1, longest)),
    )


def visible(arguments, sequence, row):
    """Positions (start, stop) that a packed row sees, one by one from the definition."""
    group = arguments["num_heads"] // arguments["num_kv_heads"]
    length, tokens = arguments["seq_lens"][sequence], np.diff(arguments["q_indptr"])[sequence]
    position = int(length - tokens + row // group)
    window = arguments["sliding_window"] or position + 1
    return max(0, position - window + 1), max(0, position + 1)


def expected_tasks(arguments):
    """(sequence, kv head, first row, number of rows) -> (kv_start, kv_stop, cost of a step)."""
    found = {}
    for sequence, tokens in enumerate(np.diff(arguments["q_indptr"])):
        rows = int(tokens) * arguments["num_heads"] // arguments["num_kv_heads"]
        height = 16 if rows <= 16 else 64
        for first in range(0, rows, height):
            count = min(height, rows - first)
            starts, stops = zip(*(visible(arguments, sequence, row) for row in range(first, first + count)), strict=True)
            cost = DECODE_COST if count <= 16 else PREFILL_COST
            for head in range(arguments["num_kv_heads"]):
                found[sequence, head, first, count] = (min(starts), max(stops), cost)
    return found


def num_steps(start, stop):
    return len({position // STEP for position in range(start, stop)})


@MANY
@given(arguments())
def test_every_position_a_tile_sees_is_in_one_item_and_no_other_is(arguments):
    made = plan(**arguments)
    expected = expected_tasks(arguments)
    ranges = {}
    for *tile, start, stop, _, _ in made.items.tolist():
        ranges.setdefault(tuple(tile), []).append((start, stop))
    assert ranges.keys() == expected.keys()
    for tile, (start, stop, _) in expected.items():
        covered = [position for part in ranges[tile] for position in range(*part)]
        assert sorted(covered) == list(range(start, stop))
        if len(ranges[tile]) > 1:
            assert all(a < b for a, b in ranges[tile]), "an empty part"
            assert all(a % STEP == 0 for a, _ in ranges[tile] if a != start), "a cut inside a step"


@MANY
@given(arguments())
def test_slots_are_unique_and_bounded_and_a_cut_task_has_its_own_in_order(arguments):
    made = plan(**arguments)
    num_ctas = arguments["num_ctas"]
    *_, slot, task = made.items.T
    assert ((slot == -1) == (task == -1)).all()
    parts = made.items[slot >= 0]
    parts = parts[np.argsort(parts[:, 6])]
    assert parts[:, 6].tolist() == list(range(made.num_slots))
    assert made.num_slots <= 2 * (num_ctas - 1)
    end = 0
    for index, (first, count) in enumerate(made.tasks.tolist()):
        assert (first, count) == (end, max(count, 2))
        end = first + count
        of_task = parts[first:end]
        assert (of_task[:, 7] == index).all()
        assert (of_task[:, :4] == of_task[0, :4]).all()
        assert (of_task[1:, 4] == of_task[:-1, 5]).all(), "not consecutive"
    assert end == made.num_slots
    whole = made.items[slot < 0, :4]
    assert len(np.unique(whole, axis=0)) == len(whole), "a task in several items without a slot"

    assert made.cta_indptr.shape == (num_ctas + 1,)
    assert made.cta_indptr[0] == 0
    assert made.cta_indptr[-1] == len(made.items)
    assert (np.diff(made.cta_indptr) >= 0).all()
    assert all((slot[a:b] >= 0).sum() <= 2 for a, b in zip(made.cta_indptr[:-1], made.cta_indptr[1:], strict=True))
    assert all(a.dtype == np.int32 for a in (made.items, made.cta_indptr, made.tasks))


def loads(made, arguments):
    """Cost of every CTA, and of all tasks had none been cut."""
    tasks = expected_tasks(arguments)
    cost = [num_steps(*item[4:6]) * tasks[tuple(item[:4])][2] + ITEM_COST for item in made.items.tolist()]
    cost_before = np.concatenate([[0], np.cumsum(cost, dtype=int)])
    uncut = sum(num_steps(start, stop) * step_cost + ITEM_COST for start, stop, step_cost in tasks.values())
    return np.diff(cost_before[made.cta_indptr]), uncut


@MANY
@given(arguments())
@example(batch([(6400, 80)], num_heads=1, num_kv_heads=1, num_ctas=5))  # a tile of 64 rows and one of 16
def test_the_costliest_cta_is_within_a_step_and_an_item_of_the_ideal(arguments):
    made = plan(**arguments)
    load, total = loads(made, arguments)
    ideal = -(-total // arguments["num_ctas"])
    decode_only = (made.items[:, 3] <= 16).all()
    assert load.max() <= ideal + ITEM_COST + (0 if decode_only else PREFILL_COST)


def interpret(made, q, k_pool, v_pool, scale):
    """Attention from the items alone, in float64: (out, lse), NaN where no item came by."""
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // made.num_kv_heads
    out, lse = np.full(q.shape, np.nan), np.full((num_rows, num_heads), np.nan)
    slots = [None] * made.num_slots

    def finish(item, part):
        sequence, head, first, count = item[:4]
        token, member = np.divmod(np.arange(first, first + count), group)
        where = made.q_indptr[sequence] + token, head * group + member
        assert np.isnan(lse[where]).all(), "done twice"
        out[where], lse[where] = part

    for cta in np.random.default_rng(SEED).permutation(made.num_ctas):  # in any order
        for item in made.items[made.cta_indptr[cta] : made.cta_indptr[cta + 1]].tolist():
            sequence, head, first, count, start, stop, slot, task = item
            token, member = np.divmod(np.arange(first, first + count), group)
            tokens = made.q_indptr[sequence + 1] - made.q_indptr[sequence]
            position = made.seq_lens[sequence] - tokens + token
            page, offset = np.divmod(np.arange(start, stop), made.block_size)
            page = made.page_indices[made.page_indptr[sequence] + page]
            rows = q[made.q_indptr[sequence] + token, head * group + member]
            score = rows @ k_pool[head, page, offset].T * scale
            distance = position[:, None] - np.arange(start, stop)
            score[(distance < 0) | (distance >= (made.sliding_window or math.inf))] = -np.inf
            top = score.max(axis=1, initial=-np.inf)
            weight = np.exp(score - np.where(top == -np.inf, 0, top)[:, None])
            total = weight.sum(axis=1)
            seen = total > 0
            part = np.full((count, head_dim), np.nan if slot >= 0 else 0.0)
            part[seen] = (weight @ v_pool[head, page, offset])[seen] / total[seen, None]
            part_lse = np.full(count, -np.inf)
            part_lse[seen] = top[seen] + np.log(total[seen])
            if slot < 0:
                finish(item, (part, part_lse))
                continue
            slots[slot] = (part, part_lse)
            begin, number = made.tasks[task]
            parts = slots[begin : begin + number]
            if all(part is not None for part in parts):  # the last to arrive merges
                merged = parts[0]
                for part in parts[1:]:
                    merged = merge_states(*merged, *part)
                finish(item, merged)
    return out, lse


@FEW
@given(
    sequences(500),
    st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 2), (16, 1), (20, 1)]),
    st.sampled_from([1, 8, 128]),
    st.integers(1, 60),
    st.none() | st.integers(1, 400),
    st.booleans(),
)
def test_attention_follows_from_the_plan_alone(sequences, heads, block_size, num_ctas, window, shared):
    rng = np.random.default_rng(SEED)
    drawn = draw_batch(rng, sequences, heads[1], 8, block_size, shared)
    k_pool, v_pool = drawn.pop("k_pool"), drawn.pop("v_pool")
    q = rng.standard_normal((drawn["q_indptr"][-1], heads[0], 8))
    expected = ops.paged_attention(q, k_pool, v_pool, **drawn, scale=0.5, sliding_window=window)
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "block_size": block_size, "num_blocks": k_pool.shape[1]}
    made = plan(**drawn, **shape, num_ctas=num_ctas, sliding_window=window)
    out, lse = interpret(made, q, k_pool, v_pool, 0.5)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    uncut = plan(**drawn, **shape, num_ctas=1, sliding_window=window)
    np.testing.assert_allclose(lse, interpret(uncut, q, k_pool, v_pool, 0.5)[1], rtol=1e-12, atol=1e-12)


def test_sequences_without_rows_or_tokens():
    assert plan(**batch([])).items.shape == (0, 8)
    made = plan(**batch([(5, 0), (0, 0)]))
    assert (made.items.shape, made.num_slots, made.cta_indptr.tolist()) == ((0, 8), 0, [0] * 14)
    assert plan(**batch([(0, 1)])).items.tolist() == [[0, h, 0, 4, 0, 0, -1, -1] for h in range(2)]


def test_prefill_comes_before_decode():
    made = plan(**batch([(300, 1), (900, 100), (7, 4), (20, 5)], num_ctas=40))
    order = made.items[:, 0].tolist()
    assert set(order[: order.index(0)]) == {1, 3}
    assert set(order[order.index(0) :]) == {0, 2}


def test_what_a_page_table_holds_past_its_sequence_is_not_looked_at():
    arguments = batch([(17, 1), (0, 1), (32, 32)], page_indptr=np.array([0, 4, 5, 8], np.int32), num_blocks=9)
    arguments["page_indices"] = np.array([8, 0, -1, 2147480000, -7, 1, 1, 2147480000, 2147480000], np.int32)
    plan(**arguments)
    arguments["page_indices"][6] = 9
    with pytest.raises(InvalidArgument, match=r"page_indices holds block 9; .* 0 to 8"):
        plan(**arguments)


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q_indptr", [0, 1, 41], "q_indptr is a list; give a NumPy array of int32"),
        ("q_indptr", np.array([0, 1, 41]), r"q_indptr is int64 of shape \(3,\)"),
        ("q_indptr", int32(0, 1), "q_indptr has 2 entries; give 3"),
        ("q_indptr", int32(1, 2, 41), "q_indptr begins with 1"),
        ("q_indptr", int32(0, 1, 0), "q_indptr gives sequence 1 -1"),
        ("q_indptr", int32(0, 2**31 - 1, -(2**31)), "q_indptr gives sequence 1 -4294967295"),
        ("q_indptr", int32(0, 1, 52), "q_indptr gives sequence 1 51"),
        ("seq_lens", int32(100, 50)[:, None], r"seq_lens is int32 of shape \(2, 1\)"),
        ("seq_lens", np.array([100, 50], np.float32), "seq_lens is float32"),
        ("seq_lens", int32(100, -1), "seq_lens gives sequence 1 -1"),
        ("page_indptr", int32(0, 7, 11, 12), "page_indptr has 4 entries; give 3"),
        ("page_indptr", int32(-1, 7, 11), "page_indptr begins with -1"),
        ("page_indptr", int32(0, 7, 5), "page_indptr gives sequence 1 -2; give a page"),
        ("page_indptr", int32(0, 6, 11), "page_indptr gives sequence 0 6"),
        ("page_indptr", int32(0, 7, 10), "page_indptr gives sequence 1 3"),
        ("page_indices", int32(*range(10)), "page_indices has 10 entries; give the 11 of page_indptr"),
        ("page_indices", int32(*range(10), 12), "page_indices holds block 12; give ids from 0 to 11"),
        ("page_indices", int32(*range(10), -1), "page_indices holds block -1"),
        ("num_heads", 7, "num_heads is 7; give a multiple of num_kv_heads, 2"),
        ("num_heads", 0, "num_heads is 0"),
        ("num_kv_heads", -2, "num_kv_heads is -2"),
        ("block_size", 24, "block_size is 24"),
        ("block_size", 512, "block_size is 512"),
        ("block_size", 16.0, "block_size is 16.0"),
        ("num_blocks", 0, "num_blocks is 0"),
        ("num_ctas", 0, "num_ctas is 0"),
        ("num_ctas", True, "num_ctas is True"),
        ("sliding_window", 0, "sliding_window is 0"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_name(argument, value, message):
    arguments = batch([(100, 1), (50, 40)])
    plan(**arguments)
    with pytest.raises(InvalidArgument, match=message):
        plan(**arguments | {argument: value})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_merge_states_is_attention_over_both(dtype, spread):
    rng = np.random.default_rng(SEED)
    score, value = (spread * rng.standard_normal((5, 3, 20))).astype(dtype), rng.standard_normal((20, 7)).astype(dtype)

    def attend(keys):
        top = score[..., keys].max(axis=-1, keepdims=True)
        weight = np.exp(score[..., keys] - top)
        total = weight.sum(axis=-1)
        return weight @ value[keys] / total[..., None], top[..., 0] + np.log(total)

    out, lse = merge_states(*attend(slice(0, 13)), *attend(slice(13, 20)))
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype]
    for got, expected in zip((out, lse), attend(slice(0, 20)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_merge_states_where_no_key_was_seen():
    lse = np.array([-np.inf, 2.0, -np.inf])
    out_a, out_b = np.array([[np.nan], [3.0], [np.inf]]), np.array([[5.0], [np.inf], [np.nan]])
    out, merged = merge_states(out_a, lse, out_b, np.array([1.0, -np.inf, -np.inf]))
    assert out.tolist() == [[5.0], [3.0], [0.0]]
    assert merged.tolist() == [1.0, 2.0, -np.inf]
    with pytest.raises(InvalidArgument, match=r"lse_b has shape \(2,\)"):
        merge_states(out_a, lse, out_b, lse[:2])
