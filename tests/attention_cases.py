"""Batches for `cupaged.attention.run` and what it must make of them, in float64; run by tests/emulator and tests/gpu.

Whatever no sequence may read is poisoned: pages, tails of pages, their scales, and page-table entries past a sequence's end.
With a sliding window, positions that no row sees are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from op_cases import DTYPES, E4M3, SEED, TOLERANCE, draw_batch

from cupaged.attention import Grid, Plan, pack_mask, plan

LSE_TOLERANCE = 2e-3  # absolute: scores come of exact products of 16-bit numbers, summed in float32; weights are not rounded
UNUSED_PAGE = 2147480000
SHARED_MEMORY = {80: 167936, 86: 102400, 90: 233472}  # bytes of an SM
POOL_DTYPES = {"fp8": np.uint8, "int8": np.int8}


@dataclass(frozen=True)
class Case:
    """A batch of (length, query rows) sequences; `spread` is the standard deviation of the scores."""

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)  # query and kv heads
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    num_ctas: int = 3
    dtype: str = "bfloat16"
    spread: float = 1.0
    shared: bool = False  # sequences begin with pages of the one before
    sm: int = 90  # whose shared memory the kernel has; it decides on the stages
    kv: str | None = None  # "fp8" or "int8"
    mask: bool = False  # of random bits
    causal: bool = True
    pointers: bool = False  # to pages of several allocations, instead of pools
    padded: bool = False  # the page table has two axes
    valid: bool = False  # pages are not full
    invariant: bool = False

    def __str__(self) -> str:
        lengths = "+".join(f"{n}:{rows}" for n, rows in self.sequences[:5]) + "..." * (len(self.sequences) > 5)
        shape = f"{self.heads[0]}/{self.heads[1]}x{self.head_dim} p{self.block_size} c{self.num_ctas} sm{self.sm} {self.dtype}"
        flags = [name for name in ("mask", "pointers", "padded", "valid", "invariant", "shared") if getattr(self, name)]
        flags += [f"w{self.window}"] * (self.window is not None) + ["not causal"] * (not self.causal)
        flags += [self.kv] * (self.kv is not None)
        flags += [f"spread {self.spread:g}"] * (self.spread != 1)
        return " ".join([lengths, shape, *flags])


DECODES = ((77, 1), (33, 1), (1, 1), (160, 1), (64, 1), (65, 1))
PREFILLS = ((70, 70), (33, 20), (1, 1), (150, 17))
MIXED = ((70, 1), (19, 19), (0, 0), (150, 40), (1, 1), (31, 2), (5, 0), (128, 1))
EMPTY = ((0, 1), (40, 1), (0, 3), (0, 30), (0, 0))  # rows of sequences that hold nothing
LONG = ((1100, 1), (2100, 3), (1500, 40), (1024, 1), (7, 7))  # of more than one fixed part
CASES = [
    Case(DECODES),
    Case(DECODES, head_dim=128, heads=(8, 2), dtype="float16"),
    Case(((700, 1),), num_ctas=7),  # one task in as many parts as there are CTAs
    Case(((700, 1),), heads=(8, 1), head_dim=128, num_ctas=40),  # and in more than are merged at once
    Case(((1200, 1), (3, 1)), heads=(3, 1), num_ctas=5, sm=86),
    Case(PREFILLS, num_ctas=5),
    Case(PREFILLS, head_dim=128, heads=(4, 1), dtype="float16", num_ctas=1),
    Case(PREFILLS, heads=(3, 3), num_ctas=40, sm=86),  # more CTAs than there is work for
    Case(PREFILLS, head_dim=128, heads=(4, 1), num_ctas=4),
    Case(((300, 30),), num_ctas=9),
    Case(((300, 200),), num_ctas=9),
    Case(MIXED, head_dim=128, sm=86),
    Case(MIXED, head_dim=128, sm=80),
    Case(MIXED, heads=(9, 3), dtype="float16"),
    Case(MIXED, num_ctas=1),
    Case(EMPTY, num_ctas=2),
    Case(MIXED, shared=True),
    Case(MIXED, spread=30.0, dtype="float16"),  # all weights of a row but one are nearly 0
    *(
        Case(((90, 1), (70, 3), (40, 25)), heads=(2 * group_size, 2), num_ctas=4, dtype=dtype)
        for group_size, dtype in zip((1, 3, 4, 7, 8, 16, 20), ("bfloat16", "float16") * 4, strict=False)
    ),
    *(Case(((130, 1), (2 * p + 1, 2), (p, 1), (70, 21)), block_size=p) for p in (1, 2, 4, 8, 32, 64, 128, 256)),
    *(Case(MIXED, window=window) for window in (1, 7, 64, 1000)),
    Case(((400, 1), (300, 40)), window=100, head_dim=128, num_ctas=6),
    *(
        Case(sequences, kv=kv, head_dim=head_dim, heads=heads, dtype=dtype, block_size=p, num_ctas=5)
        for kv in POOL_DTYPES
        for sequences, head_dim, heads, dtype, p in (
            (DECODES, 128, (8, 2), "bfloat16", 16),
            (DECODES, 64, (4, 2), "float16", 4),
            (MIXED, 128, (6, 2), "float16", 1),
            (MIXED, 64, (40, 2), "bfloat16", 64),
            (EMPTY, 64, (4, 2), "bfloat16", 16),
        )
    ),
    Case(MIXED, kv="fp8", window=20, num_ctas=7, sm=86),
    Case(MIXED, kv="int8", spread=20.0, num_ctas=7, sm=80),
    Case(MIXED, mask=True),
    Case(DECODES, mask=True, head_dim=128, num_ctas=9),
    Case(((300, 30), (65, 64)), mask=True, num_ctas=9, head_dim=128),
    Case(MIXED, mask=True, kv="int8", dtype="float16", num_ctas=5),
    Case(MIXED, causal=False, num_ctas=5),
    Case(((20, 90), (0, 5), (300, 400)), causal=False, head_dim=128, num_ctas=5),  # more rows than positions
    Case(DECODES, pointers=True, head_dim=128),
    Case(MIXED, pointers=True, block_size=1, num_ctas=4),
    Case(MIXED, pointers=True, kv="fp8", block_size=8, num_ctas=4),
    Case(MIXED, padded=True),
    Case(MIXED, padded=True, pointers=True, num_ctas=5),
    Case(MIXED, valid=True),
    Case(((90, 1), (70, 30)), valid=True, kv="int8", block_size=8, padded=True),
    Case(MIXED, valid=True, pointers=True, block_size=4),
    Case(MIXED, invariant=True, num_ctas=5),
    Case(LONG, invariant=True, num_ctas=5, heads=(2, 2)),
    Case(LONG, invariant=True, num_ctas=30, heads=(4, 1), kv="fp8", head_dim=128),
    Case(LONG, invariant=True, num_ctas=3, heads=(2, 1), mask=True),
]


def random_case(rng: np.random.Generator, most: int, num_ctas: int) -> Case:
    """A batch of up to `most` positions a sequence, of lengths from one to many, and of anything that a case may be."""
    sequences = []
    for _ in range(rng.integers(1, 7)):
        length = int(most ** rng.random())
        rows = rng.choice([1, 1, 1, rng.integers(0, 8), most ** rng.random()])
        sequences.append((length, min(int(rows), length)))
    num_kv_heads = int(rng.integers(1, 4))
    kv = rng.choice([None, None, "fp8", "int8"])
    sees = rng.choice(["causal", "causal", "window", "mask", "all"])
    valid = rng.random() < 0.2
    return Case(
        tuple(sequences),
        heads=(int(rng.integers(1, 21)) * num_kv_heads, num_kv_heads),
        head_dim=int(rng.choice([64, 128])),
        block_size=2 ** int(rng.integers(0, 9)),
        window=int(most ** rng.random()) if sees == "window" else None,
        num_ctas=num_ctas,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        shared=bool(rng.random() < 0.3 and not valid),
        sm=int(rng.choice([80, 86, 90])),
        kv=kv,
        mask=sees == "mask",
        causal=sees != "all",
        pointers=bool(rng.random() < 0.2 and kv != "int8"),
        padded=bool(rng.random() < 0.3),
        valid=bool(valid),
        invariant=bool(rng.random() < 0.2),
    )


@dataclass
class Drawn:
    case: Case
    plan: Plan
    q: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    out: np.ndarray  # float64 [num_tokens, num_heads, head_dim]
    lse: np.ndarray  # float64 [num_tokens, num_heads]
    table: np.ndarray  # page_indices as `plan` got them
    slots: list[np.ndarray]  # [length, 2] of each sequence: the block and the slot in it of every position
    seen: list[np.ndarray]  # bool [rows, length] of each sequence
    more: dict[str, np.ndarray]  # further arguments of `run`


def draw(case: Case, rng: np.random.Generator) -> Drawn:
    """The arguments of a case, drawn fresh, and the expected results."""
    num_heads, num_kv_heads = case.heads
    batch = draw_batch(rng, case.sequences, num_kv_heads, case.head_dim, case.block_size, case.shared)
    k_pool, v_pool = batch.pop("k_pool"), batch.pop("v_pool")
    q = case.spread * rng.standard_normal((batch["q_indptr"][-1], num_heads, case.head_dim))
    if case.valid:
        k_pool, v_pool, batch = with_partly_valid_pages(rng, case, k_pool, v_pool, batch)
    slots = slots_of(case, batch)
    if case.window is not None and not case.shared:
        for (length, rows), places in zip(case.sequences, slots, strict=True):
            page, slot = places[: max(0, length - rows - case.window + 1)].T
            k_pool[:, page, slot] = v_pool[:, page, slot] = np.nan
    seen = [seen_by(rng, case, length, rows) for length, rows in case.sequences]
    pools, more = in_dtype(rng, case, k_pool, v_pool)
    if case.mask:
        more["mask"], batch["mask_indptr"] = pack_mask(seen)
    add_spare_pages(batch)
    if case.padded:
        pad(batch)
    planned = plan(
        **batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=case.block_size,
        num_blocks=k_pool.shape[1],
        decode_grid=Grid(case.num_ctas),
        causal=case.causal,
        sliding_window=case.window,
        batch_invariant=case.invariant,
    )
    inputs = (planned, q.astype(DTYPES[case.dtype]), *pools)
    return Drawn(case, *inputs, *results_of(*inputs[1:], slots, seen, more), batch["page_indices"], slots, seen, more)


def results_of(q: np.ndarray, k_pool, v_pool, slots, seen, more) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) that these inputs must give, in float64."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pool.shape[0]
    first = 0
    for places, sees in zip(slots, seen, strict=True):
        page, slot = places.T
        k, v = (values(pool, which, more.get("kv_scales"), page, slot) for which, pool in enumerate((k_pool, v_pool)))
        for start in range(0, len(sees), 64):
            rows, see = slice(first + start, first + min(start + 64, len(sees))), sees[start : start + 64]
            group = q[rows].astype(np.float64).reshape(len(see), num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
            scores = np.where(
                see, group @ k[:, None].swapaxes(2, 3) / math.sqrt(head_dim), -np.inf
            )  # [kv head, of group, row, p]
            top = np.where(see.any(-1), scores.max(axis=-1, initial=-np.inf), 0)[..., None]
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            seen_values = np.where(see.any(0)[:, None], v, 0)  # 0 * NaN would be NaN
            result = weights @ seen_values[:, None] / np.where(total == 0, 1, total)
            out[rows] = result.transpose(2, 0, 1, 3).reshape(len(see), num_heads, head_dim)
            with np.errstate(divide="ignore"):
                lse[rows] = (np.log(total) + top)[..., 0].transpose(2, 0, 1).reshape(len(see), num_heads)
        first += len(sees)
    return out, lse


def with_queries(drawn: Drawn, q: np.ndarray) -> Drawn:
    """The same batch asked otherwise."""
    out, lse = results_of(q, drawn.k_pool, drawn.v_pool, drawn.slots, drawn.seen, drawn.more)
    return replace(drawn, q=q, out=out, lse=lse)


def values(pool: np.ndarray, which: int, kv_scales: np.ndarray | None, page: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """K (which = 0) or V (1) of these positions, float64 [num_kv_heads, positions, head_dim]."""
    rows = pool[:, page, slot]
    if pool.dtype == np.int8:
        return rows * kv_scales[:, page, slot, which, None].astype(np.float64)
    if pool.dtype == np.uint8:
        magnitude = np.append(E4M3, np.nan)[rows & 127]
        return np.where(rows & 128, -magnitude, magnitude) * kv_scales[:, which, None, None]
    return rows.astype(np.float64)


def seen_by(rng: np.random.Generator, case: Case, length: int, rows: int) -> np.ndarray:
    """bool [rows, length]: which positions a row sees."""
    p, position = np.arange(length), (length - rows + np.arange(rows))[:, None]
    if case.mask:
        return (rng.random((rows, length)) < rng.choice([0.02, 0.5, 0.98], (rows, 1))) & (p % 64 != rng.integers(64))
    if not case.causal:
        return np.ones((rows, length), bool)
    seen = p <= position
    return seen if case.window is None else seen & (p > position - case.window)


def slots_of(case: Case, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    found = []
    for b, (length, _) in enumerate(case.sequences):
        pages = batch["page_indices"][batch["page_indptr"][b] : batch["page_indptr"][b + 1]]
        full = np.full(len(pages), case.block_size)
        counts = batch["block_valid_lengths"][batch["page_indptr"][b] : batch["page_indptr"][b + 1]] if case.valid else full
        places = [(page, slot) for page, count in zip(pages, counts, strict=True) for slot in range(count)]
        found.append(np.array(places[:length], np.int64).reshape(-1, 2))
    return found


def with_partly_valid_pages(rng, case: Case, k_pool, v_pool, batch) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The same sequences in pages of which any number of slots is used, from the first on."""
    tables, counts, blocks = [], [], []
    for length, _ in case.sequences:
        table = []
        while length > 0:
            count = int(min(length, rng.integers(0, case.block_size + 1)))
            table.append(len(counts))
            counts.append(count)
            length -= count
        tables.append(table)
    num_blocks = len(counts) + 2
    blocks = rng.permutation(num_blocks)[: len(counts)]
    pools = []
    for _ in range(2):
        pool = np.full((k_pool.shape[0], num_blocks, case.block_size, case.head_dim), np.nan)
        for block, count in zip(blocks, counts, strict=True):
            pool[:, block, :count] = rng.standard_normal((pool.shape[0], count, case.head_dim))
        pools.append(pool)
    batch = {
        "q_indptr": batch["q_indptr"],
        "seq_lens": batch["seq_lens"],
        "page_indptr": np.cumsum([0] + [len(table) for table in tables], dtype=np.int32),
        "page_indices": blocks.astype(np.int32),
        "block_valid_lengths": np.array(counts, np.int32),
    }
    return *pools, batch


