"""What every implementation of the operations must do: inputs over odd shapes, held to `cupaged.ops.numpy` in float64.

A case draws the arguments of one operation. Arrays drawn in float64 stand for activations, weights and KV: they are rounded
to the 16-bit type under test first, so that the reference computes from the very same numbers. float32 and integers go as
they are. Run by tests/test_ops_numpy.py (in float32), tests/emulator and tests/gpu.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged.ops import numpy as reference_ops

SEED = int(os.environ.get("CUPAGED_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
DTYPES = {name: np.dtype(name) for name in ("bfloat16", "float16", "float32")}
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 5e-5}
Arguments = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One call of the operation `op`, its arguments drawn by `draw(rng)`; those named in `writes` are changed in place."""

    op: str
    name: str
    draw: Callable[[np.random.Generator], Arguments] = field(repr=False)
    writes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def check(ops, case: Case, dtype: str) -> None:
    """Run the case on `ops` in the 16-bit type `dtype` and compare; raises AssertionError."""
    rng = np.random.default_rng([SEED, zlib.crc32(str(case).encode()), len(dtype)])
    arguments = {name: _rounded(value, DTYPES[dtype]) for name, value in case.draw(rng).items()}
    exact = {name: _exact(value) for name, value in arguments.items()}
    device = {name: ops.upload(value.copy()) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    result = getattr(ops, case.op)(**device)
    after = {name: ops.download(value) for name, value in device.items() if isinstance(arguments[name], np.ndarray)}
    where = f"{case} {dtype} (CUPAGED_TEST_SEED={SEED})"
    for name, value in after.items():
        if name not in case.writes:
            assert value.tobytes() == arguments[name].tobytes(), f"{where}: the argument {name} was changed"

    if case.op == "sample":
        assert str(result.dtype) == "int32", where
        check_tokens(ops.download(result), arguments, where)
        return
    expected = getattr(reference_ops, case.op)(**exact)
    if expected is None:
        assert result is None, where
    else:
        wanted = arguments.get("dtype") or dtype
        assert str(result.dtype) == wanted, f"{where}: gives {result.dtype}, not {wanted}"
        check_close(ops.download(result), expected, f"{where}: the result")
    for name in case.writes:
        before, wrote = _exact(arguments[name]), exact[name]
        same = (wrote == before) | (np.isnan(before) & np.isnan(wrote))
        assert after[name][same].tobytes() == arguments[name][same].tobytes(), f"{where}: {name} was changed elsewhere"
        check_close(after[name][~same], wrote[~same], f"{where}: what was written to {name}")


def check_close(out: np.ndarray, expected: np.ndarray, what: str) -> None:
    """`out` is `expected` (float64) up to the tolerance of its dtype, in the 2-norm of every row (the last axis)."""
    assert out.shape == expected.shape, f"{what}: shape {out.shape}, not {expected.shape}"
    infinite = np.isinf(expected)
    assert (out[infinite] == expected[infinite]).all(), f"{what}: infinities"
    difference = np.linalg.norm(np.where(infinite, 0, out.astype(np.float64)) - np.where(infinite, 0, expected), axis=-1)
    allowed = TOLERANCE[str(out.dtype)] * np.linalg.norm(np.where(infinite, 0, expected), axis=-1)
    wrong = ~(difference <= allowed)
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} rows, up to {difference[wrong].max():.3g} off"


def _rounded(value: object, dtype: np.dtype) -> object:
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value


def _exact(value: object) -> object:
    inexact = isinstance(value, np.ndarray) and value.dtype.kind not in "iu"
    return value.astype(np.float64) if inexact else value


# ---- plain operations ---------------------------------------------------------------------------------------------------
def embedding(rows: int, width: int, picked: int) -> Case:
    def draw(rng):
        ids = rng.integers(0, rows, picked).astype(np.int32)
        ids[:2] = [rows - 1, 0][:picked]
        return {"token_ids": ids, "table": rng.standard_normal((rows, width))}

    return Case("embedding", f"{picked} of {rows}x{width}", draw)


