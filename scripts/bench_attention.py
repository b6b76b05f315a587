"""Paged attention of one layer beside the limits of the machine: a table, and attention_<gpu>.json under --output.

Every figure is the median of replays of a CUDA graph that runs over as many layers as exceed L2 several times, divided by their
number. Decode is held against the bytes a second that the better of plain reads and a ring of bulk copies reaches, prefill
against the largest matrix product; all limits are measured in the same run. Pages are permuted unless a row says otherwise,
values and permutations drawn fresh; two rows of every case are checked against float64. Where torch or FlashInfer can be
imported, what they take for the same work is a peer in the row; neither is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from cupaged.attention import SharedPrefix, grids_of_device, plan, plan_cascade, run, run_cascade
from cupaged.bench.limits import gpu_read_limits, gpu_seconds
from cupaged.cuda import jit
from cupaged.errors import DeviceError

HEAD_DIM, DTYPE = 128, "bfloat16"
REPLAYS = 15
KV_DTYPES = {"bf16": DTYPE, "fp8": "uint8", "int8": "int8"}
KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1 + 2 / HEAD_DIM}  # of an element, its scale included
BYTE_MASK = {"bf16": 0, "fp8": 0xBFBFBFBF, "int8": 0xFFFFFFFF}  # e4m3 without the exponents of 2 and more, NaN among them
SKEWED = tuple((round(16 * 2 ** (11 * k / 63)), 1) for k in range(64))
MIXED = ((2048, 2048), *((4096, 1),) * 63)


@dataclass(frozen=True)
class Case:
    """A batch of (length, query rows) sequences; its name is the issue's."""

    name: str
    heads: tuple[int, int]
    sequences: tuple[tuple[int, int], ...]
    block_size: int = 16
    kv: str = "bf16"
    identity: bool = False  # pages in the order of positions
    sm80: bool = False  # the mma.sync kernel for prefill too
    padded: bool = False  # K/V bytes count as if every sequence were as long as it is; the batch is padded to the longest
    shared: int = 0  # positions at the beginning whose pages are the same for all sequences
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} p{self.block_size} {self.kv}" + " sm80" * self.sm80 + self.note

    @property
    def compute_bound(self) -> bool:
        return self.name.startswith("prefill")


