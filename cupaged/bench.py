"""What is measured: speed, start-up and memory of one request, each beside the limit of the machine it ran on.

A decoded token reads every weight once and the K/V of its sequence once, so the limit of decode is memory bandwidth, and
its share is (bytes a token) x (tokens a second) / (bytes a second that plain reads reach). A prefilled token multiplies every
weight once: its share is 2 x (weights) x (tokens a second) over what one large matrix product reaches. Both limits are
measured in the same run. Where the time of a decoded token goes is measured too, by kind of operation.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    from cupaged.llm import LLM

SWEEP_BYTES = 2**31  # several times the largest caches
PROMPT = "What is the capital of France?"
KINDS = {  # operation -> what it counts as in a step; the product that gives the logits is a kind of its own
    "linear": "linear",
    "paged_attention": "attention",
    "rope_append": "rope and append",
    "rms_norm": "norm",
    "swiglu": "swiglu and add",
    "add": "swiglu and add",
    "embedding": "embedding and copies",
    "index": "embedding and copies",
    "upload": "embedding and copies",
    "sample": "sampling",
    "download": "sampling",
}
LOGITS, OUTSIDE = "logits", "outside the operations"


def bench_generate(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    threads: int | None = None,
    runs: int = 5,
    prompt_tokens: int = 512,
    tokens: int = 128,
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Measure one request at a time and return a result file; `report` gets each row once it is known.

    A result is {"machine": ..., "limit_tbps": ..., "limit_tflops": ..., "date": ..., "rows": [...]}.

    Rows: time from process start to the first byte on stdout and that process's peak memory (a fresh `cupaged generate`),
    prefill of `prompt_tokens` fresh random tokens, decode of `tokens` after them; medians of `runs` after one warm-up. Then one
    step of such a decode, its share that of the floor (its bytes at the read limit), and each kind of operation in it with its
    share of the step, as `decode_step` says.
    """
    from cupaged import LLM, SamplingParams
    from cupaged.checkpoint.fetch import resolve
    from cupaged.engine.dtypes import bytes_of

    for name, value in (("runs", runs), ("prompt_tokens", prompt_tokens), ("tokens", tokens)):
        if value < (3 if name == "tokens" else 1):
            raise InvalidArgument(f"{name} is {value}; give a larger number")
    rows: list[dict] = []

    def add(case: str, **figures: float | None) -> None:
        rows.append({"case": f"{name} {case}", **figures})
        report(rows[-1])

    resolve(model)  # a download is no part of a start
    # First the fresh processes: the peak that the system reports for a child counts what its parent held when it was started.
    options = [
        "--model",
        model,
        "--device",
        device,
        "--dtype",
        dtype,
        "--kv-cache-dtype",
        kv_cache_dtype,
        *([] if threads is None else ["--threads", str(threads)]),
    ]
    starts = [_fresh_process(options) for _ in range(runs + 1)][1:]

    llm = LLM(
        model,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        threads=threads,
        max_model_len=prompt_tokens + tokens,
        enable_prefix_caching=False,
        max_num_seqs=1,
    )
    name = f"{llm.path.name} {llm.dtype}" + (f" kv {llm.kv_cache_dtype}" if llm.kv_cache_dtype != llm.dtype else "")
    add("process start to first token", s=statistics.median(seconds for seconds, _ in starts))
    add("peak memory", gb=statistics.median(peak for _, peak in starts) / 1e9)

    weight_bytes, kv_bytes = weight_and_kv_bytes(llm)
    bytes_per_s, flop_per_s = read_limit(llm.device, weight_bytes, threads), product_limit(llm, threads)
    rng = np.random.default_rng()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prefill, decode = [], []
    for _ in range(runs + 1):
        ids = rng.integers(0, llm.config.vocab_size, prompt_tokens).tolist()
        metrics = llm.generate({"prompt_token_ids": ids}, params)[0].metrics
        prefill.append(metrics.prefill_tok_s)
        decode.append(metrics.decode_tok_s)
    step_ms, kinds = decode_step(llm, rng.integers(0, llm.config.vocab_size, prompt_tokens).tolist(), tokens)
    # Once more: other tenants of the machine come and go, and a limit is the best that was seen.
    bytes_per_s = max(bytes_per_s, read_limit(llm.device, weight_bytes, threads))
    flop_per_s = max(flop_per_s, product_limit(llm, threads))
    prefill_tok_s, decode_tok_s = statistics.median(prefill[1:]), statistics.median(decode[1:])
    weights = weight_bytes / bytes_of(llm.dtype)
    add(f"prefill {prompt_tokens}", tok_s=prefill_tok_s, share=2 * weights * prefill_tok_s / flop_per_s)
    bytes_per_token = weight_bytes + kv_bytes * (prompt_tokens + tokens / 2)
    add(f"decode {tokens} after {prompt_tokens}", tok_s=decode_tok_s, share=bytes_per_token * decode_tok_s / bytes_per_s)
    add("decode step", ms=step_ms, share=bytes_per_token / bytes_per_s / (step_ms / 1e3))
    for kind, ms in kinds.items():
        add(f"decode step {kind}", ms=ms, share=ms / step_ms)
    return {
        "machine": machine(llm.device, threads),
        "limit_tbps": bytes_per_s / 1e12,
        "limit_tflops": flop_per_s / 1e12,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def weight_and_kv_bytes(llm: LLM) -> tuple[int, int]:
    """Bytes of weights that one decoded token reads, and bytes of K/V for each token before it."""
    from cupaged.checkpoint.weights import expected_tensors
    from cupaged.engine.dtypes import bytes_of, kv_bytes_per_token

    shapes = expected_tensors(llm.config)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if not llm.config.tie_word_embeddings:  # then a token reads one row of the table; tied, the table is the head as well
        count -= int(np.prod(shapes["model.embed_tokens.weight"]))
    return count * bytes_of(llm.dtype), kv_bytes_per_token(llm.config, llm.kv_cache_dtype)


# ---- one step, by kind of operation


def decode_step(llm: LLM, token_ids: list[int], tokens: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step that decodes one token, and of each kind of operation in it: together they are the step.

    One request is decoded: `tokens` after `token_ids`. Every other step has its operations timed call by call, those between
    run as always, so that both see the same lengths and the same machine. The step is the median of the latter. A kind is the
    median, over the former, of the sum of its calls; OUTSIDE is what they leave of the step: Python between the calls,
    scheduling, text. What the timing itself takes lies between the calls, on a GPU in part within them. Where that or noise
    makes the kinds more than the step, they are scaled down to it and OUTSIDE is 0.
    """
    from cupaged import SamplingParams

    model = llm.engine.model
    ops, steps, timed = model.ops, [], []
    request = llm.add({"prompt_token_ids": token_ids}, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    try:
        while not request.finished:
            decodes = request.metrics.num_generated_tokens > 0
            recorder = _Recorder(ops, llm.device) if decodes and len(steps) > len(timed) else None
            model.ops = recorder or ops
            start = time.perf_counter()
            llm.step()
            if recorder is not None:
                timed.append(recorder.milliseconds())
            elif decodes:
                steps.append(1e3 * (time.perf_counter() - start))
    finally:
        model.ops = ops
    if request.error is not None:
        raise CupagedError(request.error)
    step = statistics.median(steps)
    kinds = {kind: statistics.median(each[kind] for each in timed) for kind in timed[0]}
    scale = min(1.0, step / sum(kinds.values()))
    kinds = {kind: ms * scale for kind, ms in kinds.items()}
    return step, {**kinds, OUTSIDE: max(step - sum(kinds.values()), 0.0)}


class _Recorder:
    """Stands in for the ops module of a model and notes when each operation of KINDS began and ended.

    On the CPU by the clock; on a GPU by events on the stream around the call, read once the step is over. The time between
    those is the device's, and the host's where the device waits for what the call is to launch.
    """

    def __init__(self, ops: ModuleType, device: str) -> None:
        self._ops, self._cupy = ops, None
        if device != "cpu":
            import cupy

            self._cupy = cupy
        self._calls: list[tuple[str, Any, Any]] = []  # kind, marks before and after
        for name, kind in KINDS.items():
            setattr(self, name, self._noting(getattr(ops, name), kind))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _noting(self, operation: Callable, kind: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._mark()
            result = operation(*args, **kwargs)
            self._calls.append((LOGITS if "dtype" in kwargs and kind == "linear" else kind, before, self._mark()))
            return result

        return call

    def _mark(self) -> Any:
        if self._cupy is None:
            return time.perf_counter()
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Of all calls so far, by kind."""
        sums = dict.fromkeys((KINDS["linear"], LOGITS, *KINDS.values()), 0.0)  # what reads weights first
        if self._cupy is not None:
            self._calls[-1][-1].synchronize()
        for kind, before, after in self._calls:
            sums[kind] += self._cupy.cuda.get_elapsed_time(before, after) if self._cupy else 1e3 * (after - before)
        return sums


# ---- a fresh process


def _fresh_process(options: list[str]) -> tuple[float, int]:
    """Seconds from the start of `cupaged generate` to its first byte on stdout, and its peak resident bytes after 32 tokens."""
    command = [sys.executable, "-m", "cupaged", "generate", *options, "--stream", "--max-tokens", "32", "--prompt", PROMPT]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        if sys.platform == "win32":
            import psutil

            with contextlib.suppress(psutil.Error):
                peak = psutil.Process(process.pid).memory_info().peak_wset
        process.stdout.read()
        errors = process.stderr.read().decode(errors="replace").strip()
        if sys.platform != "win32":
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if process.returncode != 0:
        raise CupagedError(
            errors.splitlines()[-1].removeprefix("cupaged: ") if errors else "`cupaged generate` failed; run it alone"
        )
    return seconds, peak


# ---- the machine's limits


def read_limit(device: str, model_bytes: int, threads: int | None = None) -> float:
    """Bytes a second that plain reads of the device's memory reach, the best of several ways and sizes.

    CPU: a matrix-vector product by BLAS and a search for the maximum, over 2 GiB and over as much as the model's weights.
    The second size matters where a shared L3 of hundreds of MB keeps a part of the weights from one token to the next: no
    figure of decode may then be held to memory alone. GPU: a sum over 4 GiB, and a copy of them, whose bytes count twice.
    """
    if device != "cpu":
        return _gpu_read_limit(int(device.partition(":")[2] or 0))
    import psutil
    from threadpoolctl import threadpool_limits

    threads = threads or os.cpu_count()
    best = 0.0
    for size in (min(SWEEP_BYTES, psutil.virtual_memory().available // 2), model_bytes):
        matrix = np.ones((max(size // 4096 // threads, 1) * threads, 1024), np.float32)
        parts = matrix.reshape(threads, -1)
        with threadpool_limits(threads):
            best = max(best, matrix.nbytes / _best_seconds(lambda m=matrix: m @ m[0]))
        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            best = max(
                best, matrix.nbytes / _best_seconds(lambda p=parts, pool=pool: list(pool.map(lambda part: part.max(), p)))
            )
    return best


def _gpu_read_limit(index: int) -> float:
    import cupy

    with cupy.cuda.Device(index):
        x = cupy.ones(min(2**32, cupy.cuda.runtime.memGetInfo()[0] // 4) // 4, cupy.float32)
        y = cupy.empty_like(x)

        def copy() -> None:
            cupy.copyto(y, x)
            cupy.cuda.get_current_stream().synchronize()

        return max(x.nbytes / _best_seconds(lambda: x.sum().get()), 2 * x.nbytes / _best_seconds(copy))


def product_limit(llm: LLM, threads: int | None = None) -> float:
    """Floating-point operations a second of one large matrix product in the model's dtype, by the library that prefill uses."""
    from threadpoolctl import threadpool_limits

    if llm.device == "cpu":
        from cupaged.ops import numpy as ops
    else:
        from cupaged.ops import cuda as ops
    n = 2048 if llm.device == "cpu" else 8192
    with ops.device(int(llm.device.partition(":")[2] or 0)), threadpool_limits(threads):
        a = ops.upload(np.random.default_rng().standard_normal((n, n), np.float32), llm.dtype)  # a GPU multiplies ones faster
        row = ops.upload(np.zeros(1, np.int32))
        return 2 * n**3 / _best_seconds(lambda: ops.download(ops.embedding(row, ops.linear(a, a))))


def _best_seconds(action: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up, and the best is never the first touch of the memory
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(device: str, threads: int | None) -> str:
    """What a result file calls the machine: the GPU's name, or the CPU's and what it runs under."""
    if device != "cpu":
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(int(device.partition(":")[2] or 0))
        return properties["name"].decode()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {threads or os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}"


# ---- results


def format_row(row: dict) -> str:
    """One line of the table."""
    unit, text = next((u, t) for u, t in (("ms", "ms"), ("tok_s", "tok/s"), ("s", "s"), ("gb", "GB")) if u in row)
    whole = "step" if " decode step " in row["case"] else "limit"
    share = f"{row['share']:7.1%} of the {whole}" if "share" in row else ""
    speed = f"   {row['tok_s']:.1f} tok/s" if "tok_s" in row and unit != "tok_s" else ""
    return f"{row['case']:66} {row[unit]:10.2f} {text:6}{share}{speed}".rstrip()


def usual_name(result: dict, what: str = "generate") -> str:
    """What the file of a result is called: <what>_<gpu|cpu>.json, but cpu.json for generate's."""
    if " threads, " in result["machine"]:
        return "cpu.json" if what == "generate" else f"{what}_cpu.json"
    return f"{what}_{result['machine'].removeprefix('NVIDIA ').split()[0].lower()}.json"


def save(result: dict, output: str, what: str = "generate") -> Path:
    """Write a result file; a folder gets it under its usual name."""
    path = Path(output)
    if path.is_dir():
        path /= usual_name(result, what)
    write_whole(path, (json.dumps(result, indent=2) + "\n").encode(), "give --output a file in a folder that exists")
    return path


def write_whole(path: Path, data: bytes, remedy: str) -> None:
    """Write a file such that under its name there is all of it or what was there before; InvalidArgument where that fails.

    What is there and no plain file, like /dev/stdout, is written to as it is.
    """
    target = path.resolve()  # a link stays one
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}; {remedy}") from error