def rms_norm(*shape: int, scale: float = 1.0, eps: float = 1e-5) -> Case:
    def draw(rng):
        return {"x": scale * rng.standard_normal(shape), "weight": rng.standard_normal(shape[-1]), "eps": eps}

    return Case("rms_norm", f"{'x'.join(map(str, shape))} times {scale}", draw)


def linear(rows: int, inner: int, outer: int, bias: bool = False, dtype: str | None = None) -> Case:
    def draw(rng):
        arguments = {"x": rng.standard_normal((rows, inner)), "weight": rng.standard_normal((outer, inner)), "dtype": dtype}
        return arguments | ({"bias": 10 * rng.standard_normal(outer)} if bias else {})

    return Case("linear", f"{rows}x{inner}x{outer} {'bias ' * bias}{dtype or ''}", draw)


def elementwise(op: str, names: tuple[str, str], *shape: int, scale: float = 1.0) -> Case:
    def draw(rng):
        return {name: scale * rng.standard_normal(shape) for name in names}

    return Case(op, f"{'x'.join(map(str, shape))} times {scale}", draw)


# ---- batches of sequences ----------------------------------------------------------------------------------------------
# (sequence length, query rows) of every sequence
BATCHES = {
    "one token": [(1, 1)],
    "one decode": [(77, 1)],
    "decodes": [(33, 1), (1, 1), (160, 1), (64, 1), (17, 1)],
    "prefill": [(45, 45)],
    "mixed": [(70, 1), (19, 19), (0, 0), (50, 13), (1, 1), (31, 2), (0, 0)],
    "no rows": [(5, 0), (0, 0), (16, 0)],
}


def edges(n: int) -> list[tuple[int, int]]:
    """Sequences that end at the edges of blocks of n tokens and one beside them."""
    return [(n, 1), (max(n - 1, 1), 1), (0, 0), (n + 1, 1), (2 * n, min(2 * n, 3)), (2 * n - 1, 1), (3 * n + 1, 1)]


