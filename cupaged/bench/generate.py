"""What is measured: speed, start-up and memory of one request, each beside the limit of the machine it ran on.

A decoded token reads every weight once and the K/V of its sequence once, so the limit of decode is memory bandwidth, and
its share is (bytes a token) x (tokens a second) / (bytes a second that plain reads reach). A prefilled token multiplies every
weight once: its share is 2 x (weights) x (tokens a second) over what one large matrix product reaches. Both limits are
measured in the same run. Where the time of a decoded token goes is measured too, by kind of operation.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cupaged.bench.limits import machine, product_limit, read_limit, weight_and_kv_bytes, weight_count
from cupaged.bench.step import decode_step
from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    pass

PROMPT = "What is the capital of France?"


def bench_generate(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
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
        *([] if quantization is None else ["--quantization", quantization]),
        *([] if threads is None else ["--threads", str(threads)]),
    ]
    starts = [_fresh_process(options) for _ in range(runs + 1)][1:]

    llm = LLM(
        model,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        threads=threads,
        max_model_len=prompt_tokens + tokens,
        enable_prefix_caching=False,
        max_num_seqs=1,
    )
    name = f"{llm.path.name} {llm.precision}" + (f" kv {llm.kv_cache_dtype}" if llm.kv_cache_dtype != llm.dtype else "")
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
    add(f"prefill {prompt_tokens}", tok_s=prefill_tok_s, share=2 * weight_count(llm) * prefill_tok_s / flop_per_s)
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
