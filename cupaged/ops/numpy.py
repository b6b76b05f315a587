"""The operations of a Llama step in NumPy, float32: the specification that `ops.cuda` is held to.

Arrays are float32 unless a docstring says otherwise; ids, lengths and positions are int32. `T` is the number of
query rows of a step (the new tokens of all sequences, concatenated), `B` the number of sequences. A batch is
described by an `Index` of four arrays, made once a step and shared by all operations and layers:

    q_indptr     [B+1]  rows q_indptr[b] .. q_indptr[b+1] belong to sequence b
    seq_lens     [B]    tokens of sequence b whose K/V are in the pool once this step's are appended
    page_indptr  [B+1]  its page table is page_indices[page_indptr[b] : page_indptr[b+1]]
    page_indices [nnz]  physical block ids in logical order

Row r of a sequence with n rows sits at position `seq_len - n + r`.

A pool view of one layer is `[num_kv_heads, num_blocks, block_size, head_dim]`, of K and V alike, and its dtype says how they
are kept there:

    int8     code * scale, with a scale for each token and head: kv_scales float16 [num_kv_heads, num_blocks, block_size, 2],
             for K and V. `rope_append` writes the least float16 that is no less than (largest magnitude in the head) / 127, and
             x / scale rounded to the nearest, ties to even
    uint8    "fp8": the bits of a float8_e4m3 (Micikevicius et al. 2022, section 3), times a scale for each head: kv_scales
             float32 [num_kv_heads, 2], which `rope_append` only reads; more than 448 * scale is kept as that
    another  the value itself, rounded to this type; kv_scales is None
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import psutil

from cupaged.ops import quantized
from cupaged.ops.quantized import QuantizedMatrix, dequantize, quantize  # noqa: F401  (operations like those below)

DTYPES = ("float32",)
KV_DTYPES = ("bfloat16", "float16", "fp8", "int8")  # of a pool, beside that of the activations
_QUERY_TILE = 128  # query rows whose scores are in memory at once


def device(index: int = 0) -> contextlib.AbstractContextManager:
    """Context in which the operations run; on the CPU there is nothing to enter."""
    return contextlib.nullcontext()


def compiling(
    dtype: str, kv_dtype: str, head_dim: int, block_size: int, qk_norm: bool, also: Sequence = ()
) -> contextlib.AbstractContextManager:
    """Context beside whose body a model's operations are compiled; here there is nothing to compile."""
    return contextlib.nullcontext()


def variants_of_weights(kinds: Iterable[str], dtype: str) -> list:
    """What `compiling` takes more for matrices of kinds that `quantize` knows; here nothing."""
    return []


def check() -> None:
    """DeviceError if an operation that is over has failed without a word, as a device may; here none does."""


def free_memory() -> tuple[int, int]:
    """(free, total) bytes of the device's memory."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def upload(array: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """The host array as a device array, converted to `dtype` if one is given; shares memory where nothing changes."""
    return np.ascontiguousarray(array, None if dtype is None else np.dtype(dtype))


def write(target: np.ndarray, array: np.ndarray) -> None:
    """Put an array of the host or the device into a device array of its shape, converted to the type there.

    `target` may be a part of another array whose rows (everything behind the first axis) have gaps between them.
    """
    target[...] = array


def repeat(pattern: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A device array of `dtype` filled with a host array's elements, over and over."""
    return np.resize(pattern.astype(dtype), shape)