def in_dtype(rng, case: Case, k_pool, v_pool) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """([k_pool, v_pool], further arguments): rounded to the case's dtype of K/V; NaN stays NaN in codes or scales."""
    pools = [k_pool, v_pool]
    if case.kv is None:
        return [pool.astype(DTYPES[case.dtype]) for pool in pools], {}
    if case.kv == "fp8":
        scales = rng.uniform(0.5, 2, (k_pool.shape[0], 2)).astype(np.float32)
        codes = []
        for which, pool in enumerate(pools):
            nearest = np.searchsorted((E4M3[1:] + E4M3[:-1]) / 2, np.abs(pool / scales[:, which, None, None, None]))
            codes.append(np.where(np.isnan(pool), 127, nearest + 128 * (pool < 0)).astype(np.uint8))
        return codes, {"kv_scales": scales}
    top = np.stack([np.abs(pool).max(-1) for pool in pools], axis=-1)
    scales = (top / 127 * 2.0 ** rng.integers(0, 3, top.shape)).astype(np.float16)
    codes = [pool / np.where(scales[..., which] == 0, 1, scales[..., which])[..., None] for which, pool in enumerate(pools)]
    unused = rng.integers(-128, 128, k_pool.shape)
    codes = [np.where(np.isnan(x), unused, np.clip(np.rint(x), -127, 127)).astype(np.int8) for x in codes]
    return codes, {"kv_scales": scales}


