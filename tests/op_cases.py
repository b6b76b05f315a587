"""What every implementation of the operations must do: inputs over odd shapes, held to `cupaged.ops.numpy` in float64.

A case draws the arguments of one operation. Arrays drawn in float64 stand for activations, weights and KV: they are rounded
to the 16-bit type under test first, so that the reference computes from the very same numbers. float16, float32 and integers
go as they are; what describes a batch, `index`, is drawn as the arguments of `ops.index`, and `qk_gains` as q_gain and k_gain.
Run by tests/test_ops_numpy.py (in float32), tests/emulator and tests/gpu.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np

from cupaged import attention as paged
from cupaged.ops import numpy as reference_ops
from cupaged.ops import staging

SEED = int(os.environ.get("CUPAGED_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
DTYPES = {name: np.dtype(name) for name in ("bfloat16", "float16", "float32")}
TOLERANCE = {"uint8": 0.0, "int32": 0.0, "bfloat16": 1e-2, "float16": 2e-3, "float32": 5e-5}
Arguments = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One call of the operation `op`, its arguments drawn by `draw(rng)`; those named in `writes` are changed in place."""

    op: str
    name: str
    draw: Callable[[np.random.Generator], Arguments] = field(repr=False)
    writes: tuple[str, ...] = ()
    kv: str | None = None  # 8-bit type that it appends
    gives: str | None = None  # the dtype of its result, where that is not the one under test
    fused: bool = False  # several operations in one: what lies between may be rounded to the type under test
    quantization: str | None = None  # of its weight

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def check(ops, case: Case, dtype: str) -> None:
    """Run the case on `ops` in the 16-bit type `dtype` and compare; raises AssertionError."""
    rng = np.random.default_rng([SEED, zlib.crc32(str(case).encode()), len(dtype)])
    arguments = {name: _rounded(value, DTYPES[dtype]) for name, value in case.draw(rng).items()}
    exact = {name: _exact(value) for name, value in arguments.items()}
    device = {name: ops.upload(value.copy()) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    if case.quantization:
        device["weight"] = ops.quantize(device["weight"], case.quantization)
        exact["weight"] = reference_ops.quantize(arguments.pop("weight"), case.quantization)
    result = call(ops, case.op, device)
    after = {name: ops.download(device[name]) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    where = f"{case} {dtype} (CUPAGED_TEST_SEED={SEED})"
    for name, value in after.items():
        if name not in case.writes:
            assert value.tobytes() == arguments[name].tobytes(), f"{where}: the argument {name} was changed"

    if case.op == "sample":
        assert str(result.dtype) == "int32", where
        check_tokens(ops.download(result), arguments, where)
        return
    expected = call(reference_ops, case.op, exact)
    if expected is None:
        assert result is None, where
    else:
        wanted = case.gives or arguments.get("dtype") or dtype
        assert str(result.dtype) == wanted, f"{where}: gives {result.dtype}, not {wanted}"
        tolerance = max(TOLERANCE[wanted], 3 * TOLERANCE[dtype] if case.fused else 0)
        check_close(ops.download(result), expected, f"{where}: the result", tolerance)
    if case.kv:
        check_codes(case.kv, dtype, arguments, after, where)
        return
    for name in case.writes:
        before, wrote = _exact(arguments[name]), exact[name]
        same = (wrote == before) | (np.isnan(before) & np.isnan(wrote))
        assert after[name][same].tobytes() == arguments[name][same].tobytes(), f"{where}: {name} was changed elsewhere"
        check_close(after[name][~same], wrote[~same], f"{where}: what was written to {name}")


def call(ops, op: str, arguments: Arguments) -> object:
    """The operation on arguments whose `index` is what `ops.index` takes, and whose q_gain and k_gain are its qk_gains."""
    made = {name: ops.index(**value) if name == "index" else value for name, value in arguments.items()}
    if "q_gain" in made:
        made["qk_gains"] = made.pop("q_gain"), made.pop("k_gain")
    return getattr(ops, op)(**made)


def check_close(out: np.ndarray, expected: np.ndarray, what: str, tolerance: float | None = None) -> None:
    """`out` is `expected` (float64) up to a tolerance, by default its dtype's, in the 2-norm of every row (the last axis)."""
    tolerance = TOLERANCE[str(out.dtype)] if tolerance is None else tolerance
    assert out.shape == expected.shape, f"{what}: shape {out.shape}, not {expected.shape}"
    infinite = np.isinf(expected)
    assert (out[infinite] == expected[infinite]).all(), f"{what}: infinities"
    difference = np.linalg.norm(np.where(infinite, 0, out.astype(np.float64)) - np.where(infinite, 0, expected), axis=-1)
    allowed = tolerance * np.linalg.norm(np.where(infinite, 0, expected), axis=-1)
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


def quantised(case: Case, kind: str) -> Case:
    """The same product with a weight of 8 or 4 bits: held to float64 on what that stands for."""
    return replace(case, name=f"{case.name} {kind}", quantization=kind)


def linear(rows: int, inner: int, outer: int, bias: bool = False, dtype: str | None = None) -> Case:
    def draw(rng):
        arguments = {"x": rng.standard_normal((rows, inner)), "weight": rng.standard_normal((outer, inner)), "dtype": dtype}
        return arguments | ({"bias": 10 * rng.standard_normal(outer)} if bias else {})

    return Case("linear", f"{rows}x{inner}x{outer} {'bias ' * bias}{dtype or ''}", draw)


def norm_linear(rows: int, inner: int, outer: int, scale: float = 1.0, bias: bool = False, dtype: str | None = None) -> Case:
    def draw(rng):
        arguments = _normalised(rng, rows, inner, scale) | {"weight": rng.standard_normal((outer, inner)), "dtype": dtype}
        return arguments | ({"bias": 10 * rng.standard_normal(outer)} if bias else {})

    return Case("norm_linear", f"{rows}x{inner}x{outer} times {scale} {'bias ' * bias}{dtype or ''}".rstrip(), draw, fused=True)


def norm_swiglu(rows: int, inner: int, ffn: int, scale: float = 1.0, bias: bool = False) -> Case:
    """Gate and up are of deviation `scale`."""

    def draw(rng):
        weight = scale / inner**0.5 * rng.standard_normal((2 * ffn, inner))
        arguments = _normalised(rng, rows, inner, 1.0) | {"weight": weight}
        return arguments | ({"bias": scale * rng.standard_normal(2 * ffn)} if bias else {})

    return Case("norm_swiglu", f"{rows}x{inner}x{ffn} times {scale} {'bias' * bias}".rstrip(), draw, fused=True)


def _normalised(rng, rows: int, inner: int, scale: float) -> Arguments:
    return {"x": scale * rng.standard_normal((rows, inner)), "gain": rng.standard_normal(inner), "eps": 1e-5}


def linear_add(rows: int, inner: int, outer: int, bias: bool = False) -> Case:
    def draw(rng):
        arguments = {"x": rng.standard_normal((rows, inner)), "weight": rng.standard_normal((outer, inner))}
        arguments |= {"residual": 10 * rng.standard_normal((rows, outer))}
        return arguments | ({"bias": 10 * rng.standard_normal(outer)} if bias else {})

    return Case("linear_add", f"{rows}x{inner}x{outer} {'bias' * bias}".rstrip(), draw, writes=("residual",))


def check_write(ops, monkeypatch) -> None:
    """`write` into arrays and into parts of them with gaps, in slices, leaves the rest as it was."""
    rng = np.random.default_rng([SEED, 3])
    monkeypatch.setattr(staging, "SLICE_BYTES", 3000)
    for shape, place in (
        ((5,), slice(None)),
        ((40, 64), slice(7, 31)),
        ((40, 64), slice(7, 7)),
        ((9, 2, 8, 33), (slice(None), 1)),
        ((1, 2, 8, 33), (slice(None), 0)),
        ((70, 2, 8), (slice(2, None), 1)),
    ):
        for dtype in (ops.DTYPES[0], "float32"):
            whole = rng.standard_normal(shape).astype(dtype)
            target, expected = ops.upload(whole.copy()), whole.copy()
            expected[place] = given = rng.standard_normal(whole[place].shape, np.float32)
            ops.write(target[place], given)
            assert ops.download(target).tobytes() == expected.tobytes(), f"{shape} {dtype} (CUPAGED_TEST_SEED={SEED})"
            ops.write(target[place], ops.upload(whole[place].copy()))
            assert ops.download(target).tobytes() == whole.tobytes(), f"{shape} {dtype} on the device"


# ---- weights of 8 and 4 bits -------------------------------------------------------------------------------------------
QUANTISED = ("int8", "fp8", "int4")
SHAPES_OF_QUANTISED = [(1, 32), (130, 96), (7, 128), (128, 576), (300, 64), (33, 1536)]  # groups of 32, 64 and 128


def draw_weights(rng, rows: int, inner: int) -> np.ndarray:
    """Of many magnitudes; some rows, groups or single weights are 0, some much larger than the rest, some groups all alike."""
    weights = rng.standard_normal((rows, inner)) * 2.0 ** rng.uniform(-12, 4, (rows, 1))
    weights[rng.random(weights.shape) < 0.01] *= 100
    weights[rng.random(rows) < 0.1] = 0
    weights[rng.integers(rows), : inner // 2] = 0
    weights[rng.integers(rows)] = rng.standard_normal()
    weights[rng.integers(rows), -32:] = -0.0
    return weights


def check_quantized(ops, kind: str, dtype: str, shape: tuple[int, int]) -> tuple[object, object]:
    """`quantize` and `dequantize` give what the NumPy operations give, bit for bit; returns both quantised matrices."""
    rng = np.random.default_rng([SEED, 5, *shape, len(dtype)])
    weights = draw_weights(rng, *shape).astype(DTYPES[dtype])
    made, expected = ops.quantize(ops.upload(weights), kind), reference_ops.quantize(weights, kind)
    where = f"{kind} {dtype} {shape} (CUPAGED_TEST_SEED={SEED})"
    assert (made.kind, made.shape) == (kind, shape), where
    exact = reference_ops.dequantize(expected, "float32")
    assert np.isfinite(exact).all(), where
    out = ops.download(ops.dequantize(made, dtype))
    assert out.dtype == DTYPES[dtype], where
    np.testing.assert_array_equal(out, exact.astype(DTYPES[dtype]), err_msg=where)
    first = shape[0] // 3
    for count in (shape[0] // 2, None):  # rows of it
        part = ops.download(ops.dequantize(made, dtype, first, count))
        np.testing.assert_array_equal(part, out[first : None if count is None else first + count], err_msg=where)
    return made, expected


def check_layout(ops, kind: str, dtype: str, shape: tuple[int, int]) -> None:
    """The order of codes and scales on a GPU, which other kernels read: that of the NumPy operations, rearranged."""
    made, expected = check_quantized(ops, kind, dtype, shape)
    rows, inner = shape
    codes, scales = ops.download(made.codes), ops.download(made.scales)
    assert made.codes.data.ptr % 256 == made.scales.data.ptr % 256 == 0
    if kind != "int4":
        place = np.arange(16)
        k = 2 * (place // 4) + 8 * (place % 2) + place % 4 // 2
        in_order = expected.codes.reshape(rows, -1, 16)[..., k].reshape(shape)
        assert codes.dtype == expected.codes.dtype
        np.testing.assert_array_equal(codes, in_order)
        np.testing.assert_array_equal(scales.view(np.uint16), expected.scales.view(np.uint16))
        return
    plain = np.stack([expected.codes & 15, expected.codes >> 4], axis=-1).reshape(rows, -1, 32).astype(np.uint32)
    words = np.zeros((*plain.shape[:2], 4), np.uint32)
    for word in range(4):
        for nibble in range(8):
            k = 16 * (nibble % 4 // 2) + 8 * (nibble % 4 % 2) + 2 * word + nibble // 4
            words[..., word] |= plain[..., k] << 4 * nibble
    assert (codes.shape, codes.dtype) == ((rows, inner // 2), np.uint8)
    np.testing.assert_array_equal(codes.view("<u4").reshape(words.shape), words)
    padded = np.zeros((-(-rows // 128) * 128, *expected.scales.shape[1:]), np.float16)
    padded[:rows] = expected.scales
    tiles = np.ascontiguousarray(padded.reshape(-1, 128, *expected.scales.shape[1:]).swapaxes(1, 2))
    assert scales.shape == tiles.shape
    np.testing.assert_array_equal(scales.view(np.uint16), tiles.view(np.uint16))


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


def attention(name, sequences, heads, head_dim, block_size=16, window=None, shared=False, spread=1.0, kv=None) -> Case:
    """`heads` is (num_heads, num_kv_heads); `spread` is the standard deviation of the scores; `kv` is an 8-bit type."""

    def draw(rng):
        pools, index = _split(draw_batch(rng, sequences, heads[1], head_dim, block_size, shared))
        q = spread * rng.standard_normal((index["q_indptr"][-1], heads[0], head_dim))
        if kv is not None:
            pools = _random_codes(rng, kv, np.isnan(pools["k_pool"]))
        return {"q": q, **pools, "index": index, "scale": 1 / math.sqrt(head_dim), "sliding_window": window}

    return Case("paged_attention", f"{name} {heads[0]}/{heads[1]}x{head_dim} p{block_size} {kv or ''}".rstrip(), draw)


def rope(name, sequences, heads, head_dim, block_size=16, kv=None, qk_norm=False) -> Case:
    """With `kv`, an 8-bit type, the magnitude of K and V varies from row to row, and some heads are 0."""

    def draw(rng):
        pools, index = _split(draw_batch(rng, sequences, heads[1], head_dim, block_size))
        rows = index["q_indptr"][-1]
        angle = np.arange(max(index["seq_lens"]) + 5)[:, None] * 10000.0 ** -np.linspace(0, 1, head_dim // 2, endpoint=False)
        for b, (length, new) in enumerate(sequences):  # nothing is in the slots to be written
            for position in range(length - new, length):
                page = index["page_indices"][index["page_indptr"][b] + position // block_size]
                pools["k_pool"][:, page, position % block_size] = np.nan
                pools["v_pool"][:, page, position % block_size] = np.nan
        k, v = rng.standard_normal((2, rows, heads[1], head_dim))
        if kv is not None:
            k *= 2.0 ** rng.uniform(-9, 9, (rows, heads[1], 1)) * (rng.random((rows, heads[1], 1)) < 0.9)
            v *= 2.0 ** rng.uniform(-9, 9, (rows, heads[1], 1)) * (rng.random((rows, heads[1], 1)) < 0.9)
            pools = _random_codes(rng, kv, np.isnan(pools["k_pool"]))
        arguments = {
            "qkv": np.concatenate([rng.standard_normal((rows, heads[0], head_dim)), k, v], axis=1),
            "rope_table": np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
            **pools,
            "index": index,
            "num_heads": heads[0],
        }
        if qk_norm:
            arguments |= {"q_gain": rng.standard_normal(head_dim), "k_gain": rng.standard_normal(head_dim), "eps": 1e-3}
        return arguments

    name = f"{name} {heads[0]}/{heads[1]}x{head_dim} p{block_size} {kv or ''} {'qk norm' * qk_norm}".rstrip()
    return Case("rope_append", name, draw, writes=("k_pool", "v_pool") + ("kv_scales",) * (kv == "int8"), kv=kv)


def check_padding_rows(ops, kv: str | None, qk_norm: bool) -> None:
    """`rope_append` of rows from q_indptr[B] on changes nothing, neither in the pools nor in what becomes of the other rows."""
    rng = np.random.default_rng([SEED, 4])
    case = rope("padding rows", [*BATCHES["mixed"], (20, 3)], (6, 2), 64, kv=kv, qk_norm=qk_norm)
    arguments = {name: _rounded(value, DTYPES[ops.DTYPES[0]]) for name, value in case.draw(rng).items()}
    rows = arguments["index"]["q_indptr"][-1]
    more = np.concatenate([arguments["qkv"], arguments["qkv"][:9]])  # so many that they would go to pages of others
    results = []
    for qkv in (arguments["qkv"], more):
        device = {
            name: ops.upload(value.copy()) if isinstance(value, np.ndarray) else value for name, value in arguments.items()
        }
        q = ops.download(call(ops, "rope_append", device | {"qkv": ops.upload(qkv)}))[:rows]
        written = [ops.download(device[name]) for name in ("k_pool", "v_pool", *["kv_scales"] * (kv is not None))]
        results.append([array.tobytes() for array in (q, *written)])
    assert results[0] == results[1], f"{kv} {qk_norm} (CUPAGED_TEST_SEED={SEED})"


def _split(batch: Arguments) -> tuple[Arguments, Arguments]:
    """(pools, the arguments of `ops.index`) of what `draw_batch` gives."""
    pools = {name: batch.pop(name) for name in ("k_pool", "v_pool")}
    return pools | {"kv_scales": None}, batch


# ---- KV of 8 bits ------------------------------------------------------------------------------------------------------
_CODE = np.arange(127)
E4M3 = np.where(
    _CODE < 8, _CODE * 2.0**-9, (8 + _CODE % 8) * 2.0 ** (_CODE // 8 - 10)
)  # values of the codes 0 .. 126; 127 is NaN


def _random_codes(rng, kv: str, unused: np.ndarray) -> Arguments:
    """Pools of codes and their scales; they mean NaN where `unused` [num_kv_heads, num_blocks, block_size, head_dim] is set."""
    if kv == "int8":
        scales = rng.uniform(0.01, 0.03, (*unused.shape[:-1], 2)).astype(np.float16)
        scales[unused[..., 0]] = np.nan
        pools = [rng.integers(-127, 128, unused.shape).astype(np.int8) for _ in range(2)]
    else:
        scales = rng.uniform(0.1, 0.9, (unused.shape[0], 2)).astype(np.float32)
        codes = (rng.integers(0, 80, (2, *unused.shape)) + 128 * rng.integers(0, 2, (2, *unused.shape))).astype(np.uint8)
        pools = [np.where(unused, np.uint8(127), x) for x in codes]
    return {"k_pool": pools[0], "v_pool": pools[1], "kv_scales": scales}


def check_codes(kv: str, dtype: str, arguments: Arguments, after: Arguments, where: str) -> None:
    """What `rope_append` left of K and V in pools of codes is what rounding may give, and nothing else has changed there.

    A code must lie between those of the exact value less and plus what float32 may be off by: nothing for what goes from 16
    bits to int8 as it is, V and a K at position 0, where every quotient is either on a border between codes or 2^-13 away from
    it; 2^-22 of its magnitude for other V, and of sqrt(a^2 + b^2) for a K that is the pair a, b turned (2^-20 of it, if it was
    normalised before). The same holds for int8's scales, and codes are held to the scale that was written.
    """
    pools, as_is = ({name: np.full(arguments["k_pool"].shape, np.nan) for name in ("k_pool", "v_pool")} for _ in range(2))
    exact = {name: _exact(value) for name, value in arguments.items()} | {"kv_scales": None}
    call(reference_ops, "rope_append", exact | pools)
    half = pools["k_pool"].shape[-1] // 2
    at_position_0 = np.tile(exact["rope_table"][:1], (len(exact["rope_table"]), 1))
    call(reference_ops, "rope_append", exact | as_is | {"rope_table": at_position_0})
    pair = np.hypot(pools["k_pool"][..., :half], pools["k_pool"][..., half:])
    exact_v = kv == "int8" and dtype != "float32"
    turned = 1.0 if not exact_v or "k_gain" in arguments else pools["k_pool"] != as_is["k_pool"]
    slack = {
        "k_pool": turned * np.concatenate([pair, pair], axis=-1),
        "v_pool": 0 * pair.repeat(2, -1) if exact_v else abs(pools["v_pool"]),
    }
    written = ~np.isnan(pools["v_pool"][..., 0])
    for which, (name, value) in enumerate(pools.items()):
        what = f"{where}: {name}"
        assert (after[name][~written] == arguments[name][~written]).all(), f"{what} was changed elsewhere"
        error = 2.0**-20 if name == "k_pool" and "k_gain" in arguments else 2.0**-22
        low, high = (value[written] + sign * error * slack[name][written] for sign in (-1, 1))
        codes = after[name][written]
        if kv == "int8":
            scale = after["kv_scales"][written][:, which]
            least, most = np.minimum(abs(low), abs(high)).max(-1), np.maximum(abs(low), abs(high)).max(-1)
            assert (scale >= _up_to_float16(least / 127)).all(), f"{what}: a scale is too small"
            assert (scale <= _up_to_float16(most / 127)).all(), f"{what}: a scale is too large"
            divisor = np.where(scale == 0, 1, scale.astype(np.float64))[:, None]
            low, high = (np.clip(np.rint(x / divisor), -127, 127) for x in (low, high))
        else:
            scale = arguments["kv_scales"][:, which].astype(np.float64)[np.nonzero(written)[0]]
            low, high = (_to_e4m3(x / scale[:, None]) for x in (low, high))
            assert (codes % 128 != 127).all(), f"{what}: NaN"
            codes = np.where(codes < 128, 1, -1) * E4M3[codes % 128]
        wrong = (codes < low) | (codes > high)
        assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} codes are wrong"
        unclear = np.count_nonzero(low != high)
        assert unclear <= max(3, codes.size // 500), f"{what}: {unclear} codes of {codes.size} were too close to call"
    if kv == "int8":
        same = after["kv_scales"][~written].tobytes() == arguments["kv_scales"][~written].tobytes()
        assert same, f"{where}: scales were changed elsewhere"


def _up_to_float16(x: np.ndarray) -> np.ndarray:
    """The least float16 that is no less than x >= 0."""
    nearest = x.astype(np.float16)
    return np.where(nearest < x, np.nextafter(nearest, np.float16(np.inf)), nearest)


def _to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest value of a float8_e4m3, the even one of two, 448 at most."""
    borders = (E4M3[1:] + E4M3[:-1]) / 2
    code = np.searchsorted(borders, abs(x))
    tie = (code < 126) & (abs(x) == borders[np.minimum(code, 125)]) & (code % 2 == 1)
    return np.copysign(E4M3[code + tie], x)


def check_large_pool(ops, make: Callable[[tuple[int, ...], np.dtype], object]) -> None:
    """K and V appended to pools of more than 2^32 bytes, 2^31 elements, made by `make`, are what attention then reads."""
    rng = np.random.default_rng([SEED, 2])
    rows, num_blocks, dtype = 40, 2**20 + 3, DTYPES["bfloat16"]
    drawn = rope("", [(rows, rows)], (4, 2), 64).draw(rng)
    index = drawn["index"] | {"page_indices": np.array([num_blocks - 1, 0, num_blocks // 2 + 1], np.int32)}
    inputs = {name: _rounded(drawn[name], dtype) for name in ("qkv", "rope_table")}
    pools = [make((2, num_blocks, 16, 64), dtype) for _ in range(2)]
    made = ops.index(**index)
    q = ops.rope_append(*map(ops.upload, inputs.values()), *pools, None, made, 4)
    out = ops.download(ops.paged_attention(q, *pools, None, made, 0.125))

    pools = [np.zeros((2, 3, 16, 64)) for _ in range(2)]
    made = reference_ops.index(**index | {"page_indices": np.arange(3)})
    q = reference_ops.rope_append(*map(_exact, inputs.values()), *pools, None, made, 4)
    expected = reference_ops.paged_attention(q, *pools, None, made, 0.125)
    check_close(out, expected, f"large pool (CUPAGED_TEST_SEED={SEED})")


def check_shared_prefix(ops, monkeypatch, dtype: str, kv: str | None) -> None:
    """A batch whose sequences begin with the same blocks, as if it were so large that reading those once pays."""
    planned = []

    def plan_cascade(*args, **kwargs):
        planned.append(args[-1])
        return original(*args, **kwargs)

    original, every = paged.plan_cascade, functools.partial(paged.shared_prefixes, only_if_it_pays=False)
    monkeypatch.setattr(paged, "plan_cascade", plan_cascade)
    monkeypatch.setattr(paged, "shared_prefixes", every)
    sequences = [
        (70, 1),
        (45, 2),
        (33, 1),
        (5, 5),
        (200, 30),
        (64, 1),
    ]  # the first three share 32 positions, so do the last two
    case = attention("shared prefix", sequences, (4, 2), 64, shared=True, kv=kv)
    check(ops, case, dtype)
    assert planned, "the shared prefixes were not found"


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


def bias(rows: int, vocab: int, most: int) -> Case:
    def draw(rng):
        counts = rng.integers(0, most + 1, rows)
        counts[0] = 0
        return {
            "logits": 3 * rng.standard_normal((rows, vocab), np.float32),
            "indptr": np.cumsum([0, *counts], dtype=np.int32),
            "token_ids": np.concatenate([rng.permutation(vocab)[:count] for count in counts]).astype(np.int32),
            "values": np.where(rng.random(counts.sum()) < 0.5, -np.inf, rng.standard_normal(counts.sum())).astype(np.float32),
        }

    return Case("bias", f"{rows}x{vocab}", draw, writes=("logits",))


def ranking(op: str, rows: int, vocab: int, count: int, round_to: float = 0.0) -> Case:
    """`largest`, `ranks` or `logprobs`; logits are multiples of `round_to` (then many are equal), some of them -inf."""

    def draw(rng):
        logits = 3 * rng.standard_normal((rows, vocab))
        if round_to:
            logits = np.round(logits / round_to) * round_to
        logits[rng.random(logits.shape) < 0.1 * (vocab > 1)] = -np.inf
        logits[:, rng.integers(vocab)] = 0.0
        if op == "largest":
            return {"logits": logits.astype(np.float32), "count": count}
        ids = rng.integers(0, vocab, (rows, count) if op == "logprobs" else rows).astype(np.int32)
        return {"logits": logits.astype(np.float32), "token_ids": ids}

    gives = "float32" if op == "logprobs" else "int32"
    return Case(op, f"{rows}x{vocab} {count} {'equals' if round_to else ''}".rstrip(), draw, gives=gives)


def copy_blocks(shape: tuple[int, ...], dtype: type, count: int) -> Case:
    def draw(rng):
        blocks = rng.permutation(shape[2])
        return {
            "pool": rng.integers(0, 100, shape).astype(dtype),
            "sources": rng.choice(blocks[count:], count).astype(np.int32),
            "targets": blocks[:count].astype(np.int32),
        }

    return Case("copy_blocks", f"{'x'.join(map(str, shape))} {np.dtype(dtype).name}", draw, writes=("pool",))


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
        # Probabilities, too, are float32: tokens whose logits differ by less than 2e-7 may tie.
        borders = [ranked[i[0]] if len(i) else ranked[0] for i in last]
        kept = ranked[:sure]
        sure, possible = np.count_nonzero(kept >= borders[0]), np.count_nonzero(kept >= borders[1] - 2e-7)
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
    norm_linear(5, 576, 48, scale=100.0),
    norm_linear(3, 72, 33, bias=True),
    norm_linear(1, 64, 100, dtype="float32"),
    norm_linear(0, 64, 8),
    norm_swiglu(3, 64, 1536),
    norm_swiglu(7, 40, 33, scale=50.0),
    norm_swiglu(2, 72, 15),
    norm_swiglu(1, 64, 24, scale=4.0),
    norm_swiglu(4, 64, 30, bias=True),
    norm_swiglu(0, 64, 16),
    linear_add(5, 64, 48),
    linear_add(1, 576, 33),
    linear_add(3, 72, 33, bias=True),
    linear_add(0, 64, 8, bias=True),
    *(
        quantised(case, kind)
        for kind in QUANTISED
        for case in (
            *(linear(5, 64, 48, bias=True), norm_linear(3, 576, 33, scale=100.0), norm_linear(1, 128, 300, dtype="float32")),
            *(norm_swiglu(3, 96, 30), linear_add(1, 1536, 130), linear_add(4, 64, 33, bias=True), linear(0, 64, 8)),
        )
    ),
    *(rope(name, BATCHES[name], (9, 3), 64) for name in BATCHES),
    *(rope("edges", edges(n), (4, 2), 128, n) for n in (1, 2, 8, 32, 256)),
    rope("edges", edges(16), (3, 3), 64),
    rope("group 12", BATCHES["mixed"], (24, 2), 128),
    *(rope(name, BATCHES[name], (9, 3), 64, kv=kv) for name in ("mixed", "prefill", "no rows") for kv in ("int8", "fp8")),
    *(rope("edges", edges(n), (4, 2), 128, n, kv=kv) for n in (1, 16, 256) for kv in ("int8", "fp8")),
    *(rope(name, BATCHES[name], (9, 3), 64, qk_norm=True) for name in ("one token", "mixed", "no rows")),
    *(rope("edges", edges(8), (5, 1), 128, 8, kv=kv, qk_norm=True) for kv in (None, "int8", "fp8")),
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
    *(attention(name, BATCHES[name], (4, 2), 64, kv=kv) for name in ("mixed", "prefill", "decodes") for kv in ("int8", "fp8")),
    *(attention("edges", edges(n), (8, 2), 128, n, window=9, kv=kv) for n in (1, 16, 64) for kv in ("int8", "fp8")),
    penalise("some seen", 5, 1000, most_seen=70),
    penalise("all seen", 3, 257, most_seen=257),
    penalise("none seen", 2, 100, most_seen=0),
    bias(4, 301, most=300),
    ranking("largest", 3, 5003, 9),
    ranking("largest", 4, 301, 301, round_to=1.0),
    ranking("largest", 1, 1, 1),
    ranking("largest", 2, 40, 0),
    ranking("ranks", 5, 1001, 1, round_to=0.5),
    ranking("ranks", 3, 1, 1),
    ranking("logprobs", 3, 5003, 7),
    ranking("logprobs", 2, 33, 90),
    ranking("logprobs", 0, 33, 2),
    copy_blocks((2, 3, 9, 4, 64), np.float32, 4),
    copy_blocks((1, 2, 40, 1, 128), np.uint8, 20),
    copy_blocks((2, 1, 5, 2, 2), np.float16, 0),
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
    *(quantised(norm_linear(7, 2048, 40000, dtype="float32"), kind) for kind in QUANTISED),
    *(quantised(linear_add(300, 11008, 4096), kind) for kind in QUANTISED),
    embedding(70001, 64, picked=66000),
    norm_swiglu(1000, 512, 11008),
    norm_linear(7, 2048, 32000, dtype="float32"),
    linear_add(300, 4096, 1000),
    rms_norm(66000, 128),
    rms_norm(300, 8192),
    linear(300, 4096, 1000, bias=True),
    linear(7, 2048, 32000, dtype="float32"),
    *(rope("66000 rows", [(66000, 66000)], (2, 1), 64, qk_norm=qk_norm) for qk_norm in (False, True)),
    attention("long", [(5000, 1), (4097, 1), (1, 1), (3000, 7)], (32, 8), 128),
    attention("long prefill", [(1100, 1100), (5000, 65)], (9, 3), 64, 32),
    attention("66000 rows", [(10, 10)] * 6600, (2, 1), 64, 1),
    sample("128256 tokens", 128256, rows=40, top_k=[0, 50], top_p=[0.9, 0.95, 1], min_p=[0, 0.01]),
]
