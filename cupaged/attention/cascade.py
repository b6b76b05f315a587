"""Cascade: a prefix that many sequences share is attended once for all their rows, and joined with what each has alone.

    level 1   the rows of all sequences of a group, as one sequence that sees the whole prefix    -> out, lse
    level 2   the rows of each sequence over what follows the prefix, causal                      -> out, lse
    merge     of the two by their lse                                                             -> out, lse

Three launches in the place of one, and the K/V of a prefix are read once a group instead of once a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.attention import validation
from cupaged.attention.kernel import run
from cupaged.attention.merge import merge_states
from cupaged.attention.planner import Grid, Plan, plan
from cupaged.errors import InvalidArgument

Array = Any  # cupy.ndarray

# As measured on an H100 (scripts/results/attention_ablation_h100.json). Without a cascade, what is shared is read again and
# again from L2 while memory hands out the rest: that takes the longer of all bytes at 7 TB/s and of distinct ones at 3.1. With
# one it takes the distinct bytes, and more for the two launches and because the levels follow each other: 34 to 53 us at 64
# sequences, 16 to 21 at 2 and 8.
LAUNCH_BYTES = 350_000_000  # that L2 hands out in that time
L2_PER_MEMORY = 2.25  # how many bytes L2 hands out while memory hands out one


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences first_sequence .. first_sequence + num_sequences - 1 begin with the same num_blocks blocks."""

    first_sequence: int
    num_sequences: int
    num_blocks: int


@dataclass
class CascadePlan:
    """The plans of the two levels; without prefixes there is one, of the whole batch."""

    prefixes: Plan | None
    suffixes: Plan