def add_spare_pages(batch: dict[str, np.ndarray]) -> None:
    """Page tables that go on behind what the sequences need, with entries that nobody may follow."""
    for name, spare in (("page_indices", UNUSED_PAGE), ("block_valid_lengths", 0)):
        if name in batch:
            tables = np.split(batch[name], batch["page_indptr"][1:-1])
            batch[name] = np.concatenate([part for table in tables for part in (table, np.full(3, spare, np.int32))])
    batch["page_indptr"] = batch["page_indptr"] + 3 * np.arange(len(batch["page_indptr"]), dtype=np.int32)


def pad(batch: dict[str, np.ndarray]) -> None:
    """The page tables as rows of one array."""
    page_indptr = batch.pop("page_indptr")
    widest = int(np.diff(page_indptr).max(initial=0))
    for name, spare in (("page_indices", UNUSED_PAGE), ("block_valid_lengths", 0)):
        if name in batch:
            padded = np.full((len(page_indptr) - 1, widest), spare, np.int32)
            for b, table in enumerate(np.split(batch[name], page_indptr[1:-1])):
                padded[b, : len(table)] = table
            batch[name] = padded
    batch["page_indptr"] = None


def arguments_of(drawn: Drawn, upload: Callable[[np.ndarray], Any]) -> tuple[list, dict, list]:
    """(arguments, keywords, what must be kept) of `run` on a device. With pointers, a block is an allocation of its own."""
    keywords = {name: upload(x) for name, x in drawn.more.items()}
    if not drawn.case.pointers:
        return [upload(x) for x in (drawn.q, drawn.k_pool, drawn.v_pool)], keywords, []
    kept = []
    for name, pool in (("block_k_ptrs", drawn.k_pool), ("block_v_ptrs", drawn.v_pool)):
        blocks = [upload(np.ascontiguousarray(pool[:, block])) for block in range(pool.shape[1])]
        addresses = np.array([block.data.ptr for block in blocks] + [16], np.uint64)  # nobody may follow the last
        keywords[name] = upload(addresses[np.minimum(drawn.table, len(blocks))])
        kept += blocks
    return [upload(drawn.q), None, None], keywords, kept