def download(array: np.ndarray) -> np.ndarray:
    """The device array as a host array (waits for the device)."""
    return array


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised device array."""
    return np.empty(shape, dtype)


def embedding(token_ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rows of `table` [num_rows, width] by id [T] -> [T, width]; also used to pick the rows whose logits are wanted."""
    return table[token_ids]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, eq. 4); any leading axes."""
    return x * (1.0 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))) * weight


Weight = np.ndarray | QuantizedMatrix  # [out, in]


def linear(x: np.ndarray, weight: Weight, bias: np.ndarray | None = None, dtype: str | None = None) -> np.ndarray:
    """x [T, in] times weight [out, in] transposed, plus bias [out] -> [T, out], in `dtype` (default: that of x)."""
    out = quantized.product(x, weight) if isinstance(weight, QuantizedMatrix) else x @ weight.T
    return out if bias is None else out + bias


def norm_linear(
    x: np.ndarray, gain: np.ndarray, eps: float, weight: Weight, bias: np.ndarray | None = None, dtype: str | None = None
) -> np.ndarray:
    """linear(rms_norm(x, gain, eps), weight, bias, dtype) of x [T, in], gain [in], weight [out, in], bias [out] -> [T, out]."""
    return linear(rms_norm(x, gain, eps), weight, bias, dtype)


def norm_swiglu(x: np.ndarray, gain: np.ndarray, eps: float, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
    """silu(gate) * up, both `norm_linear` of x [T, in] (Shazeer 2020, "GLU Variants Improve Transformer") -> [T, ffn].

    weight [2 * ffn, in] and bias [2 * ffn] hold 8 rows of the gate, then the same 8 of up, by turns: rows 16 j .. 16 j + 7 are
    gate's 8 j .. 8 j + 7, and rows 16 j + 8 .. 16 j + 15 are up's. Where 8 does not divide ffn, the last group is r < 8 rows
    of the gate, then r of up. So what is multiplied in the end is computed side by side.
    """
    gate, up = _taken_apart(norm_linear(x, gain, eps, weight, bias))
    with np.errstate(over="ignore"):  # exp(-gate) may be inf: the quotient is then 0, as it should be
        return gate / (1 + np.exp(-gate)) * up


def _taken_apart(both: np.ndarray) -> np.ndarray:
    """Gate and up, [2, T, ffn], of [T, 2 * ffn] that holds 8 of each by turns."""
    rows, ffn = both.shape[0], both.shape[1] // 2
    whole = ffn // 8 * 8
    groups = both[:, : 2 * whole].reshape(rows, ffn // 8, 2, 8).transpose(2, 0, 1, 3).reshape(2, rows, whole)
    last = both[:, 2 * whole :].reshape(rows, 2, ffn - whole).swapaxes(0, 1)
    return np.concatenate([groups, last], axis=-1)


def linear_add(x: np.ndarray, weight: Weight, residual: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """residual [T, out] + x [T, in] times weight [out, in] transposed, plus bias [out] -> [T, out].

    `residual` is overwritten by the result, which is returned.
    """
    residual += linear(x, weight, bias)
    return residual


@dataclass(frozen=True, eq=False)
class Index:
    """The batch of one step, as the module's docstring says."""

    q_indptr: np.ndarray
    seq_lens: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray


def index(q_indptr: np.ndarray, seq_lens: np.ndarray, page_indptr: np.ndarray, page_indices: np.ndarray) -> Index:
    """What `rope_append` and `paged_attention` take to know a batch by, from host arrays of int32."""
    return Index(q_indptr, seq_lens, page_indptr, page_indices)


def rope_append(
    qkv: np.ndarray,
    rope_table: np.ndarray,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    kv_scales: np.ndarray | None,
    index: Index,
    num_heads: int,
    qk_gains: tuple[np.ndarray, np.ndarray] | None = None,
    eps: float = 0.0,
) -> np.ndarray:
    """Rotate q and k by their positions, append k and v to the pool, return the rotated q [T, num_heads, head_dim].

    qkv [T, num_heads + 2 * num_kv_heads, head_dim] holds the heads of q, then k's, then v's; rope_table [max_positions,
    head_dim] float32, cosines in the first half of a row and sines in the second; pools (and int8's kv_scales) of one layer,
    written at the rows' slots. Element i is paired with i + head_dim / 2 (Su et al. 2021, in the layout of Hugging Face
    checkpoints). With qk_gains, two of [head_dim], every head of q and k goes through `rms_norm` with them and eps first.

    Rows from q_indptr[B] on belong to no sequence: nothing is appended for them, and what is returned for them is undefined.
    """
    num_kv_heads = k_pool.shape[0]
    q, k, v = np.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    if qk_gains is not None:
        q, k = rms_norm(q, qk_gains[0], eps), rms_norm(k, qk_gains[1], eps)
    positions = np.zeros(len(qkv), np.int64)
    for b, seq_len in enumerate(index.seq_lens):
        rows = slice(index.q_indptr[b], index.q_indptr[b + 1])
        position = positions[rows] = np.arange(seq_len - (rows.stop - rows.start), seq_len)
        block, slot = np.divmod(position, k_pool.shape[2])
        page = index.page_indices[index.page_indptr[b] + block]
        for which, (pool, x) in enumerate([(k_pool, _rotate(k[rows], rope_table[position])), (v_pool, v[rows])]):
            x = x.swapaxes(0, 1)  # [num_kv_heads, rows, head_dim]
            if pool.dtype == np.int8:
                x, kv_scales[:, page, slot, which] = quantized.to_int8(x)
            elif pool.dtype == np.uint8:
                x = quantized.to_fp8(x, kv_scales[:, which, None, None])
            pool[:, page, slot] = x
    return _rotate(q, rope_table[positions])


