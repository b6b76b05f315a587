"""Cascade: a shared prefix attended once and joined with the rest gives what plain attention gives."""

import json
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from op_cases import SEED
from test_attention_planner import interpret

from cupaged.attention import Grid, SharedPrefix, merge_states, plan, plan_cascade, shared_prefixes
from cupaged.errors import InvalidArgument

RESULTS = Path(__file__).parent.parent / "scripts" / "results"
FEW = settings(deadline=None, max_examples=40)


def tree(groups, block_size, heads=(4, 2), head_dim=8):
    """A batch of groups of sequences, (shared blocks, [(own positions, rows), ...]): arguments of `plan`, k_pool, v_pool, q."""
    rng = np.random.default_rng(SEED)
    num_blocks = sum(shared + sum(-(-own // block_size) for own, _ in members) for shared, members in groups) + 3
    unused, tables, lengths, rows = iter(rng.permutation(num_blocks)), [], [], []
    for shared, members in groups:
        prefix = [next(unused) for _ in range(shared)]
        for own, count in members:
            tables.append(prefix + [next(unused) for _ in range(-(-own // block_size))])
            lengths.append(shared * block_size + own)
            rows.append(count)
    k_pool, v_pool = rng.standard_normal((2, heads[1], num_blocks, block_size, head_dim))
    q = rng.standard_normal((sum(rows), heads[0], head_dim))
    index = {
        "q_indptr": np.cumsum([0, *rows], dtype=np.int32),
        "seq_lens": np.array(lengths, np.int32),
        "page_indptr": np.cumsum([0, *map(len, tables)], dtype=np.int32),
        "page_indices": np.array([page for table in tables for page in table], np.int32),
    }
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "block_size": block_size, "num_blocks": num_blocks}
    return index, shape, k_pool, v_pool, q


def prefixes_of(groups):
    """Those that hold for more than one sequence."""
    found, first = [], 0
    for shared, members in groups:
        if shared and len(members) > 1:
            found.append(SharedPrefix(first, len(members), shared))
        first += len(members)
    return found


members = st.integers(1, 120).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, min(n, 20)) | st.just(1)))


@FEW
@given(
    st.lists(st.tuples(st.integers(0, 12), st.lists(members, min_size=1, max_size=5)), min_size=1, max_size=4),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([(4, 2), (3, 3), (16, 1)]),
    st.integers(1, 30),
)
def test_the_two_levels_joined_are_plain_attention(groups, block_size, heads, num_ctas):
    index, shape, k_pool, v_pool, q = tree(groups, block_size, heads)
    grids = {"decode_grid": Grid(num_ctas), "prefill_grid": Grid(num_ctas, 128, 128, kernel="sm90")}
    expected = interpret(plan(**index, **shape, **grids), q, k_pool, v_pool, 0.5)
    made = plan_cascade(**index, prefixes=prefixes_of(groups), **shape, **grids)
    out, lse = interpret(made.suffixes, q, k_pool, v_pool, 0.5)
    if made.prefixes is not None:
        out, lse = merge_states(*interpret(made.prefixes, q, k_pool, v_pool, 0.5), out, lse)
    assert (made.prefixes is None) == (not prefixes_of(groups))
    np.testing.assert_allclose(out, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-9, atol=1e-12)


def test_a_prefix_is_read_once():
    groups = [(40, [(5, 1)] * 6), (0, [(70, 1)]), (3, [(20, 2), (9, 1)])]
    index, shape, *_ = tree(groups, 16)
    made = plan_cascade(**index, prefixes=prefixes_of(groups), **shape, decode_grid=Grid(4))
    read = made.prefixes.tiles[:, 3] - made.prefixes.tiles[:, 2]
    assert sorted(read.tolist()) == [0, 48, 640]
    assert made.suffixes.seq_lens.tolist() == [5] * 6 + [70, 20, 9]


def sharing(index, shape, **more):
    sizes = {name: shape[name] for name in ("num_heads", "num_kv_heads", "block_size")}
    return shared_prefixes(**index, **sizes, **({"head_dim": 8, "only_if_it_pays": False} | more))


def test_prefixes_that_pay_are_found():
    groups = [(0, [(100, 1)]), (30, [(5, 1)] * 4), (0, [(20, 1)]), (50, [(7, 2), (90, 1), (1, 1)]), (1, [(3, 3), (5, 5)])]
    index, shape, *_ = tree(groups, 16)
    assert sharing(index, shape) == [SharedPrefix(1, 4, 30), SharedPrefix(6, 3, 50)]
    assert sharing(index, shape, only_if_it_pays=True) == []  # it takes more to pay for launches


def measured():
    rows = json.loads((RESULTS / "attention_ablation_h100.json").read_text())["rows"]
    return [row for row in rows if row["case"].startswith("shared prefix")]


@pytest.mark.parametrize("row", measured(), ids=lambda row: row["case"])
def test_a_prefix_is_attended_once_where_that_was_measured_to_pay(row):
    count, length, shared = map(int, re.search(r"(\d+)x(\d+), (\d+) shared", row["case"]).groups())
    own = np.arange(count * (length - shared) // 16).reshape(count, -1) + shared // 16
    tables = np.concatenate((np.tile(np.arange(shared // 16), (count, 1)), own), axis=1).astype(np.int32)
    index = {
        "q_indptr": np.arange(count + 1, dtype=np.int32),
        "seq_lens": np.full(count, length, np.int32),
        "page_indptr": np.arange(count + 1, dtype=np.int32) * (length // 16),
        "page_indices": tables.reshape(-1),
    }
    shape = {"num_heads": 32, "num_kv_heads": 8, "block_size": 16}
    found = sharing(index, shape, head_dim=128, only_if_it_pays=True)
    assert found == ([SharedPrefix(0, count, shared // 16)] if row["peers"]["cascade"] < row["us"] else [])


def test_a_sequence_that_shares_less_does_not_spoil_a_group():
    index, shape, *_ = tree([(2, [(1, 1)])], 16)
    table = [np.arange(60), np.arange(60), np.arange(60), np.concatenate((np.arange(9), 70 + np.arange(51)))]
    index = {
        "q_indptr": np.arange(5, dtype=np.int32),
        "seq_lens": np.full(4, 60 * 16, np.int32),
        "page_indptr": 60 * np.arange(5, dtype=np.int32),
        "page_indices": np.concatenate(table).astype(np.int32),
    }
    assert sharing(index, shape) == [SharedPrefix(0, 3, 59)]  # the last block has the row itself
    for rows, blocks in ((2, 59), (17, 58)):
        chunk = index | {"q_indptr": np.array([0, rows, rows + 1, rows + 2, rows + 3], np.int32)}
        assert sharing(chunk, shape) == [SharedPrefix(0, 3, blocks)]


@FEW
@given(st.lists(st.tuples(st.integers(0, 12), st.lists(members, min_size=1, max_size=5)), max_size=4), st.sampled_from([1, 8]))
def test_what_is_found_can_be_planned(groups, block_size):
    index, shape, k_pool, v_pool, q = tree(groups, block_size)
    found = sharing(index, shape)
    made = plan_cascade(**index, prefixes=found, **shape, decode_grid=Grid(5))
    if found:
        out, _ = merge_states(
            *(x for level in (made.prefixes, made.suffixes) for x in interpret(level, q, k_pool, v_pool, 0.5))
        )
        expected, _ = interpret(plan(**index, **shape, decode_grid=Grid(5)), q, k_pool, v_pool, 0.5)
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([SharedPrefix(0, 3, 5)], r"prefixes\[0\] has blocks that sequence 2 does not begin with"),
        ([SharedPrefix(0, 2, 9)], r"prefixes\[0\] has 9 blocks; give 8 at most, before all rows of sequence 1"),
        ([SharedPrefix(0, 2, 0)], r"prefixes\[0\] is .*; give sequences from 0 to 3 and a block at least"),
        ([SharedPrefix(0, 2, 5), SharedPrefix(1, 2, 5)], r"prefixes\[1\] is .*; give sequences from 2 to 3"),
        ([SharedPrefix(2, 3, 1)], r"prefixes\[0\] is .*; give sequences from 0 to 3"),
        ([SharedPrefix(-1, 2, 1)], r"prefixes\[0\] is .*; give sequences from 0 to 3"),
        ([SharedPrefix(1, 0, 1)], r"prefixes\[0\] is .*; give sequences from 0 to 3"),
    ],
    ids=str,
)
def test_prefixes_that_are_none_are_refused(prefixes, message):
    index, shape, *_ = tree([(8, [(70, 1), (5, 4)]), (8, [(40, 1), (3, 1)])], 16)
    plan_cascade(**index, prefixes=[SharedPrefix(0, 2, 8), SharedPrefix(2, 2, 8)], **shape, decode_grid=Grid(3))
    with pytest.raises(InvalidArgument, match=message):
        plan_cascade(**index, prefixes=prefixes, **shape, decode_grid=Grid(3))
