"""plan(): cuts the attention of a step into pieces of near equal cost for the CTAs of one persistent launch.

    packed rows   of (sequence, kv head h): row r = token * group_size + g is query head h * group_size + g of the token
    tile          up to tile_rows consecutive rows; decode class if they are 16 or fewer, else prefill class
    step          so many positions, from a multiple of that number on; a task is cut between steps
    task          (tile, kv head) and the positions [kv_start, kv_stop) that its rows see between them
    part          the steps of a task that one CTA does; a task in one part is whole

The tasks are laid end to end, [prefill tiles x kv heads][decode tiles x kv heads], all tiles of one head before those of the
next; and the line is cut into num_ctas shares of equal cost, each cut moved to the nearest step (stream-K: Osama et al. 2023).
So a CTA has at most two parts of tasks, whatever the batch. The tiles of one sequence and head are neighbours on the line: done
at about the same time, they can share reads of K/V in L2.

Only tiles and CTAs are written down: a kernel works out the tile and head of a task from its number. So a plan costs
O(sequences + tiles + CTAs); cuda_src/plan.cu makes the same records on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupaged.attention import validation
from cupaged.errors import InvalidArgument

DECODE_ROWS = 16  # of a tile whose positions a CTA's warps share, at most
FIXED_SPLIT = 1024  # positions of a part in a batch-invariant plan, from a multiple of that on; a multiple of every step
MOST_SLOTS = 4096  # that such a plan wants of one launch, unless a single tile does: 128 MiB
LEAST_PAGE = 8  # rows of a page that the sm90 kernel can copy
# Columns of Plan.tiles (struct Tile of cuda_src/work_list.cuh)
FIRST_ROW, NUM_ROWS = 0, 1  # packed rows
KV_START, KV_STOP = 2, 3  # positions that the rows see between them; none if they are equal
PAGE_BEGIN, FIRST_TOKEN = 4, 5  # of the sequence: index of its first page-table entry; row of q of its first token
FIRST_POSITION = 6  # of that token: seq_len - number of tokens, negative where the length is 0; or, not causal, seq_len
MASK_BEGIN, MASK_WORDS = 7, 8  # the sequence's first word of mask; words for each of its tokens; 0, 0 without
FIRST_SLOT, PART, NUM_PARTS = 9, 10, 11  # of fixed parts, see Plan; else 0, 0, 1
# Columns of Plan.ctas (struct Cta)
TASK, FIRST_STEP, STOP_TASK, STOP_STEP = 0, 1, 2, 3  # from a step of one task to before one of another, counted in the task
SLOT, HEAD_FIRST_SLOT, HEAD_PARTS, TAIL_PARTS = 4, 5, 6, 7  # of its parts of cut tasks, see Plan; 0 where there are none


@dataclass(frozen=True)
class Grid:
    """What the planner knows of a kernel and a device; costs are relative to one another."""

    num_ctas: int  # that are resident at once
    tile_rows: int = 64  # of a prefill tile
    step: int = 16  # positions, from a multiple of which on CTAs begin and end
    decode_cost: int = 1  # of a step of a decode tile
    prefill_cost: int = 4  # of a step of a prefill tile
    item_cost: int = 2  # of a part beside its steps
    kernel: str = "sm80"  # or "sm90": cuda_src/persistent_attention_sm90.cu
    deals: bool = False  # whether CTAs may have several records each, see Plan.ctas; the sm90 kernel reads them


@dataclass(eq=False)
class Pass:
    """What one launch does; see Plan."""

    header: np.ndarray
    tiles: np.ndarray
    ctas: np.ndarray
    num_slots: int


@dataclass(eq=False)
class Plan:
    """The work of one step and what it was made of; every layer runs from the same plan. All arrays are int32.

    header     [4]             number of tiles, of prefill tiles, of CTAs; slots a kv head has in a plan of fixed parts, else 0
    tiles      [num_tiles, 12] for all kv heads alike, prefill tiles first; the columns as named above
    ctas       [num_ctas, 8]   what each does, in this order; the columns as named above. If `step` > 0 it begins with a part of
                               `task`: that leaves its result in workspace slot `slot`, the task's parts having the `head_parts`
                               slots from head_first_slot on. Whole tasks follow. If stop_step > 0 and stop_task is another task
                               than that of a part before, it ends with the first part of stop_task, in slot `slot`, or slot + 1
                               if there was a part before; the task's `tail_parts` slots begin there.
    num_slots                  at most 2 * (num_ctas - 1), or num_kv_heads * header[3] of fixed parts

    A dealt plan (of a grid that `deals`; for prefill in many tasks) has whole tasks only, one a record, and n * num_ctas
    records: CTA c does those of numbers c, c + num_ctas, ... in turn; header[2] counts them all. All CTAs go through the
    kv heads at the same time, so that K/V of one are in L2 while they are needed.
    """

    header: np.ndarray
    tiles: np.ndarray
    ctas: np.ndarray
    num_slots: int
    grid: Grid
    q_indptr: np.ndarray
    seq_lens: np.ndarray
    page_indptr: np.ndarray | None  # None: page_indices is [num_sequences, max_blocks]
    page_indices: np.ndarray | None  # None: `run` gets pointers
    num_heads: int
    num_kv_heads: int
    block_size: int  # of the pages that the page table names; the pool's, unless block_valid_lengths made it 1
    num_blocks: int
    pool_shape: tuple[int, int]  # num_blocks and block_size of the pool
    decode_rows: int
    sliding_window: int | None
    mask_words: int | None  # 32-bit words that the mask must have at least; None: there is none
    num_entries: int  # of the page table, as it was given
    later: list[Pass] = field(default_factory=list)
    pointer_rows: np.ndarray | None = None  # [positions, 2] of block_valid_lengths: each one's page-table entry and slot
    uploaded: dict[Any, Any] = field(default_factory=dict, repr=False)  # what `run` keeps, by device

    @property
    def num_tokens(self) -> int:
        """Rows of q."""
        return int(self.q_indptr[-1])

    @property
    def num_ctas(self) -> int:
        return self.grid.num_ctas

    @property
    def decode_only(self) -> bool:
        """Whether all tiles are of decode class."""
        return self.decode_rows > 0 and self.header[1] == 0

    @property
    def kernel(self) -> str:
        """Which kernel it is for: "sm80" or "sm90"."""
        return self.grid.kernel


def plan(
    q_indptr: np.ndarray,
    seq_lens: np.ndarray,
    page_indptr: np.ndarray | None,
    page_indices: np.ndarray | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    num_blocks: int,
    decode_grid: Grid,
    prefill_grid: Grid | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    mask_indptr: np.ndarray | None = None,
    block_valid_lengths: np.ndarray | None = None,
    batch_invariant: bool = False,
) -> Plan:
    """Plan the attention of a batch, given in host arrays of int32.

    q_indptr             [num_sequences + 1]  sequence b has the rows q_indptr[b] .. q_indptr[b + 1] - 1 of q
    seq_lens             [num_sequences]      tokens whose K/V are in the pool, those of these rows included
    page_indptr          [num_sequences + 1]  sequence b has the pages page_indices[page_indptr[b] : page_indptr[b + 1]]
    page_indices         [at least page_indptr[-1]]; or, with page_indptr None, [num_sequences, max_blocks]; None if `run`
                         shall get a pointer for each entry of page_indptr instead
    decode_grid, prefill_grid  the second (the first, if None) for a batch that has prefill tiles; see `grids_of_device`
    causal               False: every row sees all positions of its sequence
    sliding_window       a row sees this many positions, its own the last
    mask_indptr          [num_sequences + 1]  sequence b's words of the bit mask that `run` gets begin there; see `pack_mask`.
                         The mask alone then decides what a row sees
    block_valid_lengths  like page_indices    tokens in each page, which need not be full: they are in its first slots
    batch_invariant      parts are cut at multiples of FIXED_SPLIT and tiles are of one class, so that a row's result depends on
                         nothing else in its batch, bit by bit

    The costliest CTA costs at most ceil(total / num_ctas) + the cost of a step + item_cost, and without prefill at most
    ceil(total / num_ctas) + item_cost + decode_cost - 1, `total` being the cost of the tasks uncut. No schedule's costliest CTA
    costs less than total / num_ctas. (Where parts are fixed: ceil(total / num_ctas) + the cost of a part.)

    Page ids past a sequence's last token are never used and may be anything. The arrays are kept, not copied: they must not
    change before the plan's first run. InvalidArgument names the argument that cannot be used.
    """
    validation.check_numbers(num_heads, num_kv_heads, block_size, num_blocks, sliding_window)
    validation.check_grid("decode_grid", decode_grid)
    if prefill_grid is not None:
        validation.check_grid("prefill_grid", prefill_grid)
    masked = mask_indptr is not None
    tokens = validation.check_rows(q_indptr, seq_lens, causal and not masked)
    table = validation.check_pages(seq_lens, page_indptr, page_indices, block_size, num_blocks, block_valid_lengths)
    mask = validation.check_mask(mask_indptr, tokens, seq_lens) if masked else None
    if sliding_window is not None and (masked or not causal):
        other = "mask_indptr" if masked else "causal=False"
        raise InvalidArgument(f"sliding_window is {sliding_window} beside {other}; give one of them")

    group_size = num_heads // num_kv_heads
    rows = tokens * group_size
    most_rows = int(rows.max(initial=0))
    grid, decode_rows = decode_grid, 0 if batch_invariant else DECODE_ROWS
    if prefill_grid is not None and most_rows > DECODE_ROWS and not batch_invariant:
        whole = not masked and table.block_size >= LEAST_PAGE  # what the sm90 kernel takes
        grid = prefill_grid if whole or prefill_grid.kernel != "sm90" else decode_grid

    sequence, first_row, num_rows, num_prefill = _cut_rows(rows, most_rows, decode_rows, grid.tile_rows)
    first_position = seq_lens - tokens if causal or masked else seq_lens.astype(np.int64)
    tiles = np.zeros((num_rows.size, 12), np.int32)
    tiles[:, FIRST_ROW], tiles[:, NUM_ROWS] = first_row, num_rows
    tiles[:, PAGE_BEGIN], tiles[:, FIRST_TOKEN] = table.begin[sequence], q_indptr[:-1][sequence]
    tiles[:, FIRST_POSITION] = first_position = first_position[sequence]
    tiles[:, NUM_PARTS] = 1
    if masked:
        tiles[:, MASK_BEGIN], tiles[:, MASK_WORDS] = mask[0][sequence], mask[1][sequence]
    if causal and not masked:
        kv_stop = np.maximum(first_position + (first_row + num_rows - 1) // group_size + 1, 0)
    else:
        kv_stop = seq_lens[sequence]
    tiles[:, KV_STOP] = kv_stop
    if sliding_window is not None:
        tiles[:, KV_START] = np.maximum(first_position + first_row // group_size + 1 - sliding_window, 0)

    if batch_invariant:
        passes = [_cut_between_tasks(*entries, num_kv_heads, grid) for entries in _fixed_parts(tiles, num_kv_heads)]
    else:
        dealt = _deal(tiles, num_prefill, num_kv_heads, grid) if grid.deals else None
        passes = [dealt or _cut(tiles, num_prefill, num_kv_heads, grid)]
    return Plan(
        header=passes[0].header,
        tiles=passes[0].tiles,
        ctas=passes[0].ctas,
        later=passes[1:],
        num_slots=max(one.num_slots for one in passes),
        grid=grid,
        q_indptr=q_indptr,
        seq_lens=seq_lens,
        page_indptr=table.indptr,
        page_indices=table.indices,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=table.block_size,
        num_blocks=table.num_blocks,
        pool_shape=(num_blocks, block_size),
        decode_rows=decode_rows,
        sliding_window=sliding_window,
        mask_words=int(mask_indptr[-1]) if masked else None,
        num_entries=table.num_entries,
        pointer_rows=table.rows,
    )


def _cut_rows(rows: np.ndarray, most_rows: int, decode_rows: int, tile_rows: int) -> tuple[Any, Any, np.ndarray, int]:
    """(sequence, first row, number of rows) of every tile, and how many are prefill's: those that have more than decode_rows.

    `sequence` may be a slice that means all, and first_row 0. A sequence without rows has no tile.
    """
    if most_rows <= decode_rows:
        if rows.min(initial=1) > 0:
            return slice(None), 0, rows, 0
        sequence = rows.nonzero()[0]
        return sequence, 0, rows[sequence], 0
    full, rest = np.divmod(rows, tile_rows)
    with_rest = rest > decode_rows
    num_tiles = full + with_rest  # of prefill class
    sequence = np.arange(rows.size).repeat(num_tiles)
    num_prefill = sequence.size
    first_row = (np.arange(num_prefill) - (num_tiles.cumsum() - num_tiles).repeat(num_tiles)) * tile_rows
    decode = ((rest > 0) & ~with_rest).nonzero()[0]  # at most one of a sequence: its last
    sequence = np.concatenate((sequence, decode))
    first_row = np.concatenate((first_row, full[decode] * tile_rows))
    return sequence, first_row, np.minimum(rows[sequence] - first_row, tile_rows), num_prefill


def _fixed_parts(tiles: np.ndarray, num_kv_heads: int) -> list[tuple[np.ndarray, int]]:
    """The entries of the tiles cut at multiples of FIXED_SPLIT and how many slots they take for each kv head, for each pass."""
    first = tiles[:, KV_START] // FIXED_SPLIT
    num_parts = np.maximum(-(-tiles[:, KV_STOP] // FIXED_SPLIT) - first, 1)
    slots = np.where(num_parts > 1, num_parts, 0)
    end, start, passes = slots.cumsum(), 0, []
    while start < len(tiles) or not passes:
        most = MOST_SLOTS // num_kv_heads + (end[start - 1] if start else 0)
        stop = max(int(end.searchsorted(most, side="right")), start + 1)
        chosen = slice(start, stop)
        passes.append(_entries(tiles[chosen], first[chosen], num_parts[chosen], slots[chosen]))
        start = stop
    return passes


def _entries(tiles: np.ndarray, first: np.ndarray, num_parts: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, int]:
    tile = np.arange(len(tiles)).repeat(num_parts)
    part = np.arange(tile.size) - (num_parts.cumsum() - num_parts)[tile]
    parts = tiles[tile]
    start = (first[tile] + part) * FIXED_SPLIT
    parts[:, KV_START] = np.maximum(parts[:, KV_START], start)
    parts[:, KV_STOP] = np.minimum(parts[:, KV_STOP], start + FIXED_SPLIT)
    parts[:, PART], parts[:, NUM_PARTS] = part, num_parts[tile]
    parts[:, FIRST_SLOT] = np.where(slots > 0, slots.cumsum() - slots, 0)[tile]
    return parts, int(slots.sum())


def _num_steps(tiles: np.ndarray, grid: Grid) -> np.ndarray:
    shift = grid.step.bit_length() - 1
    return (tiles[:, KV_STOP] + (grid.step - 1) >> shift) - (tiles[:, KV_START] >> shift)


def _cut(tiles: np.ndarray, num_prefill: int, num_kv_heads: int, grid: Grid) -> Pass:
    """The tiles' tasks, spread over the CTAs."""
    steps = _num_steps(tiles, grid)
    header = np.array((steps.size, num_prefill, grid.num_ctas, 0), np.int32)
    if steps.size == 0:
        return Pass(header, tiles, np.zeros((grid.num_ctas, 8), np.int32), 0)
    tile, task, rest, step_cost = _share(steps, num_prefill, num_kv_heads, grid)
    rest -= grid.item_cost - step_cost // 2  # the item's own cost comes before its steps
    step = np.maximum(rest, 0) // step_cost
    at_end = (step == steps[tile]) & (step > 0)
    step[at_end] = 0
    task += at_end

    columns = np.zeros((8, grid.num_ctas), np.int32)
    columns[TASK], columns[FIRST_STEP] = task, step
    columns[STOP_TASK, :-1], columns[STOP_STEP, :-1] = task[1:], step[1:]
    columns[STOP_TASK, -1] = steps.size * num_kv_heads
    busy = (columns[TASK] != columns[STOP_TASK]) | (columns[FIRST_STEP] != columns[STOP_STEP])
    cut = ((step > 0) & busy).nonzero()[0]  # the CTAs that begin with a part: one for each place where a task is cut
    task = task[cut]
    is_first = np.ones(cut.size, bool)  # of the cuts of a task
    np.not_equal(task[1:], task[:-1], out=is_first[1:])
    first, number = is_first.nonzero()[0], np.arange(cut.size + 1, dtype=np.int32)
    first_slot = number[first] + number[: first.size]  # a task of n cuts has n + 1 slots
    parts = np.empty_like(first_slot)
    parts[:-1], parts[-1:] = first_slot[1:] - first_slot[:-1], cut.size + first.size - first_slot[-1:]

    before = cut[first] - 1  # who ends with the first part of a task; those between, if any, are not busy
    if not busy.all():
        at_work = busy.nonzero()[0]
        before = at_work[at_work.searchsorted(cut[first]) - 1]
    slot = columns[SLOT]
    slot[before], columns[TAIL_PARTS][before] = first_slot, parts
    of = is_first.cumsum(dtype=np.int32)
    slot[cut] = number[:-1] + of
    of -= 1
    columns[HEAD_FIRST_SLOT][cut], columns[HEAD_PARTS][cut] = first_slot[of], parts[of]
    return Pass(header, tiles, columns.T.copy(), cut.size + first.size)


