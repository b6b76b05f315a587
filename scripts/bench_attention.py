"""Paged attention of one layer beside the limits of the machine: a table, and attention_<gpu>.json under --output.

Every figure is the median of replays of a CUDA graph that runs over as many layers as exceed L2 several times, divided by their
number. Decode is held against the bytes of K/V a second that plain reads reach, prefill against the largest matrix product;
both limits are measured in the same run. Pages are permuted, values and permutations drawn fresh; two rows of every case are
checked against float64.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from cupaged.attention import kernel as attention
from cupaged.attention import plan
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.ops import cuda as ops

HEAD_DIM, BLOCK_SIZE, DTYPE = 128, 16, "bfloat16"
REPLAYS = 15
SOURCE = r"""
// Uniform bfloat16 numbers of variance 1, two to a word.
extern "C" __global__ void fill(unsigned* words, long long count, unsigned seed) {
  for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    unsigned h = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32) ^ seed, pair[2];
    for (int j = 0; j < 2; j++) {
      h ^= h >> 16; h *= 0x7feb352du; h ^= h >> 15; h *= 0x846ca68bu; h ^= h >> 16;  // Wellons, "lowbias32"
      pair[j] = __float_as_uint((h * 2.3283064e-10f - 0.5f) * 3.4641016f) >> 16;
    }
    words[i] = pair[0] | pair[1] << 16;
  }
}
// Reads all of it, UNROLL loads of 16 bytes in flight a thread.
extern "C" __global__ void read(const uint4* data, long long count, unsigned* sink) {
  unsigned sum = 0;
  const long long threads = gridDim.x * 256ll;
  for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += 8 * threads) {
    uint4 x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = i + j * threads < count ? __ldg(&data[i + j * threads]) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  if (sum == 0x12345678u) *sink = sum;
}
"""
SKEWED = [round(16 * 2 ** (11 * k / 63)) for k in range(64)]
# (name, query heads, kv heads, [(length, rows)], block size)
CASES = [
    ("decode 32/32 1x8192", 32, 32, [(8192, 1)], 16),
    ("decode 32/8 1x8192", 32, 8, [(8192, 1)], 16),
    ("decode 32/8 8x8192", 32, 8, [(8192, 1)] * 8, 16),
    ("decode 32/8 64x1024", 32, 8, [(1024, 1)] * 64, 16),
    ("decode 32/8 64x4096", 32, 8, [(4096, 1)] * 64, 16),
    ("decode 32/8 64xskew", 32, 8, [(length, 1) for length in SKEWED], 16),
    ("decode 32/8 256x512", 32, 8, [(512, 1)] * 256, 16),
    ("decode 32/8 64x4096", 32, 8, [(4096, 1)] * 64, 1),
    ("prefill 32/8 1x8192", 32, 8, [(8192, 8192)], 16),
    ("prefill 32/8 8x1024", 32, 8, [(1024, 1024)] * 8, 16),
    ("mixed 32/8 2048+63x4096", 32, 8, [(2048, 2048)] + [(4096, 1)] * 63, 16),
]


class Bench:
    """The current device, its limits, and what is measured on it."""

    def __init__(self) -> None:
        self.cupy = ops.cupy
        self.rng = np.random.default_rng()
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        module = self.cupy.RawModule(code=SOURCE, options=jit.OPTIONS)
        self._fill, self._read = module.get_function("fill"), module.get_function("read")
        self.l2_bytes = self.cupy.cuda.Device().attributes["L2CacheSize"]

    def random(self, shape: tuple[int, ...]):
        """A bfloat16 array of random numbers."""
        array = self.cupy.empty(shape, DTYPE)
        self._fill((2048,), (256,), (array, np.int64(array.nbytes // 4), np.uint32(self.rng.integers(2**32))))
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
        events = [self.cupy.cuda.Event() for _ in range(REPLAYS + 3)]
        for event in events:
            event.record(self.stream)
            graph.launch(self.stream)
        self.stream.synchronize()
        elapsed = self.cupy.cuda.get_elapsed_time
        # the first replays warm up; each interval holds one whole replay
        return statistics.median(elapsed(a, b) for a, b in itertools.pairwise(events[2:])) * 1e3 / count

    def read_limit(self) -> float:
        """Bytes a second of plain 16-byte reads, over 4 GiB or what there is; the best of several grids."""
        size = min(2**32, self.cupy.cuda.runtime.memGetInfo()[0] // 3) // 16 * 16
        data = self.random((size // 2,))
        sink, sms = self.cupy.empty(1, "uint32"), self.cupy.cuda.Device().attributes["MultiProcessorCount"]
        best = math.inf
        for ctas in (4 * sms, 8 * sms, 32 * sms):
            args = (data, np.int64(size // 16), sink)
            best = min(best, self.microseconds(lambda _, ctas=ctas, args=args: self._read((ctas,), (256,), args), 1))
        return size / best * 1e6

    def product_limit(self) -> float | None:
        """Floating-point operations a second of an 8192^3 product by cuBLAS; None where that is not installed."""
        a = self.random((8192, 8192))
        try:
            ops.linear(a, a)
            times = []
            for _ in range(12):
                start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(self.stream)
                ops.linear(a, a)
                stop.record(self.stream)
                stop.synchronize()
                times.append(self.cupy.cuda.get_elapsed_time(start, stop) / 1e3)
        except Exception as error:  # cuBLAS tells of what it lacks in many ways; a figure less is no failure
            print(f"no limit of products: {error}")
            return None
        return 2 * 8192**3 / min(times)

    def measure(self, name: str, num_heads: int, num_kv_heads: int, sequences: list[tuple[int, int]], block_size: int) -> dict:
        """One row of the result file, without its share; `bytes` and `flop` of one layer beside it."""
        lengths, rows = np.ascontiguousarray(self.rng.permutation(np.array(sequences, np.int32)).T)
        pages = -(-lengths // block_size)
        num_blocks, num_tokens = int(pages.sum()) + 1, int(rows.sum())
        layer = (num_kv_heads, num_blocks, block_size, HEAD_DIM)
        kv_bytes = int(lengths.sum()) * num_kv_heads * HEAD_DIM * 4
        layers = max(2, math.ceil(12 * self.l2_bytes / kv_bytes))
        pools = [(self.random(layer), self.random(layer)) for _ in range(layers)]
        qs = [self.random((num_tokens, num_heads, HEAD_DIM)) for _ in range(layers)]
        outs = [self.cupy.empty_like(q) for q in qs]
        for out in outs:
            out.data.memset_async(0xFF, out.nbytes, self.stream)  # NaN

        order = self.rng.permutation(np.arange(1, num_blocks)).astype(np.int32)
        batch = (np.cumsum([0, *rows], dtype=np.int32), lengths, np.cumsum([0, *pages], dtype=np.int32), order)
        shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": block_size, "num_blocks": num_blocks}
        num_ctas = attention.num_ctas_of_device(HEAD_DIM, DTYPE)
        start = time.perf_counter()
        planned = plan(*batch, **shape, num_ctas=num_ctas)
        plan_us = (time.perf_counter() - start) * 1e6

        us = self.microseconds(lambda i: attention.run(planned, qs[i], *pools[i], out=outs[i]), layers)
        errors = [self.error(planned, qs[-1], *pools[-1], outs[-1], int(token)) for token in (0, self.rng.integers(num_tokens))]
        start = time.perf_counter()
        for i in range(20):
            attention.run(planned, qs[i % layers], *pools[i % layers], out=outs[i % layers])
        host_us = (time.perf_counter() - start) * 1e6 / 20
        self.stream.synchronize()

        peers = {}
        if max(rows) == 1:  # the simple kernel reads a sequence for every row: absurd for prefill
            index = [self.cupy.asarray(array) for array in batch]
            args = (*index, 1 / math.sqrt(HEAD_DIM))
            simple = self.microseconds(lambda i: ops.paged_attention(qs[i], *pools[i], *args), min(layers, 3))
            peers["cupaged ops.paged_attention"] = simple
        before = lengths - rows
        flop = 4 * num_heads * HEAD_DIM * int((rows.astype(np.int64) * (before + before + rows + 1) // 2).sum())
        most = planned.tasks[:, 1].max(initial=1)
        print(f"    {layers} layers, {len(planned.items)} items for {num_ctas} CTAs, {len(planned.tasks)} tasks cut", end=", ")
        print(f"into up to {most} parts; host us: plan {plan_us:.0f}, run {host_us:.1f}; error {max(errors):.1e}")
        assert max(errors) < 1e-2, f"{name}: wrong by {errors}"
        return {"case": f"{name} p{block_size} bf16", "us": us, "bytes": kv_bytes, "flop": flop, "peers": peers}

    def error(self, planned, q, k_pool, v_pool, out, token: int) -> float:
        """||out - ref|| / ||ref|| of one token's last head, against float64."""
        b = int(np.searchsorted(planned.q_indptr, token, side="right")) - 1
        stop = int(planned.seq_lens[b] - planned.q_indptr[b + 1] + token + 1)
        pages = planned.page_indices[planned.page_indptr[b] :][: -(-stop // planned.block_size)]

        def host(array) -> np.ndarray:
            return ops.download(array.view(np.uint16)).view(DTYPE).astype(np.float64)

        pages = self.cupy.asarray(pages)
        k, v = (host(pool.view(np.uint16)[-1].take(pages, axis=0)).reshape(-1, HEAD_DIM)[:stop] for pool in (k_pool, v_pool))
        query, result = host(q[token, -1:])[0], host(out[token, -1:])[0]
        weights = k @ query / math.sqrt(HEAD_DIM)
        weights = np.exp(weights - weights.max())
        expected = weights @ v / weights.sum()
        return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"), help="folder for the result file")
    parser.add_argument("--only", default="", help="measure the cases whose name holds this")
    args = parser.parse_args()
    try:
        jit.check_device(0)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    started = time.perf_counter()
    properties = ops.cupy.cuda.runtime.getDeviceProperties(0)
    bench = Bench()
    with bench.stream:
        bytes_per_s, flop_per_s = bench.read_limit(), bench.product_limit()
        machine, tflops = properties["name"].decode(), (flop_per_s or 0) / 1e12
        print(f"{machine}: read limit {bytes_per_s / 1e12:.2f} TB/s, products {tflops:.0f} TFLOP/s")
        stages = attention.stages_of_device(HEAD_DIM)
        kernel = attention._kernel(DTYPE, HEAD_DIM, stages)
        print(f"kernel: {kernel.num_regs} registers, {kernel.local_size_bytes} bytes of local memory, {stages} stages")
        rows = []
        for case in CASES:
            if args.only not in case[0]:
                continue
            ops.cupy.get_default_memory_pool().free_all_blocks()
            row = bench.measure(*case)
            kv_bytes, flop, seconds = row.pop("bytes"), row.pop("flop"), row["us"] / 1e6
            if row["case"].startswith("prefill"):
                row["tflop_s"] = flop / seconds / 1e12
                speed = f"{row['tflop_s']:7.0f} TFLOP/s"
                row["share"] = flop / seconds / flop_per_s if flop_per_s else None
            else:
                row["share"] = kv_bytes / seconds / bytes_per_s
                speed = f"{kv_bytes / seconds / 1e12:7.2f} TB/s   "
            share = f"{row['share']:5.0%} of the limit" if row["share"] else ""
            peers = "  ".join(f"{name} {us:.0f} us" for name, us in row["peers"].items())
            print(f"{row['case']:40}{row['us']:9.1f} us {speed} {share}  {peers}", flush=True)
            rows.append(row)
        again = bench.read_limit()  # the best that was seen
    if again > bytes_per_s * 1.01:
        print(f"read limit once more: {again / 1e12:.2f} TB/s; the shares above are to the first")
    result = {
        "machine": machine,
        "limit_tbps": bytes_per_s / 1e12,
        "limit_tflops": flop_per_s / 1e12 if flop_per_s else None,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    gpu = machine.removeprefix("NVIDIA ").split()[0].lower()
    path = Path(args.output) / f"attention_{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{path} in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