def draw_batch(rng, sequences, num_kv_heads: int, head_dim: int, block_size: int, shared: bool = False) -> Arguments:
    """Pools of one layer and the index arrays; NaN wherever no sequence has a token.

    Pages are permuted. With `shared`, a sequence begins with the (at most two) full pages of the one before it.
    """
    num_blocks = sum(-(-length // block_size) for length, _ in sequences) + 3
    unused = iter(rng.permutation(num_blocks))
    k_pool = np.full((num_kv_heads, num_blocks, block_size, head_dim), np.nan)
    v_pool = k_pool.copy()
    tables = [[]]
    for i, (length, _) in enumerate(sequences):
        common = min(sequences[i - 1][0] // block_size, length // block_size, 2) if shared and i else 0
        table = tables[-1][:common]
        for start in range(common * block_size, length, block_size):
            page, filled = next(unused), min(block_size, length - start)
            k_pool[:, page, :filled] = rng.standard_normal((num_kv_heads, filled, head_dim))
            v_pool[:, page, :filled] = rng.standard_normal((num_kv_heads, filled, head_dim))
            table.append(page)
        tables.append(table)
    return {
        "k_pool": k_pool,
        "v_pool": v_pool,
        "q_indptr": np.cumsum([0] + [rows for _, rows in sequences], dtype=np.int32),
        "seq_lens": np.array([length for length, _ in sequences], np.int32),
        "page_indptr": np.cumsum([len(table) for table in tables], dtype=np.int32),
        "page_indices": np.array([page for table in tables for page in table], np.int32),
    }


def attention(name, sequences, heads, head_dim, block_size=16, window=None, shared=False, spread=1.0) -> Case:
    """`heads` is (num_heads, num_kv_heads); `spread` is the standard deviation of the scores."""

    def draw(rng):
        batch = draw_batch(rng, sequences, heads[1], head_dim, block_size, shared)
        q = spread * rng.standard_normal((batch["q_indptr"][-1], heads[0], head_dim))
        return {"q": q, **batch, "scale": 1 / math.sqrt(head_dim), "sliding_window": window}

    return Case("paged_attention", f"{name} {heads[0]}/{heads[1]}x{head_dim} p{block_size}", draw)


def rope(name, sequences, heads, head_dim, block_size=16) -> Case:
    def draw(rng):
        batch = draw_batch(rng, sequences, heads[1], head_dim, block_size)
        rows = batch["q_indptr"][-1]
        angle = np.arange(max(batch["seq_lens"]) + 5)[:, None] * 10000.0 ** -np.linspace(0, 1, head_dim // 2, endpoint=False)
        for b, (length, new) in enumerate(sequences):  # nothing is in the slots to be written
            for position in range(length - new, length):
                page = batch["page_indices"][batch["page_indptr"][b] + position // block_size]
                batch["k_pool"][:, page, position % block_size] = np.nan
                batch["v_pool"][:, page, position % block_size] = np.nan
        return {
            "q": rng.standard_normal((rows, heads[0], head_dim)),
            "k": rng.standard_normal((rows, heads[1], head_dim)),
            "v": rng.standard_normal((rows, heads[1], head_dim)),
            "rope_table": np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
            **batch,
        }

    return Case("rope_append", f"{name} {heads[0]}/{heads[1]}x{head_dim} p{block_size}", draw, writes=("k_pool", "v_pool"))


def check_large_pool(ops, make: Callable[[tuple[int, ...], np.dtype], object]) -> None:
    """K and V appended to pools of more than 2^32 bytes, 2^31 elements, made by `make`, are what attention then reads."""
    rng = np.random.default_rng([SEED, 2])
    rows, num_blocks, dtype = 40, 2**20 + 3, DTYPES["bfloat16"]
    drawn = rope("", [(rows, rows)], (4, 2), 64).draw(rng)
    arguments = {name: _rounded(value, dtype) for name, value in drawn.items() if not name.endswith("_pool")}
    inputs = {name: arguments.pop(name) for name in ("q", "k", "v", "rope_table")}
    arguments["page_indices"] = np.array([num_blocks - 1, 0, num_blocks // 2 + 1], np.int32)
    batch = {name: ops.upload(value) for name, value in arguments.items()}
    k_pool, v_pool = (make((2, num_blocks, 16, 64), dtype) for _ in range(2))
    q = ops.rope_append(**{name: ops.upload(value) for name, value in inputs.items()}, k_pool=k_pool, v_pool=v_pool, **batch)
    out = ops.download(ops.paged_attention(q, k_pool, v_pool, **batch, scale=0.125))

    small = {"k_pool": np.zeros((2, 3, 16, 64)), "v_pool": np.zeros((2, 3, 16, 64))}
    batch = arguments | {"page_indices": np.arange(3)}
    q = reference_ops.rope_append(**{name: _exact(value) for name, value in inputs.items()}, **small, **batch)
    check_close(out, reference_ops.paged_attention(q, **small, **batch, scale=0.125), f"large pool (CUPAGED_TEST_SEED={SEED})")


# ---- sampling ----------------------------------------------------------------------------------------------------------
def penalise(name: str, rows: int, vocab: int, most_seen: int) -> Case:
    def draw(rng):
        seen = [rng.permutation(vocab)[: rng.integers(0, most_seen + 1)] for _ in range(rows)]
        seen[0], seen[-1] = rng.permutation(vocab)[:most_seen], np.array([], int)
        ids = np.concatenate(seen).astype(np.int32)
        return {
            "logits": 3 * rng.standard_normal((rows, vocab), np.float32),
            "seen_indptr": np.cumsum([0] + [len(s) for s in seen], dtype=np.int32),
            "seen_ids": ids,
            "seen_counts": rng.integers(0, 4, len(ids)).astype(np.int32),
            "repetition_penalty": rng.uniform(0.8, 1.5, rows).astype(np.float32),
            "presence_penalty": rng.uniform(-2, 2, rows).astype(np.float32),
            "frequency_penalty": rng.uniform(-2, 2, rows).astype(np.float32),
        }

    return Case("penalise", name, draw, writes=("logits",))


def forbid(rows: int, vocab: int, most: int) -> Case:
    def draw(rng):
        counts = rng.integers(0, most + 1, rows)
        counts[0] = 0
        return {
            "logits": 3 * rng.standard_normal((rows, vocab), np.float32),
            "indptr": np.cumsum([0, *counts], dtype=np.int32),
            "token_ids": rng.integers(0, vocab, counts.sum()).astype(np.int32),
        }

    return Case("forbid", f"{rows}x{vocab}", draw, writes=("logits",))


SAMPLING_KINDS = {"seed": np.uint64, "top_k": np.int32, "candidate": np.int32, "position": np.int32}


def sample(name: str, vocab: int, rows: int = 8, scale=3.0, round_to=0.0, forbidden=0.0, **options) -> Case:
    """Logits of deviation `scale`, rounded to multiples of `round_to` (then many are equal), a share of them -inf."""

    def draw(rng):
        logits = scale * rng.standard_normal((rows, vocab))
        if round_to:
            logits = np.round(logits / round_to) * round_to
        logits[rng.random(logits.shape) < forbidden] = -np.inf
        drawn = {
            "temperature": rng.uniform(0.5, 1.5, rows),
            "top_k": 0,
            "top_p": 1,
            "min_p": 0,
            "seed": rng.integers(0, 2**64, rows, np.uint64),
            "candidate": rng.integers(0, 9, rows),
            "position": rng.integers(0, 2**20, rows),
        }
        columns = {key: np.resize(value, rows) for key, value in (drawn | options).items()}
        return {"logits": logits.astype(np.float32)} | {
            key: column.astype(SAMPLING_KINDS.get(key, np.float32)) for key, column in columns.items()
        }

    return Case("sample", name, draw)


def check_tokens(tokens: np.ndarray, arguments: Arguments, where: str) -> None:
    """Every token is one that rounding may choose; there is but one, save in one row of ten (of the inputs' making)."""
    undecided = 0
    for b, token in enumerate(tokens):
        row = {name: value[b] for name, value in arguments.items()}
        allowed = sample_by_sorting(**row)
        assert token in allowed, f"{where}: row {b} gives {token}, not {allowed}, for { {**row, 'logits': '...'} }"
        undecided += len(allowed) > 1
    assert undecided <= max(1, len(tokens) // 10), f"{where}: {undecided} rows too close to call"


def check_rows_are_independent(ops) -> None:
    """Every row of a batch gets the token that it gets alone, or in another place of another batch."""
    rng = np.random.default_rng([SEED, 1])
    arguments = sample("", 1001, rows=9, top_k=[0, 30, 5], top_p=[1, 0.9], min_p=[0, 0, 0.02, 0.1]).draw(rng)
    tokens = {}
    for rows in (np.arange(9), rng.permutation(9)[:4], *np.arange(9)[:, None]):
        picked = {name: ops.upload(np.ascontiguousarray(value[rows])) for name, value in arguments.items()}
        for row, token in zip(rows, ops.download(ops.sample(**picked)), strict=True):
            assert tokens.setdefault(row, token) == token, f"row {row} (CUPAGED_TEST_SEED={SEED})"


def sample_by_sorting(logits, temperature, top_k, top_p, min_p, seed, candidate, position) -> np.ndarray:
    """One row of `sample` in float64, by sorting: the token, and with it any that float32 arithmetic might draw instead.

    A token on the border of what is kept is one that might be drawn; of the kept, those are whose noised value comes near to
    the largest. Values count as known to 3e-7 of their magnitude, shares of a sum to 3e-6.
    """
    if temperature == 0:
        return np.flatnonzero(logits == logits.max())[:1]
    scaled = logits.astype(np.float64) / np.float64(temperature)
    order = np.argsort(-scaled, kind="stable")[: np.isfinite(scaled).sum()]  # the forbidden, -inf, are last
    ranked = scaled[order]
    sure = possible = len(ranked)  # so many of the ranked are surely kept, so many possibly
    if 0 < top_k < sure:
        border = ranked[top_k - 1]
        sure, possible = np.count_nonzero(ranked >= border), np.count_nonzero(ranked >= border - 3e-7 * abs(border))
    if top_p < 1:
        if sure < possible:
            return order  # the sum that top_p is a share of is not known
        weight = np.exp(ranked[:sure] - ranked[0])
        above = (np.cumsum(weight) - weight) / weight.sum()  # share of the tokens ranked above
        last = [np.flatnonzero(above < np.float64(top_p) + slack)[-1:] for slack in (-3e-6, 3e-6)]
        sure, possible = (np.count_nonzero(ranked[:sure] >= ranked[i[0]]) if len(i) else 1 for i in last)
    if min_p > 0:
        border, near = ranked[0] + np.log(np.float64(min_p)), 6e-7 * (1 + abs(ranked[0]))
        sure = min(sure, np.count_nonzero(ranked >= border + near))
        possible = min(possible, np.count_nonzero(ranked >= border - near))
    noise = gumbel(seed, candidate, position, len(logits))[order[:possible]]
    noised = ranked[:possible] + noise
    near = 6e-7 * (1 + abs(ranked[:possible]) + abs(noise))
    return order[:possible][noised + near >= (noised - near)[: max(sure, 1)].max()]


def gumbel(seed: int, candidate: int, position: int, vocab: int) -> np.ndarray:
    """The noise that `sample` defines for one row, float64 [vocab]."""
    quads = np.arange(-(-vocab // 4), dtype=np.uint64)
    words = philox([quads, int(position), int(candidate), 0], [int(seed) % 2**32, int(seed) >> 32])
    uniform = (np.stack(words, axis=1).ravel()[:vocab] // 512 + 0.5) / 2**23
    return -np.log(-np.log(uniform))


def philox(counter: list, key: list) -> list:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3) of integers below 2^32, or of uint64 arrays of them."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & 0xFFFFFFFF, (low >> 32) ^ c3 ^ k1, low & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


# ---- the cases ---------------------------------------------------------------------------------------------------------
CASES = [
    embedding(50, 576, picked=7),
    embedding(3, 33, picked=5),
    embedding(1, 33, picked=1),
    embedding(9, 40, picked=0),
    elementwise("add", ("x", "y"), 3, 576),
    elementwise("add", ("x", "y"), 5, 33),
    elementwise("add", ("x", "y"), 1, 1),
    elementwise("add", ("x", "y"), 0, 64),
    elementwise("swiglu", ("gate", "up"), 3, 1536),
    elementwise("swiglu", ("gate", "up"), 7, 33, scale=50.0),
    elementwise("swiglu", ("gate", "up"), 0, 64),
    rms_norm(4, 576),
    rms_norm(2, 4096, scale=200.0),
    rms_norm(3, 5, 64, eps=1e-6),
    rms_norm(7, 2, 128, scale=1e-3),
    rms_norm(3, 40),
    rms_norm(2, 33),
    rms_norm(1, 1),
    rms_norm(0, 64),
    linear(5, 64, 48),
    linear(3, 72, 33, bias=True),
    linear(1, 64, 100, dtype="float32"),
    linear(2, 64, 49, bias=True, dtype="float32"),
    linear(0, 64, 8, bias=True),
    *(rope(name, BATCHES[name], (9, 3), 64) for name in BATCHES),
    *(rope("edges", edges(n), (4, 2), 128, n) for n in (1, 2, 8, 32, 256)),
    rope("edges", edges(16), (3, 3), 64),
    rope("group 12", BATCHES["mixed"], (24, 2), 128),
    *(attention(name, BATCHES[name], (9, 3), 64) for name in BATCHES),
    *(attention("group", BATCHES["mixed"], heads, 128) for heads in ((2, 2), (3, 1), (8, 2), (7, 1), (8, 1), (9, 1), (24, 2))),
    *(attention("edges", edges(n), (4, 1), 64, n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    attention("edges", edges(64), (2, 2), 128, 64),
    *(attention(f"window {n}", BATCHES["mixed"], (4, 2), 64, window=n) for n in (1, 7, 16, 17, 1000)),
    attention("window across pages", edges(32), (4, 1), 128, 32, window=33),
    attention("shared pages", [(40, 1), (47, 1), (33, 2), (16, 1)], (6, 2), 64, shared=True),
    attention("sharp", BATCHES["mixed"], (4, 2), 64, spread=40.0),
    attention("padding rows", [(20, 1), (0, 1), (0, 2), (3, 1)], (4, 2), 64),
    attention("long", [(700, 1), (513, 2)], (3, 1), 64),
    penalise("some seen", 5, 1000, most_seen=70),
    penalise("all seen", 3, 257, most_seen=257),
    penalise("none seen", 2, 100, most_seen=0),
    forbid(4, 301, most=300),
    sample("greedy", 5003, temperature=0),
    sample("greedy among equals", 3001, temperature=0, round_to=4.0),
    sample("plain", 5003),
    sample("one token", 1),
    sample("tiny vocabulary", 7, rows=60, top_k=[1, 3, 6, 0], top_p=[0.9, 1, 0.5], min_p=[0.05, 0, 0, 0, 0.2]),
    sample("all but the least", 4, rows=60, scale=0.1, top_k=3),
    sample("zeros of both signs", 301, rows=6, scale=1e-3, round_to=1.0, temperature=[0, 1], top_k=[0, 5], top_p=[1, 1, 0.5]),
    sample("top_k", 5003, top_k=[1, 2, 40, 1000, 5002, 5003, 9999, 0]),
    sample("top_k among equals", 5003, top_k=[1, 2, 40, 300], round_to=0.5),
    sample("top_p", 5003, top_p=[0.001, 0.1, 0.5, 0.9, 0.95, 0.999]),
    sample("top_p among equals", 5003, top_p=[0.05, 0.1, 0.5, 0.9], round_to=0.5),
    sample("top_p beside a border", 8, rows=60, scale=1e-4, temperature=1, top_p=[0.5002, 0.4998, 0.2502, 0.8748]),
    sample("top_p nearly flat", 5003, top_p=[0.1, 0.5, 0.9], scale=0.01),
    sample("min_p", 5003, min_p=[0.01, 0.05, 0.2, 1.0]),
    sample("all together", 5003, rows=12, top_k=[50, 500, 0], top_p=[0.9, 0.5, 1, 0.95], min_p=[0, 0.02, 0.1]),
    sample("hot and cold", 1023, rows=6, temperature=[0.02, 0.1, 10.0, 0, 1e-4, 100.0], top_p=0.9),
    sample("forbidden", 1023, rows=6, forbidden=0.9, temperature=[0, 1], top_k=[0, 0, 5], top_p=[1, 0.9], min_p=[0, 0, 0.1]),
    sample("large vocabulary", 49153, rows=2, top_k=[50, 0], top_p=0.9, scale=2.0),
]
LARGE_CASES = [  # for a GPU: more rows than a grid has in y or z, long sequences, real vocabularies
    embedding(70001, 64, picked=66000),
    elementwise("add", ("x", "y"), 66000, 72),
    elementwise("swiglu", ("gate", "up"), 1000, 11008),
    rms_norm(66000, 128),
    rms_norm(300, 8192),
    linear(300, 4096, 1000, bias=True),
    linear(7, 2048, 32000, dtype="float32"),
    rope("66000 rows", [(66000, 66000)], (2, 1), 64),
    attention("long", [(5000, 1), (4097, 1), (1, 1), (3000, 7)], (32, 8), 128),
    attention("long prefill", [(1100, 1100), (5000, 65)], (9, 3), 64, 32),
    attention("66000 rows", [(10, 10)] * 6600, (2, 1), 64, 1),
    sample("128256 tokens", 128256, rows=40, top_k=[0, 50], top_p=[0.9, 0.95, 1], min_p=[0, 0.01]),
]