def _rotate(x: np.ndarray, rope_rows: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    cos, sin = rope_rows[:, None, :half], rope_rows[:, None, half:]
    lower, upper = x[..., :half], x[..., half:]
    return np.concatenate([lower * cos - upper * sin, upper * cos + lower * sin], axis=-1)


def _values(pages: np.ndarray, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """What pages of a pool [num_kv_heads, pages, block_size, head_dim] hold; int8's scales are those of these pages."""
    if pages.dtype == np.int8:
        with np.errstate(invalid="ignore"):  # in slots that nobody has written
            return pages.astype(dtype) * scales[..., None]
    if pages.dtype == np.uint8:
        return quantized.of_fp8(pages, dtype) * scales[:, None, None, None]
    return pages.astype(dtype, copy=False)


def copy_blocks(pool: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
    """Copy blocks within a pool [num_layers, num_kv_heads, num_blocks, ...] of all layers and heads, in place.

    sources, targets int32 [n]; the targets are distinct and none of them is a source. A block's bytes are a multiple of 4.
    """
    pool[:, :, targets] = pool[:, :, sources]


def paged_attention(
    q: np.ndarray,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    kv_scales: np.ndarray | None,
    index: Index,
    scale: float,
    sliding_window: int | None = None,
) -> np.ndarray:
    """Causal attention of every row over its own sequence, K and V read through the page table.

    q [T, num_heads, head_dim] -> out of the same shape; pools of one layer. The row at position p attends to
    positions max(0, p - sliding_window + 1) .. p; a row with nothing to attend to gives 0. Nothing outside a
    sequence (other blocks, slots past seq_len) reaches the result.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, _, block_size, _ = k_pool.shape
    out = np.zeros_like(q)
    for b, seq_len in enumerate(index.seq_lens):
        first, last = index.q_indptr[b], index.q_indptr[b + 1]
        pages = index.page_indices[index.page_indptr[b] : index.page_indptr[b] + -(-seq_len // block_size)]
        if len(pages) > 0 and np.array_equal(pages, np.arange(pages[0], pages[0] + len(pages))):
            pages = slice(pages[0], pages[0] + len(pages))  # a view, where indexing by a list would copy
        scales = (None, None)
        if kv_scales is not None:
            of_pages = kv_scales[:, pages] if k_pool.dtype == np.int8 else kv_scales
            scales = (of_pages[..., 0], of_pages[..., 1])
        k, v = (
            _values(pool[:, pages], of, q.dtype).reshape(num_kv_heads, -1, head_dim)
            for pool, of in zip((k_pool, v_pool), scales, strict=True)
        )
        for row in range(first, last, _QUERY_TILE):
            rows = slice(row, min(row + _QUERY_TILE, last))
            n = rows.stop - rows.start
            position = np.arange(n) + (seq_len - (last - row))
            start = 0 if sliding_window is None else max(0, position[0] - sliding_window + 1)
            stop = position[-1] + 1
            if stop <= 0:
                continue
            group = q[rows].reshape(n, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
            scores = (group @ k[:, start:stop].swapaxes(1, 2) * np.float32(scale)).reshape(num_kv_heads, -1, n, stop - start)
            if n > 1:
                distance = position[:, None] - np.arange(start, stop)
                hidden = distance < 0
                if sliding_window is not None:
                    hidden |= distance >= sliding_window
                scores = np.where(hidden, np.float32(-np.inf), scores)
            weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            group = weight.reshape(num_kv_heads, -1, stop - start) @ v[:, start:stop]
            out[rows] = group.reshape(num_kv_heads, -1, n, head_dim).transpose(2, 0, 1, 3).reshape(n, num_heads, head_dim)
    return out


def penalise(
    logits: np.ndarray,
    seen_indptr: np.ndarray,
    seen_ids: np.ndarray,
    seen_counts: np.ndarray,
    repetition_penalty: np.ndarray,
    presence_penalty: np.ndarray,
    frequency_penalty: np.ndarray,
) -> None:
    """Lower the logits [B, vocab] of tokens that have occurred, in place.

    seen_ids[seen_indptr[b] : seen_indptr[b+1]] are the distinct tokens of sequence b, prompt included, and
    seen_counts how often each was generated (0: only in the prompt). Of a seen token the logit is divided by
    repetition_penalty[b] if positive, else multiplied by it (Keskar et al. 2019, section 4.1); of a generated one,
    presence_penalty[b] + seen_count * frequency_penalty[b] is then subtracted. The penalties are float32 [B].
    """
    for b in range(len(logits)):
        seen = slice(seen_indptr[b], seen_indptr[b + 1])
        ids, counts = seen_ids[seen], seen_counts[seen].astype(np.float32)
        value = logits[b, ids]
        value = np.where(value > 0, value / repetition_penalty[b], value * repetition_penalty[b])
        logits[b, ids] = value - np.where(counts > 0, presence_penalty[b] + counts * frequency_penalty[b], 0)


def bias(logits: np.ndarray, indptr: np.ndarray, token_ids: np.ndarray, values: np.ndarray) -> None:
    """Add values[i] to logits[b, token_ids[i]] for the i from indptr[b] to indptr[b+1], in place; -inf forbids a token.

    The ids of a row are distinct; values are float32.
    """
    for b in range(len(logits)):
        mine = slice(indptr[b], indptr[b + 1])
        logits[b, token_ids[mine]] += values[mine]


def sample(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    candidate: np.ndarray,
    position: np.ndarray,
) -> np.ndarray:
    """One token id per row of float32 logits [B, vocab] -> int32 [B]; a row's token depends on nothing but the row's arguments.

    temperature 0 takes the largest logit (the lowest id among equals). Otherwise, of p = softmax(logits / temperature):

    1. top_k (0: off) keeps the k most probable tokens, and all that tie with the last of them;
    2. top_p (1: off) keeps, of those renormalised, the fewest most probable whose sum reaches top_p, and ties of the last
       (Holtzman et al. 2020, section 3.1);
    3. min_p (0: off) keeps those with at least min_p times the largest probability (Nguyen et al. 2024);
    4. of what is left the token with the largest logits / temperature + Gumbel noise is drawn.

    The noise of token t is -log(-log(u)) with u word t % 4 of Philox4x32-10 (Salmon et al. 2011) under the key
    seed[b] (uint64) and the counter (t // 4, position, candidate, 0); a word w gives u = (w // 512 + 0.5) / 2^23.
    temperature, top_p, min_p are float32 [B]; top_k, candidate, position int32 [B].
    """
    tokens = np.empty(len(logits), np.int32)
    for b, row in enumerate(logits):
        if temperature[b] == 0:
            tokens[b] = row.argmax()
            continue
        scaled = row / temperature[b]
        kept = np.arange(len(row))
        if 0 < top_k[b] < len(row):
            kept = kept[scaled >= np.partition(scaled, -top_k[b])[-top_k[b]]]
        if top_p[b] < 1:
            weight = np.exp(scaled[kept] - scaled[kept].max())
            order = np.argsort(-weight, kind="stable")
            total = np.cumsum(weight[order], dtype=np.float64)  # a float32 sum of 10^5 terms would move the border
            last = min(np.searchsorted(total, top_p[b] * total[-1]), len(kept) - 1)
            kept = kept[weight >= weight[order[last]]]
        if min_p[b] > 0:
            kept = kept[np.exp(scaled[kept] - scaled[kept].max()) >= min_p[b]]
        word = _philox(seed[b], kept // 4, position[b], candidate[b])[np.arange(len(kept)), kept % 4]
        uniform = (np.float32(word >> 9) + np.float32(0.5)) * np.float32(2**-23)
        tokens[b] = kept[np.argmax(scaled[kept] - np.log(-np.log(uniform)))]
    return tokens


def largest(logits: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the `count` largest logits [R, vocab] of each row, largest first, the lowest id among equals: int32."""
    ids = np.empty((len(logits), count), np.int32)
    for row, best in zip(logits, ids, strict=True):
        if count:
            found = np.flatnonzero(row >= np.partition(row, -count)[-count])
            best[:] = found[np.argsort(-row[found], kind="stable")[:count]]
    return ids


def ranks(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """1 + how many logits of row r are larger than that of its token: int32 [R] for logits [R, vocab], token_ids int32 [R]."""
    own = logits[np.arange(len(logits)), token_ids]
    return 1 + np.count_nonzero(logits > own[:, None], axis=1).astype(np.int32)


def logprobs(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """log(softmax(logits)), natural, of each row's tokens: float32 [R, n] for logits [R, vocab], token_ids int32 [R, n]."""
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, keepdims=True)
    return np.take_along_axis(logits, token_ids, axis=1) - top - np.log(total)


def _philox(seed: np.uint64, counter0: np.ndarray, counter1: int, counter2: int) -> np.ndarray:
    """Philox4x32-10: uint32 [n, 4] for the n counters (counter0, counter1, counter2, 0) under the 64-bit key `seed`."""
    key0, key1 = np.uint32(int(seed) & 0xFFFFFFFF), np.uint32(int(seed) >> 32)
    c0 = counter0.astype(np.uint32)
    c1, c2, c3 = np.full_like(c0, counter1), np.full_like(c0, counter2), np.zeros_like(c0)
    with np.errstate(over="ignore"):
        for _ in range(10):
            low = c0.astype(np.uint64) * np.uint64(0xD2511F53)
            high = c2.astype(np.uint64) * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (
                (high >> np.uint64(32)).astype(np.uint32) ^ c1 ^ key0,
                high.astype(np.uint32),
                (low >> np.uint64(32)).astype(np.uint32) ^ c3 ^ key1,
                low.astype(np.uint32),
            )
            key0, key1 = key0 + np.uint32(0x9E3779B9), key1 + np.uint32(0xBB67AE85)
    return np.stack([c0, c1, c2, c3], axis=1)
