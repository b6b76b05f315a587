"""plan(): cuts the attention of a step into items of near equal cost for the CTAs of one persistent launch.

    packed rows   of (sequence, kv head h): row r = token * group_size + g is query head h * group_size + g of the token
    tile          up to 64 consecutive rows; decode class if they are 16 or fewer, else prefill class
    task          (tile, kv head) and the positions [kv_start, kv_stop) that its rows see between them
    step          64 positions from a multiple of 64 on: what a CTA takes at a time
    item          a task, or the part of one that one CTA does: a range of its steps

The tasks are laid end to end, sequences of many rows first, and the line is cut into num_ctas shares of equal cost, each cut
moved to the nearest step (stream-K: Osama et al. 2023). So a CTA has at most two parts of tasks, whatever the batch. The tiles
of one sequence and head are neighbours on the line: done at about the same time, they can share reads of K/V in L2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupaged.errors import InvalidArgument

STEP = 64  # positions
DECODE_ROWS, PREFILL_ROWS = 16, 64  # of a tile, at most
DECODE_COST, PREFILL_COST, ITEM_COST = 1, 4, 2  # of a step of either class; of an item beside its steps
SEQUENCE, KV_HEAD, FIRST_ROW, NUM_ROWS, KV_START, KV_STOP, SLOT, TASK = range(8)  # columns of Plan.items


@dataclass(eq=False)
class Plan:
    """The items of one step and what they were made of; every layer runs from the same plan. All arrays are int32.

    items       [num_items, 8]      grouped by CTA, the columns as named above. A whole task has slot = task = -1. A part leaves
                                    its result in workspace slot `slot`, for the last to finish of tasks[task] to merge.
                                    Where kv_start == kv_stop the rows see nothing.
    cta_indptr  [num_ctas + 1]      CTA c does items[cta_indptr[c] : cta_indptr[c + 1]], in this order
    tasks       [num_cut_tasks, 2]  first slot and number of slots of a task in parts, which have them in the order of positions
    num_slots                       at most 2 * (num_ctas - 1)
    """

    items: np.ndarray
    cta_indptr: np.ndarray
    tasks: np.ndarray
    num_slots: int
    q_indptr: np.ndarray
    seq_lens: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    num_heads: int
    num_kv_heads: int
    block_size: int
    num_blocks: int
    num_ctas: int
    sliding_window: int | None
    uploaded: dict[int, Any] = field(default_factory=dict, repr=False)  # device -> what `run` keeps there


def plan(
    q_indptr: np.ndarray,
    seq_lens: np.ndarray,
    page_indptr: np.ndarray,
    page_indices: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    num_blocks: int,
    num_ctas: int,
    sliding_window: int | None = None,
) -> Plan:
    """Plan causal attention of a batch (as `ops.numpy` describes one, in host arrays of int32) for num_ctas resident CTAs.

    The costliest CTA costs at most ceil(total / num_ctas) + PREFILL_COST + ITEM_COST, and without prefill at most
    ceil(total / num_ctas) + ITEM_COST, `total` being the cost of the tasks uncut. No schedule's costliest CTA costs less
    than total / num_ctas.

    Page ids past a sequence's last token are never used and may be anything. The arrays are kept, not copied: they must not
    change before the plan's first run. InvalidArgument names the argument that cannot be used.
    """
    _check_numbers(num_heads, num_kv_heads, block_size, num_blocks, num_ctas, sliding_window)
    _check_arrays(q_indptr, seq_lens, page_indptr, page_indices, block_size, num_blocks)
    group_size = num_heads // num_kv_heads

    tiles, steps, step_cost, num_prefill = _tiles(q_indptr, seq_lens, group_size, sliding_window)
    tile, head = np.empty((2, len(tiles) * num_kv_heads), np.int64)  # of every task: those of prefill, then the others
    for start, stop in ((0, num_prefill), (num_prefill, len(tiles))):
        tasks, grid = slice(start * num_kv_heads, stop * num_kv_heads), (num_kv_heads, stop - start)
        tile[tasks].reshape(grid)[:] = np.arange(start, stop)
        head[tasks].reshape(grid)[:] = np.arange(num_kv_heads)[:, None]
    whole = tiles.take(tile, axis=0)  # the items if no task were cut
    whole[:, KV_HEAD] = head

    cta_task, cta_step = _cut(tile, steps, step_cost, num_ctas)
    is_cut = cta_step > 0
    is_cut[1:] &= (cta_task[1:] != cta_task[:-1]) | (cta_step[1:] != cta_step[:-1])  # several CTAs may begin at one cut
    cta_indptr = np.empty(num_ctas + 1, np.int32)
    cta_indptr[:-1] = cta_task + is_cut.cumsum()
    cut_task, cut_step = cta_task[is_cut], cta_step[is_cut]
    cta_indptr[-1] = tile.size + cut_task.size

    num_parts = np.bincount(cut_task, minlength=tile.size) + 1
    items = whole.repeat(num_parts, axis=0)
    ends = cut_task + np.arange(cut_task.size)  # the items that end at a cut; the next ones begin there
    kv_start, kv_stop = items[:, KV_START], items[:, KV_STOP]
    kv_stop[ends] = kv_start[ends + 1] = (kv_start[ends] // STEP + cut_step) * STEP

    in_parts = (num_parts > 1).nonzero()[0]
    num_parts = num_parts[in_parts]
    task, slot = np.arange(in_parts.size), np.arange(in_parts.size + cut_task.size)
    tasks = np.empty((task.size, 2), np.int32)
    tasks[:, 0], tasks[:, 1] = num_parts.cumsum() - num_parts, num_parts
    parts = slot + (in_parts - task).repeat(num_parts)  # the item of each slot: past the whole tasks before it
    items[:, SLOT][parts], items[:, TASK][parts] = slot, task.repeat(num_parts)

    batch = (q_indptr, seq_lens, page_indptr, page_indices)
    shape = (num_heads, num_kv_heads, block_size, num_blocks, num_ctas, sliding_window)
    return Plan(items, cta_indptr, tasks, slot.size, *batch, *shape)


def _tiles(
    q_indptr: np.ndarray, seq_lens: np.ndarray, group_size: int, sliding_window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The tiles as items of kv head 0, their steps [num_tiles], the cost of a step of each, and how many tiles are prefill's.

    Those are of sequences with more rows than a decode tile has, and come first. A sequence without rows has no tile.
    """
    tokens = np.subtract(q_indptr[1:], q_indptr[:-1], dtype=np.int64)
    rows = tokens * group_size
    prefill = rows > DECODE_ROWS
    sequence = np.concatenate((prefill.nonzero()[0], (~prefill).nonzero()[0]))
    num_tiles = -(-rows[sequence] // PREFILL_ROWS)
    sequence = sequence.repeat(num_tiles)
    first_row = (np.arange(sequence.size) - (num_tiles.cumsum() - num_tiles).repeat(num_tiles)) * PREFILL_ROWS
    num_rows = np.minimum(rows[sequence] - first_row, PREFILL_ROWS)

    before = (seq_lens - tokens)[sequence]  # position of the sequence's first row; negative where its length is 0
    kv_stop = np.maximum(before + (first_row + num_rows - 1) // group_size + 1, 0)
    kv_start = np.zeros_like(kv_stop)
    if sliding_window is not None:
        kv_start = np.maximum(before + first_row // group_size + 1 - sliding_window, 0)
    tiles = np.empty((sequence.size, 8), np.int32)
    for column, value in enumerate((sequence, 0, first_row, num_rows, kv_start, kv_stop, -1, -1)):
        tiles[:, column] = value
    steps = -(-kv_stop // STEP) - kv_start // STEP
    return tiles, steps, np.where(num_rows > DECODE_ROWS, PREFILL_COST, DECODE_COST), np.count_nonzero(prefill[sequence])


def _cut(tile: np.ndarray, steps: np.ndarray, step_cost: np.ndarray, num_ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each CTA begins, the tasks being of these tiles: (task, step of it), both [num_ctas]; (num_tasks, 0) is the end."""
    if tile.size == 0:
        return np.zeros(num_ctas, np.int64), np.zeros(num_ctas, np.int64)
    cost = steps * step_cost + ITEM_COST
    end = cost[tile].cumsum()
    share = np.arange(num_ctas) * end[-1] // num_ctas  # cost of what comes before each CTA, at best
    task = end.searchsorted(share, side="right")
    tile = tile[task]
    steps, step_cost = steps[tile], step_cost[tile]
    step = share - (end[task] - cost[tile]) - ITEM_COST  # what of the task's steps comes before, in cost
    step = np.maximum(step + step_cost // 2, 0) // step_cost
    at_end = (step == steps) & (step > 0)
    step[at_end] = 0
    return task + at_end, step


def _check_numbers(num_heads, num_kv_heads, block_size, num_blocks, num_ctas, sliding_window) -> None:
    numbers = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": block_size, "num_blocks": num_blocks}
    numbers |= {"num_ctas": num_ctas, "sliding_window": 1 if sliding_window is None else sliding_window}
    for name, value in numbers.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least 1")
    if num_heads % num_kv_heads:
        raise InvalidArgument(f"num_heads is {num_heads}; give a multiple of num_kv_heads, {num_kv_heads}")
    if block_size > 256 or block_size & (block_size - 1):
        raise InvalidArgument(f"block_size is {block_size}; give a power of two from 1 to 256")


def _check_arrays(q_indptr, seq_lens, page_indptr, page_indices, block_size: int, num_blocks: int) -> None:
    arrays = {"q_indptr": q_indptr, "seq_lens": seq_lens, "page_indptr": page_indptr, "page_indices": page_indices}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
            got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise InvalidArgument(f"{name} is {got}; give a NumPy array of int32 with one axis")
    size = seq_lens.size + 1
    for name in ("q_indptr", "page_indptr"):
        if arrays[name].size != size:
            raise InvalidArgument(f"{name} has {arrays[name].size} entries; give {size}, one more than seq_lens")
        if arrays[name][0] != 0:
            raise InvalidArgument(f"{name} begins with {arrays[name][0]}; let it begin with 0")
    if page_indptr[-1] > page_indices.size:
        raise InvalidArgument(f"page_indices has {page_indices.size} entries; give the {page_indptr[-1]} of page_indptr")

    rows = np.subtract(q_indptr[1:], q_indptr[:-1], dtype=np.int64)
    pages = np.subtract(page_indptr[1:], page_indptr[:-1], dtype=np.int64)
    needed = -(-seq_lens // block_size)
    for name, wrong, got, expected in (
        ("q_indptr", rows < 0, rows, "an array that never falls"),
        ("seq_lens", seq_lens < 0, seq_lens, "lengths of at least 0"),
        ("q_indptr", (rows > seq_lens) & (seq_lens > 0), rows, "no more rows than the sequence has tokens"),
        ("page_indptr", pages < needed, pages, "a page for every block_size tokens of seq_lens"),
    ):
        if wrong.any():
            b = wrong.argmax()
            raise InvalidArgument(f"{name} gives sequence {b} {got[b]}; give {expected}")
    if page_indices.view(np.uint32).max(initial=0) >= num_blocks:  # or negative; most often that decides it
        used = np.arange(needed.sum()) + (page_indptr[:-1] - (needed.cumsum() - needed)).repeat(needed)
        for page in page_indices[used]:
            if not 0 <= page < num_blocks:
                raise InvalidArgument(f"page_indices holds block {page}; give ids from 0 to {num_blocks - 1}, below num_blocks")
