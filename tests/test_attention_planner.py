"""The plan of paged attention: its parts cover what must be computed once, evenly, and are enough to compute it from."""

import itertools
import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from op_cases import SEED, draw_batch

from cupaged.attention import Grid, merge_states, plan, planner
from cupaged.attention.planner import DECODE_ROWS, FIXED_SPLIT
from cupaged.errors import InvalidArgument
from cupaged.ops import numpy as ops

FEW = settings(deadline=None, max_examples=60)
MANY = settings(deadline=None, max_examples=120)
STEP = Grid(1).step


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


def batch(sequences, block_size=16, num_ctas=13, **changed):
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
        "decode_grid": Grid(num_ctas),
        **changed,
    }


COSTS = st.sampled_from([(1, 4, 2), (1, 1, 1), (3, 2, 2), (2, 7, 5)])


@st.composite
def arguments(draw, longest=3000, batch_invariant=None):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    decode_grid = Grid(draw(st.integers(1, 400)), 64, draw(st.sampled_from([16, 64])), *draw(COSTS))
    wide = Grid(draw(st.integers(1, 200)), 128, 128, *draw(COSTS), kernel="sm90")
    causal = draw(st.integers(0, 3)) > 0
    fixed = draw(st.booleans()) if batch_invariant is None else batch_invariant
    return batch(
        draw(sequences(longest)),
        draw(st.sampled_from([1, 16, 256])),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        decode_grid=decode_grid,
        prefill_grid=draw(st.sampled_from([None, wide])),
        causal=causal,
        sliding_window=draw(st.none() | st.integers(1, longest)) if causal else None,
        batch_invariant=fixed,
    )


@dataclass(frozen=True)
class Part:
    """What one CTA does of a task, read off the records as a kernel does."""

    tile: int
    head: int
    start: int
    stop: int
    slot: int
    first_slot: int
    num_parts: int
    last: bool  # of the task


def parts_of(made, cta):
    num_tiles, num_prefill, num_ctas, slots_per_head = made.header.tolist()
    assert (num_tiles, num_ctas) == (len(made.tiles), len(made.ctas))
    task, step, stop_task, stop_step, slot, head_first_slot, head_parts, tail_parts = made.ctas[cta].tolist()
    begins_inside, size = step > 0, made.grid.step
    while (task, step) < (stop_task, stop_step):
        line = task - num_prefill * made.num_kv_heads
        head, tile = divmod(task, num_prefill) if line < 0 else divmod(line, num_tiles - num_prefill)
        tile += 0 if line < 0 else num_prefill
        _, _, start, stop, *_, fixed_slot, number, count = made.tiles[tile].tolist()
        origin = start // size * size
        where = max(start, origin + step * size), min(stop, origin + stop_step * size) if task == stop_task else stop
        if count > 1:
            assert step == 0
            assert task < stop_task
            first = head * slots_per_head + fixed_slot
            found = first + number, first, count
        elif step > 0:
            found = slot, head_first_slot, head_parts
        elif task == stop_task:
            found = slot + begins_inside, slot + begins_inside, tail_parts
        else:
            found = -1, -1, 1
        yield Part(tile, head, *where, *found, where[1] == stop)
        task, step = task + 1, 0


def all_parts(made):
    return [[*parts_of(made, cta)] for cta in range(len(made.ctas))]


def sequence_of(made, tile):
    """The one that has a tile's rows: of those that begin with its first token, the one that has any."""
    first_token = made.tiles[tile, 5]
    return int(np.flatnonzero((made.q_indptr[:-1] == first_token) & (np.diff(made.q_indptr) > 0))[0])