def _deal(tiles: np.ndarray, num_prefill: int, num_kv_heads: int, grid: Grid) -> Pass | None:
    """The tiles' tasks, each whole: one kv head after another, the longest first. None where they had better be cut.

    num_ctas of them at a time, the longer of those to the CTAs that have less to do so far (Graham's rule of 1969, by rounds).
    """
    steps, num_decode = _num_steps(tiles, grid), len(tiles) - num_prefill
    cost = steps * np.where(np.arange(steps.size) < num_prefill, grid.prefill_cost, np.int64(grid.decode_cost)) + grid.item_cost
    share = cost.sum() * num_kv_heads / grid.num_ctas
    if 4 * cost.max(initial=0) > share or 8 * cost[num_prefill:].sum() > cost.sum():
        return None
    heads = np.arange(num_kv_heads)[:, None]
    order = np.lexsort((-cost, np.arange(steps.size) >= num_prefill))
    prefill, decode = order[:num_prefill], order[num_prefill:]
    of_decode = num_prefill * num_kv_heads + heads * num_decode + decode - num_prefill
    tasks = np.append(heads * num_prefill + prefill, of_decode)
    cost = np.append(np.tile(cost[prefill], num_kv_heads), np.tile(cost[decode], num_kv_heads))

    rounds, load = -(-tasks.size // grid.num_ctas), np.zeros(grid.num_ctas, np.int64)
    ctas = np.zeros((rounds, grid.num_ctas, 8), np.int32)
    for number in range(rounds):
        chosen = slice(number * grid.num_ctas, (number + 1) * grid.num_ctas)
        longest = np.argsort(-cost[chosen], kind="stable")
        cta = np.argsort(load, kind="stable")[: longest.size]
        load[cta] += cost[chosen][longest]
        ctas[number, cta, TASK] = task = tasks[chosen][longest]
        ctas[number, cta, STOP_TASK] = task + 1
    header = np.array((steps.size, num_prefill, rounds * grid.num_ctas, 0), np.int32)
    return Pass(header, tiles, ctas.reshape(-1, 8), 0)


def _cut_between_tasks(tiles: np.ndarray, slots_per_head: int, num_kv_heads: int, grid: Grid) -> Pass:
    """The tiles' tasks, all of prefill class, spread over the CTAs as they are."""
    ctas, steps = np.zeros((grid.num_ctas, 8), np.int32), _num_steps(tiles, grid)
    if steps.size:
        tile, task, rest, step_cost = _share(steps, steps.size, num_kv_heads, grid)
        task += 2 * rest > steps[tile] * step_cost + grid.item_cost  # the nearest
        ctas[:, TASK] = task
        ctas[:-1, STOP_TASK] = task[1:]
        ctas[-1, STOP_TASK] = steps.size * num_kv_heads
    header = np.array((steps.size, steps.size, grid.num_ctas, slots_per_head), np.int32)
    return Pass(header, tiles, ctas, num_kv_heads * slots_per_head)


def _share(
    steps: np.ndarray, num_prefill: int, num_kv_heads: int, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Where each CTA would begin if a task could be cut anywhere: tile, task, cost from the task's begin, cost of its steps."""
    cost = steps * np.int64(grid.decode_cost)
    cost[:num_prefill] = steps[:num_prefill] * np.int64(grid.prefill_cost)
    cost += grid.item_cost
    end = cost.cumsum()
    total = int(end[-1])
    share = np.arange(grid.num_ctas) * (total * num_kv_heads) // grid.num_ctas
    if num_prefill in (0, steps.size):
        head, rest = np.divmod(share, total)
        tile = end.searchsorted(rest, side="right")
        task = head * steps.size + tile
        step_cost = grid.prefill_cost if num_prefill else grid.decode_cost
    else:
        in_prefill = int(end[num_prefill - 1])
        prefill = share < in_prefill * num_kv_heads
        before, of_head = np.where(prefill, 0, in_prefill), np.where(prefill, in_prefill, total - in_prefill)
        head, rest = np.divmod(share - before * num_kv_heads, of_head)
        rest += before
        tile = end.searchsorted(rest, side="right")
        task = head * np.where(prefill, num_prefill, steps.size - num_prefill) + tile
        task += np.where(prefill, 0, num_prefill * (num_kv_heads - 1))
        step_cost = np.where(prefill, grid.prefill_cost, grid.decode_cost)
    return tile, task, rest - (end - cost)[tile], step_cost
