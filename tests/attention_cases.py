"""Batches for `cupaged.attention.run` and what it must make of them, in float64; run by tests/emulator and tests/gpu.

Whatever no sequence may read is poisoned: pages, tails of pages, and page-table entries past a sequence's end. With a sliding
window, positions that no row sees are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from op_cases import DTYPES, SEED, TOLERANCE, draw_batch

from cupaged.attention import Plan, plan
from cupaged.ops import numpy as reference_ops

LSE_TOLERANCE = 2e-3  # absolute: scores come of exact products of 16-bit numbers, summed in float32; weights are not rounded
UNUSED_PAGE = 2147480000
SHARED_MEMORY = {80: 167936, 86: 102400, 90: 233472}  # bytes of an SM


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

    def __str__(self) -> str:
        lengths = "+".join(f"{n}:{rows}" for n, rows in self.sequences[:5]) + "..." * (len(self.sequences) > 5)
        shape = f"{self.heads[0]}/{self.heads[1]}x{self.head_dim} p{self.block_size} c{self.num_ctas} sm{self.sm} {self.dtype}"
        return f"{lengths} {shape}" + f" w{self.window}" * (self.window is not None) + " shared" * self.shared


DECODES = ((77, 1), (33, 1), (1, 1), (160, 1), (64, 1), (65, 1))
PREFILLS = ((70, 70), (33, 20), (1, 1), (150, 17))
MIXED = ((70, 1), (19, 19), (0, 0), (150, 40), (1, 1), (31, 2), (5, 0), (128, 1))
EMPTY = ((0, 1), (40, 1), (0, 3), (0, 30), (0, 0))  # rows of sequences that hold nothing
CASES = [
    Case(DECODES),
    Case(DECODES, head_dim=128, heads=(8, 2), dtype="float16"),
    Case(((700, 1),), num_ctas=7),  # one task in as many parts as there are CTAs
    Case(((1200, 1), (3, 1)), heads=(3, 1), num_ctas=5, sm=86),
    Case(PREFILLS, num_ctas=5),
    Case(PREFILLS, head_dim=128, heads=(4, 1), dtype="float16", num_ctas=1),
    Case(PREFILLS, heads=(3, 3), num_ctas=40, sm=86),  # more CTAs than there is work for
    Case(((300, 30),), num_ctas=9),
    Case(MIXED, head_dim=128, sm=86),
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
]


def random_case(rng: np.random.Generator, most: int, num_ctas: int) -> Case:
    """A batch of up to `most` positions a sequence, of lengths from one to many, and of anything that a case may be."""
    sequences = []
    for _ in range(rng.integers(1, 7)):
        length = int(most ** rng.random())
        rows = rng.choice([1, 1, 1, rng.integers(0, 8), most ** rng.random()])
        sequences.append((length, min(int(rows), length)))
    num_kv_heads = int(rng.integers(1, 4))
    return Case(
        tuple(sequences),
        heads=(int(rng.integers(1, 21)) * num_kv_heads, num_kv_heads),
        head_dim=int(rng.choice([64, 128])),
        block_size=2 ** int(rng.integers(0, 9)),
        window=None if rng.random() < 0.6 else int(most ** rng.random()),
        num_ctas=num_ctas,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        shared=bool(rng.random() < 0.3),
        sm=int(rng.choice([80, 86, 90])),
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


def draw(case: Case, rng: np.random.Generator) -> Drawn:
    """The arguments of a case, drawn fresh, and the expected results."""
    num_heads, num_kv_heads = case.heads
    batch = draw_batch(rng, case.sequences, num_kv_heads, case.head_dim, case.block_size, case.shared)
    k_pool, v_pool = batch.pop("k_pool"), batch.pop("v_pool")
    q = case.spread * rng.standard_normal((batch["q_indptr"][-1], num_heads, case.head_dim))
    q, k_pool, v_pool = (x.astype(DTYPES[case.dtype]) for x in (q, k_pool, v_pool))
    if case.window is not None and not case.shared:
        for b, (length, rows) in enumerate(case.sequences):
            for position in range(max(0, length - rows - case.window + 1)):
                page = batch["page_indices"][batch["page_indptr"][b] + position // case.block_size]
                k_pool[:, page, position % case.block_size] = v_pool[:, page, position % case.block_size] = np.nan
    batch |= add_spare_pages(batch["page_indptr"], batch["page_indices"])
    planned = plan(
        **batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=case.block_size,
        num_blocks=k_pool.shape[1],
        num_ctas=case.num_ctas,
        sliding_window=case.window,
    )
    return with_results(case, planned, q, k_pool, v_pool)


def with_results(case: Case, planned: Plan, q: np.ndarray, k_pool: np.ndarray, v_pool: np.ndarray) -> Drawn:
    """What these inputs must give, in float64."""
    exact = [x.astype(np.float64) for x in (q, k_pool, v_pool)]
    batch = (planned.q_indptr, planned.seq_lens, planned.page_indptr, planned.page_indices)
    scale = 1 / math.sqrt(case.head_dim)
    out = reference_ops.paged_attention(*exact, *batch, scale, case.window)
    return Drawn(case, planned, q, k_pool, v_pool, out, lse_of(*exact[:2], planned, scale))


def add_spare_pages(page_indptr: np.ndarray, page_indices: np.ndarray) -> dict[str, np.ndarray]:
    """Page tables that go on behind what the sequences need, with entries that nobody may follow."""
    spare = np.full(3, UNUSED_PAGE, np.int32)
    tables = np.split(page_indices, page_indptr[1:-1])
    return {
        "page_indptr": page_indptr + 3 * np.arange(len(page_indptr), dtype=np.int32),
        "page_indices": np.concatenate([part for table in tables for part in (table, spare)]),
    }


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
    fields = {"page_indices": page_indices.astype(np.int32), "num_blocks": num_blocks, "uploaded": {}}
    return replace(drawn.plan, **fields), *pools


def lse_of(q: np.ndarray, k_pool: np.ndarray, planned: Plan, scale: float) -> np.ndarray:
    """Log-sum-exp of every row's scores."""
    lse = np.full(q.shape[:2], -np.inf)
    num_kv_heads, _, block_size, head_dim = k_pool.shape
    for b, length in enumerate(planned.seq_lens):
        pages = planned.page_indices[planned.page_indptr[b] :][: -(-length // block_size)]
        keys = k_pool[:, pages].reshape(num_kv_heads, -1, head_dim).swapaxes(1, 2)
        first, end = planned.q_indptr[b : b + 2]
        for rows in (slice(row, min(row + 64, end)) for row in range(first, end, 64)):
            n = rows.stop - rows.start
            position = (length - end + np.arange(rows.start, rows.stop))[:, None]
            start = 0 if planned.sliding_window is None else max(0, position[0, 0] - planned.sliding_window + 1)
            p = np.arange(start, position[-1, 0] + 1)
            seen = p <= position
            if planned.sliding_window is not None:
                seen &= p > position - planned.sliding_window
            group = q[rows].reshape(n, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # [kv head, of group, row, element]
            scores = np.where(seen, group @ keys[:, None, :, start : p.size + start] * scale, -np.inf)
            top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
            with np.errstate(divide="ignore"):
                total = np.log(np.exp(scores - np.where(seen.any(-1, keepdims=True), top, 0)).sum(axis=-1))
            lse[rows] = (total + np.where(np.isinf(top), 0, top)[..., 0]).transpose(2, 0, 1).reshape(n, -1)
    return lse


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