def visible(arguments, sequence, row):
    """Positions (start, stop) that a packed row sees, one by one from the definition."""
    group = arguments["num_heads"] // arguments["num_kv_heads"]
    length, tokens = int(arguments["seq_lens"][sequence]), np.diff(arguments["q_indptr"])[sequence]
    if not arguments.get("causal", True):
        return 0, length
    position = int(length - tokens + row // group)
    window = arguments.get("sliding_window") or position + 1
    return max(0, position - window + 1), max(0, position + 1)


def grid_of(arguments):
    """The grid that the plan must be made for."""
    group = arguments["num_heads"] // arguments["num_kv_heads"]
    prefill = (np.diff(arguments["q_indptr"]) * group > DECODE_ROWS).any()
    if arguments.get("prefill_grid") is None or not prefill or arguments.get("batch_invariant"):
        return arguments["decode_grid"]
    if arguments["prefill_grid"].kernel == "sm90" and arguments["block_size"] < 8:
        return arguments["decode_grid"]
    return arguments["prefill_grid"]


def expected_tiles(arguments):
    """(sequence, first row, number of rows) -> (kv_start, kv_stop, cost of a step)."""
    found, grid = {}, grid_of(arguments)
    for sequence, tokens in enumerate(np.diff(arguments["q_indptr"])):
        rows = int(tokens) * arguments["num_heads"] // arguments["num_kv_heads"]
        for first in range(0, rows, grid.tile_rows):
            count = min(grid.tile_rows, rows - first)
            starts, stops = zip(*(visible(arguments, sequence, row) for row in range(first, first + count)), strict=True)
            prefill = count > DECODE_ROWS or arguments.get("batch_invariant")
            found[sequence, first, count] = min(starts), max(stops), grid.prefill_cost if prefill else grid.decode_cost
    return found


def num_steps(start, stop, step):
    return len({position // step for position in range(start, stop)})


@MANY
@given(arguments())
def test_every_position_a_tile_sees_is_in_one_part_and_no_other_is(arguments):
    made = plan(**arguments)
    assert made.grid == grid_of(arguments)
    expected = expected_tiles(arguments)
    ranges = {}
    for cta in all_parts(made):
        for part in cta:
            first_row, num_rows = made.tiles[part.tile, :2].tolist()
            key = sequence_of(made, part.tile), first_row, num_rows, part.head
            ranges.setdefault(key, []).append((part.start, part.stop))
    assert ranges.keys() == {(*tile, head) for tile in expected for head in range(arguments["num_kv_heads"])}
    for (*tile, _), found in ranges.items():
        start, stop, _ = expected[tuple(tile)]
        covered = [position for part in found for position in range(*part)]
        assert sorted(covered) == list(range(start, stop))
        if len(found) > 1:
            assert all(a < b for a, b in found), "an empty part"
            size = FIXED_SPLIT if arguments["batch_invariant"] else made.grid.step
            assert all(a % size == 0 for a, _ in found if a != start), "a cut inside a step"


@MANY
@given(arguments())
def test_tiles_say_where_their_sequences_are(arguments):
    made = plan(**arguments)
    tokens = np.diff(arguments["q_indptr"])
    prefill = (made.tiles[:, 1] > DECODE_ROWS) | arguments["batch_invariant"]
    assert made.header[1] == prefill.sum()
    assert (prefill[: made.header[1]]).all(), "a decode tile before one of prefill"
    assert made.decode_rows == (0 if arguments["batch_invariant"] else DECODE_ROWS)
    for tile, (_, _, _, _, page_begin, first_token, first_position, mask_begin, mask_words, *_) in enumerate(
        made.tiles.tolist()
    ):
        b = sequence_of(made, tile)
        assert (page_begin, first_token) == (arguments["page_indptr"][b], arguments["q_indptr"][b])
        assert first_position == arguments["seq_lens"][b] - (tokens[b] if arguments["causal"] else 0)
        assert (mask_begin, mask_words) == (0, 0)


@MANY
@given(arguments())
def test_slots_are_unique_and_bounded_and_a_cut_task_has_its_own_in_order(arguments):
    made = plan(**arguments)
    tasks, slots = {}, []
    for cta in all_parts(made):
        of_cta = [part for part in cta if part.num_parts > 1]
        slots += [part.slot for part in of_cta]
        if not arguments["batch_invariant"]:
            assert len(of_cta) <= 2
        for part in of_cta:
            tasks.setdefault(part.first_slot, []).append(part)
    assert sorted(slots) == list(range(made.num_slots))
    if not arguments["batch_invariant"]:
        assert made.num_slots <= 2 * (len(made.ctas) - 1)
    for first, parts in tasks.items():
        assert [part.slot for part in parts] == list(range(first, first + len(parts)))  # as the CTAs come
        assert {part.num_parts for part in parts} == {len(parts)}
        assert len({(*made.tiles[part.tile, :2], sequence_of(made, part.tile), part.head) for part in parts}) == 1
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts)), "not consecutive"
    whole = [(part.tile, part.head) for cta in all_parts(made) for part in cta if part.num_parts == 1]
    assert len(set(whole)) == len(whole), "a task in several parts without a slot"
    unused = [cta for cta, parts in zip(made.ctas, all_parts(made), strict=True) if not any(p.num_parts > 1 for p in parts)]
    assert all((cta[4:] == 0).all() for cta in unused), "slots of no part"
    for array, columns in ((made.tiles, 12), (made.ctas, 8)):
        assert (array.dtype, array.shape[1], array.flags.c_contiguous) == (np.int32, columns, True)


@MANY
@given(arguments(batch_invariant=False))
@example(batch([(6400, 80)], num_heads=1, num_kv_heads=1, num_ctas=5))  # a tile of 64 rows and one of 16
def test_the_costliest_cta_is_within_a_step_and_an_item_of_the_ideal(arguments):
    made = plan(**arguments)
    grid, tiles = made.grid, expected_tiles(arguments)

    def cost(start, stop, step_cost):
        return num_steps(start, stop, grid.step) * step_cost + grid.item_cost

    def step_cost(part):
        return grid.prefill_cost if made.tiles[part.tile, 1] > DECODE_ROWS else grid.decode_cost

    load = [sum(cost(part.start, part.stop, step_cost(part)) for part in cta) for cta in all_parts(made)]
    ideal = -(-sum(cost(*tile) for tile in tiles.values()) * arguments["num_kv_heads"] // grid.num_ctas)
    costs = {step_cost for _, _, step_cost in tiles.values()} - {1}  # of a step of cost 1 nothing is rounded
    assert max(load) <= ideal + grid.item_cost + max(costs, default=0)


@FEW
@given(arguments(longest=9000, batch_invariant=True))
def test_fixed_parts_are_spread_within_a_part(arguments):
    made = plan(**arguments)
    grid = made.grid

    def cost(start, stop):
        return num_steps(start, stop, grid.step) * grid.prefill_cost + grid.item_cost

    load = [sum(cost(part.start, part.stop) for part in cta) for cta in all_parts(made)]
    assert max(load) <= -(-sum(load) // grid.num_ctas) + cost(0, FIXED_SPLIT)


@FEW
@given(arguments(longest=5000, batch_invariant=True), st.integers(0, 11))
def test_fixed_parts_do_not_depend_on_the_batch(arguments, number):
    """What a sequence's tiles are, alone and among others."""
    b = number % max(arguments["seq_lens"].size, 1)
    if b < arguments["seq_lens"].size:
        tokens, length = int(np.diff(arguments["q_indptr"])[b]), int(arguments["seq_lens"][b])
        shape = {name: arguments[name] for name in ("num_heads", "num_kv_heads", "causal", "sliding_window")}
        alone = plan(**batch([(length, tokens)], arguments["block_size"], **shape, batch_invariant=True))
        among = plan(**arguments)
        mine = [tile for tile in range(len(among.tiles)) if sequence_of(among, tile) == b]
        same = [0, 1, 2, 3, 6, 10, 11]  # rows, positions and number of the part
        assert among.tiles[mine][:, same].tolist() == alone.tiles[:, same].tolist()


def interpret(made, q, k_pool, v_pool, scale, sees=None):
    """Attention from the records alone, in float64: (out, lse), NaN where no part came by.

    sees(sequence, token, positions) says what a token of a masked batch sees.
    """
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // made.num_kv_heads
    k_pool, v_pool = (x.reshape(made.num_kv_heads, made.num_blocks, made.block_size, head_dim) for x in (k_pool, v_pool))
    page_indices = made.page_indices.reshape(-1)
    out, lse = np.full(q.shape, np.nan), np.full((num_rows, num_heads), np.nan)
    slots = [None] * made.num_slots

    def finish(where, part):
        assert np.isnan(lse[where]).all(), "done twice"
        out[where], lse[where] = part

    for cta in np.random.default_rng(SEED).permutation(len(made.ctas)):  # in any order
        for part in parts_of(made, cta):
            first, count, _, _, page_begin, first_token, first_position, *_ = made.tiles[part.tile].tolist()
            token, member = np.divmod(np.arange(first, first + count), group)
            where = first_token + token, part.head * group + member
            positions = np.arange(part.start, part.stop)
            page, offset = np.divmod(positions, made.block_size)
            page = page_indices[page_begin + page]
            score = q[where] @ k_pool[part.head, page, offset].T * scale
            distance = (first_position + token)[:, None] - positions
            seen = (distance >= 0) & (distance < (made.sliding_window or math.inf))
            if sees is not None:
                seen = np.array([sees(sequence_of(made, part.tile), t, positions) for t in token], bool).reshape(score.shape)
            score[~seen] = -np.inf
            top = score.max(axis=1, initial=-np.inf)
            weight = np.exp(score - np.where(top == -np.inf, 0, top)[:, None])
            total = weight.sum(axis=1)
            any_seen = total > 0
            result = np.full((count, head_dim), 0.0 if part.num_parts == 1 else np.nan)
            result[any_seen] = (weight @ v_pool[part.head, page, offset])[any_seen] / total[any_seen, None]
            result_lse = np.full(count, -np.inf)
            result_lse[any_seen] = top[any_seen] + np.log(total[any_seen])
            if part.num_parts == 1:
                finish(where, (result, result_lse))
                continue
            slots[part.slot] = (result, result_lse)
            of_task = slots[part.first_slot : part.first_slot + part.num_parts]
            if all(one is not None for one in of_task):  # the last to arrive merges
                merged = of_task[0]
                for one in of_task[1:]:
                    merged = merge_states(*merged, *one)
                finish(where, merged)
    return out, lse


@FEW
@given(
    sequences(500),
    st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 2), (16, 1), (20, 1)]),
    st.sampled_from([1, 8, 128]),
    st.integers(1, 60),
    st.none() | st.integers(1, 400),
    st.booleans(),
    st.booleans(),
)
def test_attention_follows_from_the_plan_alone(sequences, heads, block_size, num_ctas, window, shared, wide):
    rng = np.random.default_rng(SEED)
    drawn = draw_batch(rng, sequences, heads[1], 8, block_size, shared)
    k_pool, v_pool = drawn.pop("k_pool"), drawn.pop("v_pool")
    q = rng.standard_normal((drawn["q_indptr"][-1], heads[0], 8))
    expected = ops.paged_attention(q, k_pool, v_pool, None, ops.index(**drawn), scale=0.5, sliding_window=window)
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "block_size": block_size, "num_blocks": k_pool.shape[1]}
    grids = {"decode_grid": Grid(num_ctas), "prefill_grid": Grid(num_ctas, 128, 128, 3, 2, kernel="sm90") if wide else None}
    made = plan(**drawn, **shape, **grids, sliding_window=window)
    out, lse = interpret(made, q, k_pool, v_pool, 0.5)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    uncut = plan(**drawn, **shape, decode_grid=Grid(1), sliding_window=window)
    np.testing.assert_allclose(lse, interpret(uncut, q, k_pool, v_pool, 0.5)[1], rtol=1e-12, atol=1e-12)
    padded = padded_table(drawn)
    again = plan(**padded, **shape, **grids, sliding_window=window)
    assert (again.ctas == made.ctas).all()
    assert interpret(again, q, k_pool, v_pool, 0.5)[0].tobytes() == out.tobytes()


