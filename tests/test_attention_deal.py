"""A dealt plan: whole tasks, several records for a CTA."""

import numpy as np
import pytest
from op_cases import SEED

from cupaged.attention import Grid, plan
from cupaged.attention import planner as columns


def planned(lengths, new=None, heads=(32, 8), block_size=16, **grid):
    """The plan of sequences of these lengths, all tokens new unless `new` says how many."""
    lengths = np.asarray(lengths, np.int32)
    rows = lengths if new is None else np.asarray(new, np.int32)
    indptr = np.append(0, np.cumsum(rows)).astype(np.int32)
    pages = np.append(0, np.cumsum(-(-lengths // block_size))).astype(np.int32)
    table = np.arange(pages[-1], dtype=np.int32)
    wide = Grid(**{"num_ctas": 132, "tile_rows": 128, "step": 128, "kernel": "sm90", "deals": True, **grid})
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "block_size": block_size, "num_blocks": max(table.size, 1)}
    return plan(indptr, lengths, pages, table, **sizes, decode_grid=Grid(264), prefill_grid=wide)


def loads(made):
    """Cost of each CTA's tasks; every task must be in one record, whole."""
    num_tiles, num_prefill, num_records, _ = made.header.tolist()
    grid, tiles, num_heads = made.grid, made.tiles, made.num_kv_heads
    assert num_tiles == len(tiles)
    assert num_records == len(made.ctas)
    assert num_records % grid.num_ctas == 0
    tasks = made.ctas[:, columns.TASK]
    busy = made.ctas[:, columns.STOP_TASK] > tasks
    assert (made.ctas[busy, columns.STOP_TASK] == tasks[busy] + 1).all()
    assert not made.ctas[~busy].any()
    assert not made.ctas[:, [columns.FIRST_STEP, columns.STOP_STEP]].any()
    assert sorted(tasks[busy]) == list(range(num_tiles * num_heads))
    start, stop = tiles[:, columns.KV_START], tiles[:, columns.KV_STOP]
    steps = -(-stop // grid.step) - start // grid.step
    step_cost = np.where(np.arange(num_tiles) < num_prefill, grid.prefill_cost, grid.decode_cost)
    cost = steps * step_cost + grid.item_cost
    by_task = np.append(np.tile(cost[:num_prefill], num_heads), np.tile(cost[num_prefill:], num_heads))
    cta = np.arange(num_records)[busy] % grid.num_ctas
    return np.bincount(cta, weights=by_task[tasks[busy]], minlength=grid.num_ctas)


@pytest.mark.parametrize("lengths", [[8192], [1024] * 8, [3000, 7000, 20, 130, 4000], [300] * 64], ids=str)
def test_prefill_is_dealt_out_evenly(lengths):
    made = planned(lengths, item_cost=6)
    load = loads(made)
    assert load.max() <= 1.05 * load.mean()
    assert made.num_slots == 0


def test_any_batch():
    rng, dealt = np.random.default_rng([SEED, 21]), 0
    for _ in range(40):
        lengths = (3000 ** rng.random(rng.integers(1, 30))).astype(int) + 1
        new = np.minimum(rng.integers(1, 3000, lengths.size), lengths)
        made = planned(lengths, new, num_ctas=int(rng.integers(1, 30)))
        if made.header[2] > made.grid.num_ctas:
            dealt += 1
            load = loads(made)
            assert load.max() <= 1.3 * load.mean()
    assert dealt > 10


def test_all_ctas_are_in_the_same_head_at_the_same_time():
    made = planned([8192])
    heads = made.ctas[:-132, columns.TASK].reshape(-1, 132) // len(made.tiles)  # in the last round some have nothing to do
    assert (np.ptp(heads, axis=1) <= 1).all()


@pytest.mark.parametrize(
    ("case", "deals"),
    [
        ({"lengths": [512]}, False),  # few tasks: they are cut
        ({"lengths": [8192, 5], "new": [8192, 1]}, True),
        ({"lengths": [8192] * 128, "new": [8192] + [1] * 127}, False),  # a good deal of decodes beside them
        ({"lengths": [100_000, 8192], "new": [1, 8192]}, False),  # a decode too long for one CTA
        ({"lengths": [8192], "deals": False}, False),
        ({"lengths": [8192]}, True),
    ],
    ids=str,
)
def test_when_tasks_are_dealt(case, deals):
    made = planned(**case)
    assert (len(made.ctas) > 132) == deals
    assert made.kernel == "sm90"


def test_small_pages_are_for_the_other_kernel():
    assert planned([300], block_size=4).kernel == "sm80"