GQA, LLAMA2, LLAMA2_13B = (32, 8), (32, 32), (40, 40)
CASES = [
    Case("decode 32/32 1x8192", LLAMA2, ((8192, 1),)),
    Case("decode 32/32 8x8192", LLAMA2, ((8192, 1),) * 8),
    Case("decode 40/40 1x32768", LLAMA2_13B, ((32768, 1),)),
    Case("decode 32/8 1x8192", GQA, ((8192, 1),)),
    Case("decode 32/8 1x131072", GQA, ((131072, 1),)),
    Case("decode 32/8 8x8192", GQA, ((8192, 1),) * 8),
    Case("decode 32/8 64x1024", GQA, ((1024, 1),) * 64),
    Case("decode 32/8 64x4096", GQA, ((4096, 1),) * 64),
    Case("decode 32/8 64xskew", GQA, SKEWED),
    Case("decode 32/8 256x512", GQA, ((512, 1),) * 256),
    Case("decode 32/8 64x4096", GQA, ((4096, 1),) * 64, block_size=1),
    Case("decode 32/8 64x4096", GQA, ((4096, 1),) * 64, block_size=256, identity=True, note=" contiguous"),
    Case("decode 32/8 64x4096", GQA, ((4096, 1),) * 64, kv="fp8"),
    Case("decode 32/8 64x4096", GQA, ((4096, 1),) * 64, kv="int8"),
    Case("prefill 32/8 1x8192", GQA, ((8192, 8192),)),
    Case("prefill 32/8 8x1024", GQA, ((1024, 1024),) * 8),
    Case("prefill 32/8 1x32768", GQA, ((32768, 32768),)),
    Case("prefill 32/8 512+32256", GQA, ((32768, 512),)),
    Case("prefill 32/8 1x8192", GQA, ((8192, 8192),), sm80=True),
    Case("prefill 32/8 1x8192", GQA, ((8192, 8192),), kv="fp8"),
    Case("mixed 32/8 2048+63x4096", GQA, MIXED),
]
LONG = ((4096, 1),) * 64
ABLATION = [  # each remedy beside what it cures
    *(Case("page size: decode 32/8 64x4096", GQA, LONG, block_size=p) for p in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    Case("page size: decode 32/8 64x4096", GQA, LONG, block_size=256, identity=True, note=" contiguous"),
    Case("ragged grouping: decode 32/8 64xskew", GQA, SKEWED),
    Case("ragged grouping: decode 32/8 64xskew", GQA, SKEWED, padded=True, note=" padded to the longest"),
    *(Case(f"alignment: decode 32/8 64x{n}", GQA, ((n, 1),) * 64) for n in (4064, 4080, 4095, 4096, 4097)),
    *(Case("8-bit KV: decode 32/8 64x4096", GQA, LONG, kv=kv) for kv in ("bf16", "fp8", "int8")),
    Case("one launch: mixed 32/8 2048+63x4096", GQA, MIXED),
    *(Case(f"shared prefix: decode 32/8 64x4096, {n} shared", GQA, LONG, shared=n) for n in (64, 512, 2048, 4032)),
    *(Case(f"shared prefix: decode 32/8 {b}x1024, 960 shared", GQA, ((1024, 1),) * b, shared=960) for b in (2, 8, 64)),
]


@dataclass
class Drawn:
    """A case on the device, in as many layers as keep L2 from helping."""

    case: Case
    lengths: np.ndarray
    rows: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    qs: list
    outs: list
    pools: list
    scales: list
    kv_bytes: float
    flop: int
    plans: list = field(default_factory=list)

    @property
    def q_indptr(self) -> np.ndarray:
        return np.cumsum([0, *self.rows], dtype=np.int32)


class Bench:
    """The current device, its limits, and what is measured on it."""

    def __init__(self) -> None:
        self.cupy = jit.import_cupy()
        self.rng = np.random.default_rng()
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.attributes = self.cupy.cuda.Device().attributes
        self._fill = jit.kernel("limits.cu", "fill")

    def random(self, shape: tuple[int, ...], kv: str = "bf16"):
        """An array of random bfloat16 numbers of variance 1, or of codes of an 8-bit pool."""
        array = self.cupy.empty(shape, KV_DTYPES[kv])
        seed = np.uint32(self.rng.integers(2**32))
        self._fill((2048,), (256, 1, 1), (array, np.int64(array.nbytes // 4), seed, np.uint32(BYTE_MASK[kv])))
        return array

    def microseconds(self, launch, count: int) -> float:
        """Median time of launch(0) .. launch(count - 1), captured in a graph, divided by their number."""
        for i in range(count):
            launch(i)
        self.stream.synchronize()
        self.stream.begin_capture()
        for i in range(count):
            launch(i)
        graph = self.stream.end_capture()
        return self._median(lambda: graph.launch(self.stream)) / count

    def _median(self, action) -> float:
        with self.stream:
            return gpu_seconds(action, REPLAYS) * 1e6

    def product_limit(self) -> float | None:
        """Floating-point operations a second of an 8192^3 product by cuBLAS; None where that is not installed."""
        from cupaged.ops import cuda as ops

        a = self.random((8192, 8192))
        try:
            ops.linear(a, a)
            return 2 * 8192**3 * 1e6 / self._median(lambda: ops.linear(a, a))
        except DeviceError as error:
            print(f"no limit of products: {error}")
            return None

    def draw(self, case: Case) -> Drawn:
        lengths, rows = np.ascontiguousarray(self.rng.permutation(np.array(case.sequences, np.int32)).T)
        num_heads, num_kv_heads = case.heads
        kv_bytes = float(lengths.sum()) * num_kv_heads * HEAD_DIM * 2 * KV_BYTES[case.kv]
        flop = 4 * num_heads * HEAD_DIM * int((rows.astype(np.int64) * (2 * (lengths - rows) + rows + 1) // 2).sum())
        kv_bytes -= case.shared * (len(rows) - 1) * num_kv_heads * HEAD_DIM * 2 * KV_BYTES[case.kv]  # read once
        if case.padded:
            lengths = np.full_like(lengths, lengths.max())
        pages = -(-lengths // case.block_size)
        num_blocks, num_tokens = int(pages.sum()) + 1, int(rows.sum())
        order = np.arange(1, num_blocks, dtype=np.int32)
        if not case.identity:
            order = self.rng.permutation(order)
        layers = max(2, math.ceil(12 * self.attributes["L2CacheSize"] / kv_bytes))
        layer = (num_kv_heads, num_blocks, case.block_size, HEAD_DIM)
        pools = [(self.random(layer, case.kv), self.random(layer, case.kv)) for _ in range(layers)]
        qs = [self.random((num_tokens, num_heads, HEAD_DIM)) for _ in range(layers)]
        outs = [self.cupy.empty_like(q) for q in qs]
        for out in outs:
            out.data.memset_async(0xFF, out.nbytes, self.stream)  # NaN
        scales = [None] * layers
        if case.kv == "fp8":
            scales = [self.cupy.ones((num_kv_heads, 2), "float32")] * layers
        if case.kv == "int8":
            scales = [self.cupy.random.uniform(0.01, 0.02, (*layer[:3], 2), "float32").astype("float16") for _ in range(layers)]
        indptr = np.cumsum([0, *pages], dtype=np.int32)
        for first in indptr[1:-1]:
            order[first : first + case.shared // case.block_size] = order[: case.shared // case.block_size]
        return Drawn(case, lengths, rows, indptr, order, qs, outs, pools, scales, kv_bytes, flop)

    def planned(self, drawn: Drawn, chosen: slice = slice(None)):
        """A plan of the case, or of those of its sequences that are chosen."""
        case, grids = drawn.case, grids_of_device(HEAD_DIM, DTYPE, KV_DTYPES[drawn.case.kv])
        first, last, _ = chosen.indices(len(drawn.rows))
        rows, lengths = drawn.rows[first:last], drawn.lengths[first:last]
        return plan(
            np.cumsum([0, *rows], dtype=np.int32),
            lengths,
            drawn.page_indptr[first : last + 1] - drawn.page_indptr[first],
            drawn.page_indices[drawn.page_indptr[first] : drawn.page_indptr[last]],
            num_heads=case.heads[0],
            num_kv_heads=case.heads[1],
            block_size=case.block_size,
            num_blocks=drawn.pools[0][0].shape[1],
            decode_grid=grids[0],
            prefill_grid=grids[0] if case.sm80 else grids[1],
        )

    def measure(self, case: Case) -> dict:
        """One row of the result file, without its share; `bytes` and `flop` of one layer beside it."""
        drawn = self.draw(case)
        planned, times = self.planned(drawn), []
        for _ in range(9):
            start = time.perf_counter()
            self.planned(drawn)
            times.append(time.perf_counter() - start)
        plan_us = statistics.median(times) * 1e6

        def attend(i: int) -> None:
            run(planned, drawn.qs[i], *drawn.pools[i], out=drawn.outs[i], kv_scales=drawn.scales[i])

        layers, num_tokens = len(drawn.qs), int(drawn.rows.sum())
        us = self.microseconds(attend, layers)
        tokens = [0, num_tokens - 1] if num_tokens < 3 else [int(t) for t in self.rng.integers(num_tokens, size=2)]
        error = max(self.error(drawn, token) for token in tokens)
        start = time.perf_counter()
        for i in range(20):
            attend(i % layers)
        host_us = (time.perf_counter() - start) * 1e6 / 20
        self.stream.synchronize()
        print(f"    {layers} layers, {planned.grid.num_ctas} CTAs; host us: plan {plan_us:.0f}, run {host_us:.1f}", end="; ")
        print(f"error {error:.1e}")
        assert error < 1e-2, f"{case}: wrong by {error}"
        peers = {}
        if case.shared:
            peers |= self.cascaded(drawn)
        elif case.kv == "bf16" and not case.padded:
            peers |= self.gathered(drawn) | self.sdpa(drawn) | self.flashinfer(drawn)
        if case.name.startswith("one launch"):
            peers |= self.many_launches(drawn)
        row = {"case": str(case), "us": us, "bytes": drawn.kv_bytes, "flop": drawn.flop, "peers": peers}
        return row | {"host_us": {"plan": plan_us, "run": host_us}}

    def cascaded(self, drawn: Drawn) -> dict[str, float]:
        """What all sequences share attended once, as a level of its own."""
        case, grids = drawn.case, grids_of_device(HEAD_DIM, DTYPE)
        plans = plan_cascade(
            drawn.q_indptr,
            drawn.lengths,
            drawn.page_indptr,
            drawn.page_indices,
            [SharedPrefix(0, len(drawn.rows), case.shared // case.block_size)],
            num_heads=case.heads[0],
            num_kv_heads=case.heads[1],
            block_size=case.block_size,
            num_blocks=drawn.pools[0][0].shape[1],
            decode_grid=grids[0],
            prefill_grid=grids[1],
        )

        def attend(i: int) -> None:
            run_cascade(plans, drawn.qs[i], *drawn.pools[i], out=drawn.outs[i])

        us = self.microseconds(attend, len(drawn.qs))
        error = self.error(drawn, int(self.rng.integers(len(drawn.rows))))
        assert error < 1e-2, f"{case}: the cascade is wrong by {error}"
        return {"cascade": us}

    def error(self, drawn: Drawn, token: int) -> float:
        """||out - ref|| / ||ref|| of one token's last head in the last layer, against float64."""
        b = int(np.searchsorted(drawn.q_indptr, token, side="right")) - 1
        stop = int(drawn.lengths[b] - drawn.q_indptr[b + 1] + token + 1)
        pages = drawn.page_indices[drawn.page_indptr[b] :][: -(-stop // drawn.case.block_size)]
        pages = self.cupy.asarray(pages)

        def host(array) -> np.ndarray:
            return self.cupy.asnumpy(array.view(f"u{array.itemsize}")).view(array.dtype).astype(np.float64)

        def keys(pool, which: int) -> np.ndarray:
            codes = self.cupy.asnumpy(pool.view(f"u{pool.itemsize}")[-1].take(pages, axis=0)).reshape(-1, HEAD_DIM)[:stop]
            if drawn.case.kv == "fp8":
                return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            values = codes.view(pool.dtype).astype(np.float64)
            if drawn.case.kv == "int8":
                scales = host(drawn.scales[-1][-1].take(pages, axis=0)[..., which]).reshape(-1)[:stop]
                values *= scales[:, None]
            return values

        k, v = (keys(pool, which) for which, pool in enumerate(drawn.pools[-1]))
        query, result = host(drawn.qs[-1][token, -1:])[0], host(drawn.outs[-1][token, -1:])[0]
        weights = k @ query / math.sqrt(HEAD_DIM)
        weights = np.exp(weights - weights.max())
        expected = weights @ v / weights.sum()
        return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))

    # ---- the same work by others

    def gathered(self, drawn: Drawn) -> dict[str, float]:
        """Pages copied into a contiguous cache first, then our kernel on that."""
        case = drawn.case
        if case.compute_bound or not case.name.startswith("decode") or case.identity:
            return {}
        order = self.cupy.asarray(drawn.page_indices)
        identity = replace(drawn, page_indices=np.arange(len(drawn.page_indices), dtype=np.int32))
        shape = (case.heads[1], len(drawn.page_indices), case.block_size, HEAD_DIM)
        copies = [self.cupy.empty(shape, DTYPE) for _ in range(2)]
        identity.pools = [tuple(copies)]
        planned = self.planned(identity)

        def attend(i: int) -> None:
            for pool, copy in zip(drawn.pools[i], copies, strict=True):
                # 16-byte elements: CuPy's gather moves one element a thread
                self.cupy.take(pool.view("complex128"), order, axis=1, out=copy.view("complex128"))
            run(planned, drawn.qs[i], *copies, out=drawn.outs[i])

        return {"gather, then attend": self.microseconds(attend, min(2, len(drawn.qs)))}

    def many_launches(self, drawn: Drawn) -> dict[str, float]:
        """One launch for the prefill and one for the decodes; one launch for each sequence."""
        prefill = int(
            drawn.rows.argmax()
        )  # the batch was shuffled: launches of what comes before, of it, and of what comes after
        groups = [slice(0, prefill), slice(prefill, prefill + 1), slice(prefill + 1, len(drawn.rows))]
        one_each = [slice(b, b + 1) for b in range(len(drawn.rows))]
        found = {}
        for name, chosen in (("decodes and prefill apart", groups), ("one launch a sequence", one_each)):
            chosen = [part for part in chosen if part.stop > part.start]
            plans = [self.planned(drawn, part) for part in chosen]

            def attend(i: int, chosen=chosen, plans=plans) -> None:
                for part, planned in zip(chosen, plans, strict=True):
                    rows = slice(drawn.q_indptr[part.start], drawn.q_indptr[part.stop])
                    run(planned, drawn.qs[i][rows], *drawn.pools[i], out=drawn.outs[i][rows])

            found[name] = self.microseconds(attend, len(drawn.qs))
        return found

    def sdpa(self, drawn: Drawn) -> dict[str, float]:
        """torch's attention on a contiguous cache of the same size, the best of its backends; equal lengths only."""
        try:
            import torch
            from torch.nn.attention import SDPBackend, sdpa_kernel
        except ImportError:
            return {}
        case, length, rows = drawn.case, int(drawn.lengths[0]), int(drawn.rows[0])
        if (drawn.lengths != length).any() or (drawn.rows != rows).any() or rows not in (1, length):
            return {}
        batch, (num_heads, num_kv_heads), layers = len(drawn.rows), case.heads, len(drawn.qs)
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        q = torch.randn(batch, num_heads, rows, HEAD_DIM, **make)
        kv = [torch.randn(2, batch, num_kv_heads, length, HEAD_DIM, **make) for _ in range(layers)]
        attention = torch.nn.functional.scaled_dot_product_attention
        arguments = {"is_causal": rows > 1, "enable_gqa": num_heads != num_kv_heads}

        def attend(i: int) -> None:
            attention(q, kv[i][0], kv[i][1], **arguments)

        best = {}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            # a backend that cannot do it raises, and is no peer
            with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
                best[backend.name] = self._torch_microseconds(attend, layers)
        if not best:
            return {}
        name = min(best, key=best.get)
        return {f"torch {torch.__version__.split('+')[0]} {name}, contiguous": best[name]}

    def flashinfer(self, drawn: Drawn) -> dict[str, float]:
        """FlashInfer on the same page tables; its pools are [num_blocks, block_size, num_kv_heads, head_dim]."""
        try:
            import flashinfer
            import torch
        except ImportError:
            return {}
        case, layers = drawn.case, len(drawn.qs)
        num_heads, num_kv_heads = case.heads
        shape = (drawn.pools[0][0].shape[1], 2, case.block_size, num_kv_heads, HEAD_DIM)
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        pools = [torch.randn(shape, **make) for _ in range(layers)]
        q = torch.randn(int(drawn.rows.sum()), num_heads, HEAD_DIM, **make)
        workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        indptr, indices, rows = (
            torch.from_numpy(array).cuda() for array in (drawn.page_indptr, drawn.page_indices, drawn.q_indptr)
        )
        last = torch.from_numpy((drawn.lengths - 1) % case.block_size + 1).cuda()
        best = {}
        with contextlib.suppress(RuntimeError, ValueError):
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
            sizes = (num_heads, num_kv_heads, HEAD_DIM, case.block_size)
            wrapper.plan(rows, indptr, indices, last, *sizes, causal=True, q_data_type=torch.bfloat16)
            best["prefill"] = self._torch_microseconds(lambda i, wrapper=wrapper: wrapper.run(q, pools[i]), layers)
        if max(drawn.rows) == 1:
            for tensor_cores in (False, True):
                with contextlib.suppress(RuntimeError, ValueError):
                    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
                    wrapper.plan(indptr, indices, last, *sizes, q_data_type=torch.bfloat16)
                    best[f"decode{tensor_cores}"] = self._torch_microseconds(
                        lambda i, wrapper=wrapper: wrapper.run(q, pools[i]), layers
                    )
        return {f"flashinfer {flashinfer.__version__}": min(best.values())} if best else {}

    def _torch_microseconds(self, launch, count: int) -> float:
        """As `microseconds`, for what queues on torch's current stream."""
        import torch

        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for i in range(count):
                launch(i)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(count):
                    launch(i)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 3)]
            for event in events:
                event.record(stream)
                graph.replay()
            stream.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events[2:])) * 1e3 / count


def finished(row: dict, bytes_per_s: float, flop_per_s: float | None) -> dict:
    """The row as it is saved, with its speed and its share of the limit that it is held to."""
    kv_bytes, flop, seconds = row.pop("bytes"), row.pop("flop"), row["us"] / 1e6
    row["flop_per_byte"] = flop / kv_bytes
    if row["case"].startswith("prefill"):
        row["tflop_s"] = flop / seconds / 1e12
        row["share"] = flop / seconds / flop_per_s if flop_per_s else None
    else:
        row["tb_s"] = kv_bytes / seconds / 1e12
        row["share"] = kv_bytes / seconds / bytes_per_s
    return row


def line(row: dict) -> str:
    """One line of the table."""
    speed = f"{row['tflop_s']:6.0f} TFLOP/s" if "tflop_s" in row else f"{row['tb_s']:6.2f} TB/s   "
    share = f"{row['share']:5.0%} of the limit" if row["share"] else ""
    peers = "  ".join(f"{name}: {us:.1f}" for name, us in row["peers"].items())
    return f"{row['case']:52}{row['us']:9.1f} us {speed} {share}  {peers}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"), help="folder for the result file")
    parser.add_argument("--only", default="", help="measure the cases whose name holds this")
    parser.add_argument("--ablate", action="store_true", help="a row for each remedy instead: page size, ragged grouping, ...")
    args = parser.parse_args()
    cases = [case for case in (ABLATION if args.ablate else CASES) if args.only in str(case)]
    if not cases:
        print(f"no case holds {args.only!r}; there are: {', '.join(map(str, CASES))}", file=sys.stderr)
        return 1
    try:
        jit.check_device(0)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    started = time.perf_counter()
    bench = Bench()
    machine = bench.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    with bench.stream:
        limits, flop_per_s = gpu_read_limits(), bench.product_limit()
        bytes_per_s = max(limits.values())
        ways = ", ".join(f"{way} {value / 1e12:.2f}" for way, value in limits.items())
        print(f"{machine}: read limit {ways} TB/s, products {(flop_per_s or 0) / 1e12:.0f} TFLOP/s")
        rows = []
        for case in cases:
            bench.cupy.get_default_memory_pool().free_all_blocks()
            rows.append(finished(bench.measure(case), bytes_per_s, flop_per_s))
            print(line(rows[-1]), flush=True)
        again = max(gpu_read_limits().values())
    if again > bytes_per_s * 1.01:
        print(f"read limit once more: {again / 1e12:.2f} TB/s; the shares above are to the first")
    result = {
        "machine": machine,
        "limit_tbps": bytes_per_s / 1e12,
        "limit_tflops": flop_per_s / 1e12 if flop_per_s else None,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    name = "attention_ablation" if args.ablate else "attention"
    path = Path(args.output) / f"{name}_{machine.removeprefix('NVIDIA ').split()[0].lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{path} in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