def shared_prefixes(
    q_indptr: np.ndarray,
    seq_lens: np.ndarray,
    page_indptr: np.ndarray,
    page_indices: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    kv_bytes: int = 2,
    only_if_it_pays: bool = True,
) -> list[SharedPrefix]:
    """The prefixes that pay: sequences that are neighbours in the batch (sort it by page table) and begin with equal blocks.

    A group of n sequences with r rows and a prefix of s positions saves the reading of (n - 1) * s * num_kv_heads * 2 vectors
    of K/V of kv_bytes an element, and costs the writing and reading of two more results, 4 vectors of 16 bits for each of r *
    num_heads. A sequence joins the group before it if that saves more; a group that saves nothing is none. With
    `only_if_it_pays` the list is empty unless two more launches and what is left to read take less time than L2 needs to hand
    out everything. (Of a prefix that L2 cannot hold more is saved than this counts.)

    The arrays are those of `plan`; a prefix ends before the first row's position.
    """
    tokens = validation.check_rows(q_indptr, seq_lens, causal=True)
    validation.check_pages(seq_lens, page_indptr, page_indices, block_size, 2**31 // block_size - 1, None)
    most = np.maximum(seq_lens - tokens, 0) // block_size  # blocks that all rows of a sequence see
    most[tokens == 0] = 0  # nothing is saved by sequences without rows

    def pays(saved: int) -> bool:
        everything = int(seq_lens.sum(dtype=np.int64)) * num_kv_heads * 2 * head_dim * kv_bytes
        return not only_if_it_pays or everything > (everything - saved) * L2_PER_MEMORY + LAUNCH_BYTES

    # Most batches share too little, and that shows at once, by the neighbours that begin with the same block.
    first_blocks = np.full(seq_lens.size, -1, np.int64)
    first_blocks[most > 0] = page_indices[page_indptr[:-1][most > 0]]
    joins = np.zeros(seq_lens.size, bool)
    joins[1:] = (first_blocks[1:] == first_blocks[:-1]) & (first_blocks[1:] >= 0)
    if not joins.any() or not pays(int(most[joins].sum()) * block_size * num_kv_heads * 2 * head_dim * kv_bytes):
        return []

    def equal(b: int, limit: int) -> int:
        """How many of its first `limit` blocks sequence b has in common with the one before."""
        one, other = (page_indices[page_indptr[c] : page_indptr[c] + limit] for c in (b - 1, b))
        different = one != other
        return int(different.argmax()) if different.any() else limit

    def saved(n: int, blocks: int, rows: int) -> int:
        return head_dim * ((n - 1) * blocks * block_size * num_kv_heads * 2 * kv_bytes - 4 * 2 * rows * num_heads)

    found, total, b = [], 0, 0
    while b < seq_lens.size:
        first, blocks, rows, best = b, int(most[b]), int(tokens[b]), 0
        b += 1
        while b < seq_lens.size and joins[b]:
            common = equal(b, min(blocks, int(most[b])))
            gain = saved(b + 1 - first, common, rows + int(tokens[b]))
            if gain <= best:
                break
            blocks, rows, best = common, rows + int(tokens[b]), gain
            b += 1
        if best > 0:
            found.append(SharedPrefix(first, b - first, blocks))
            total += best
    return found if pays(total) else []


def plan_cascade(
    q_indptr: np.ndarray,
    seq_lens: np.ndarray,
    page_indptr: np.ndarray,
    page_indices: np.ndarray,
    prefixes: Sequence[SharedPrefix],
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    num_blocks: int,
    decode_grid: Grid,
    prefill_grid: Grid | None = None,
) -> CascadePlan:
    """Plan the causal attention of a batch, given as for `plan`, with these prefixes (see `shared_prefixes`) attended once.

    They come in ascending order and without overlap. InvalidArgument where sequences of one do not begin with the same blocks,
    or a row is in the prefix itself.
    """
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": block_size, "num_blocks": num_blocks}
    grids = {"decode_grid": decode_grid, "prefill_grid": prefill_grid}
    if not prefixes:
        return CascadePlan(None, plan(q_indptr, seq_lens, page_indptr, page_indices, **shape, **grids))
    validation.check_numbers(num_heads, num_kv_heads, block_size, num_blocks, None)
    tokens = validation.check_rows(q_indptr, seq_lens, causal=True)
    validation.check_pages(seq_lens, page_indptr, page_indices, block_size, num_blocks, None)
    blocks = np.zeros(seq_lens.size, np.int64)  # in front of each sequence that are its group's
    starts, tables, end = [0], [], 0  # sequences of the first level: groups, and what is between them, of length 0
    for number, prefix in enumerate(prefixes):
        first, stop = prefix.first_sequence, prefix.first_sequence + prefix.num_sequences
        name = f"prefixes[{number}]"
        if not end <= first < stop <= seq_lens.size or prefix.num_blocks < 1:
            raise InvalidArgument(f"{name} is {prefix}; give sequences from {end} to {seq_lens.size - 1} and a block at least")
        wrong = prefix.num_blocks * block_size > (seq_lens - tokens)[first:stop]
        if wrong.any():
            b = first + wrong.argmax()
            expected = max(int(seq_lens[b] - tokens[b]), 0) // block_size
            raise InvalidArgument(
                f"{name} has {prefix.num_blocks} blocks; give {expected} at most, before all rows of sequence {b}"
            )
        where = page_indptr[first:stop, None] + np.arange(prefix.num_blocks)
        table = page_indices[where]
        if (table != table[0]).any():
            b = first + (table != table[0]).any(axis=1).argmax()
            raise InvalidArgument(f"{name} has blocks that sequence {b} does not begin with; give what all begin with")
        if first > end:
            starts.append(first)
            tables.append(table[0, :0])
        starts.append(stop)
        tables.append(table[0])
        blocks[first:stop], end = prefix.num_blocks, stop
    if end < seq_lens.size:
        starts.append(seq_lens.size)
        tables.append(tables[0][:0])
    lengths = np.array([table.size for table in tables])
    first_level = plan(
        q_indptr[starts],
        (lengths * block_size).astype(np.int32),
        np.concatenate(([0], lengths.cumsum())).astype(np.int32),
        np.concatenate(tables),
        **shape,
        **grids,
        causal=False,
    )
    left = np.diff(page_indptr) - blocks
    indptr = np.concatenate(([0], left.cumsum()))
    entries = np.arange(indptr[-1]) + (page_indptr[:-1] + blocks - indptr[:-1]).repeat(left)
    suffix_lens = (seq_lens - blocks * block_size).astype(np.int32)
    second_level = plan(q_indptr, suffix_lens, indptr.astype(np.int32), page_indices[entries], **shape, **grids)
    return CascadePlan(first_level, second_level)


def run_cascade(
    plans: CascadePlan,
    q: Array,
    k_pool: Array,
    v_pool: Array,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    out: Array | None = None,
    kv_scales: Array | None = None,
) -> Array | tuple[Array, Array]:
    """What `run` gives for the batch, up to rounding; arguments as there."""
    if plans.prefixes is None:
        return run(plans.suffixes, q, k_pool, v_pool, scale, return_lse=return_lse, out=out, kv_scales=kv_scales)
    prefix = run(plans.prefixes, q, k_pool, v_pool, scale, return_lse=True, kv_scales=kv_scales)
    suffix = run(plans.suffixes, q, k_pool, v_pool, scale, return_lse=True, out=out, kv_scales=kv_scales)
    merged, lse = merge_states(*prefix, *suffix, out=suffix[0])
    return (merged, lse) if return_lse else merged