def in_large_pool(drawn: Drawn, make: Callable[[tuple[int, ...], np.dtype], Any], put: Callable) -> tuple[Plan, Any, Any]:
    """(plan, k_pool, v_pool) of the same batch in pools of more than 2^32 bytes, 2^31 elements, made by `make`.

    put(pool, block, values) writes one block of every kv head.
    """
    num_kv_heads, small, block_size, head_dim = drawn.k_pool.shape
    num_blocks = 2**31 // (num_kv_heads * block_size * head_dim) + 2 * small
    far = np.concatenate([np.arange(small // 2), num_blocks - 1 - np.arange(small - small // 2)])
    pools = []
    for source in (drawn.k_pool, drawn.v_pool):
        pool = make((num_kv_heads, num_blocks, block_size, head_dim), source.dtype)
        for block in range(small):
            put(pool, far[block], source[:, block])
        pools.append(pool)
    page_indices = np.where(drawn.plan.page_indices == UNUSED_PAGE, UNUSED_PAGE, far[drawn.plan.page_indices % small])
    fields = {"page_indices": page_indices.astype(np.int32), "num_blocks": num_blocks, "pool_shape": (num_blocks, block_size)}
    return replace(drawn.plan, **fields, uploaded={}), *pools


def check(drawn: Drawn, out: np.ndarray, lse: np.ndarray, what: str = "") -> None:
    """AssertionError unless (out, lse) are what they should be; in every row, in the 2-norm."""
    what = f"{drawn.case} {what} (CUPAGED_TEST_SEED={SEED})"
    assert out.shape == drawn.out.shape, what
    assert str(out.dtype) == drawn.case.dtype, what
    empty = np.isneginf(drawn.lse)
    assert (np.isneginf(lse) == empty).all(), f"{what}: lse is -inf in {np.isneginf(lse).sum()} rows, not {empty.sum()}"
    assert (out[empty] == 0).all(), f"{what}: rows that see nothing are not 0"
    error = np.linalg.norm(out.astype(np.float64) - drawn.out, axis=-1)
    wrong = ~(error <= TOLERANCE[drawn.case.dtype] * np.linalg.norm(drawn.out, axis=-1))
    rows = f"{wrong.sum()} of {wrong.size} rows of out, the first {np.argwhere(wrong)[:1].tolist()}"
    assert not wrong.any(), f"{what}: {rows}, up to {error[wrong].max():.3g} off"
    error = np.abs(np.where(empty, 0, lse) - np.where(empty, 0, drawn.lse))
    wrong = ~(error <= LSE_TOLERANCE)
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} rows of lse, up to {error[wrong].max():.3g} off"