def padded_table(drawn):
    """The batch with a padded table, the unused entries of which nobody may follow."""
    tables = np.split(drawn["page_indices"], drawn["page_indptr"][1:-1])
    padded = np.full((drawn["seq_lens"].size, max(map(len, tables), default=0) + 2), 2147480000, np.int32)
    for row, table in zip(padded, tables, strict=False):
        row[: len(table)] = table
    return drawn | {"page_indptr": None, "page_indices": padded}


def test_sequences_without_rows_or_tokens():
    assert plan(**batch([])).tiles.shape == (0, 12)
    made = plan(**batch([(5, 0), (0, 0)]))
    assert (made.tiles.shape, made.num_slots, made.header.tolist()) == ((0, 12), 0, [0, 0, 13, 0])
    assert (made.ctas == 0).all()
    made = plan(**batch([(0, 1)]))
    assert made.tiles.tolist() == [[0, 4, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]]
    assert made.ctas[[0, -1], 0].tolist() == [0, 1]


def test_prefill_comes_before_decode():
    made = plan(**batch([(300, 1), (900, 100), (7, 4), (20, 5), (40, 17)], num_ctas=40))
    assert [(sequence_of(made, tile), *made.tiles[tile, :2].tolist()) for tile in range(len(made.tiles))] == [
        *((1, first, 64) for first in range(0, 384, 64)),
        (3, 0, 20),
        (4, 0, 64),
        (0, 0, 4),
        (1, 384, 16),
        (2, 0, 16),
        (4, 64, 4),
    ]
    assert made.header[1] == 8
    tasks = [(part.head, part.tile) for cta in all_parts(made) for part in cta]
    assert sorted(set(tasks), key=tasks.index) == [
        (h, t) for tiles in (range(8), range(8, 12)) for h in range(2) for t in tiles
    ]


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
        ("decode_grid", Grid(0), "decode_grid.num_ctas is 0"),
        ("decode_grid", Grid(True), "decode_grid.num_ctas is True"),
        ("decode_grid", Grid(1, step=96), "decode_grid.step is 96"),
        ("prefill_grid", Grid(1, item_cost=0), "prefill_grid.item_cost is 0"),
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


@FEW
@given(
    sequences(6000),
    st.sampled_from([(4, 2), (3, 3), (20, 1)]),
    st.integers(1, 30),
    st.none() | st.integers(1, 4000),
    st.integers(1, 40),
)
def test_fixed_parts_come_in_as_many_passes_as_the_slots_allow(sequences, heads, num_ctas, window, most):
    rng = np.random.default_rng(SEED)
    drawn = draw_batch(rng, sequences, heads[1], 8, 64)
    k_pool, v_pool = drawn.pop("k_pool"), drawn.pop("v_pool")
    q = rng.standard_normal((drawn["q_indptr"][-1], heads[0], 8))
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "block_size": 64, "num_blocks": k_pool.shape[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "MOST_SLOTS", most)
        made = plan(**drawn, **shape, decode_grid=Grid(num_ctas), sliding_window=window, batch_invariant=True)
    passes = [replace(made, **vars(one), later=[]) for one in (made_pass(made), *made.later)]
    assert made.num_slots == max(one.num_slots for one in passes)
    for one in passes:
        assert one.num_slots == heads[1] * one.header[3]
        tiles = len({(int(tile[5]), int(tile[0])) for tile in one.tiles})
        assert one.num_slots <= most or tiles == 1, "too many slots"
    results = [interpret(one, q, k_pool, v_pool, 0.5) for one in passes]
    done = np.array([~np.isnan(lse) for _, lse in results])
    assert (done.sum(axis=0) == 1).all(), "every row in one pass"
    out = sum(np.where(np.isnan(lse)[..., None], 0, out) for out, lse in results)
    expected = ops.paged_attention(q, k_pool, v_pool, None, ops.index(**drawn), scale=0.5, sliding_window=window)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)


def made_pass(made):
    """The first launch's."""
    slots = int(made.header[3]) * made.num_kv_heads
    return planner.Pass(made.header, made.tiles, made.ctas, slots)
