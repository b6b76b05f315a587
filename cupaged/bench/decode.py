"""What a decode step of many sequences takes, and the prefill before it, of any model and also of random weights.

The floor of a step is its bytes at the machine's read limit: every weight once, and the K/V of all sequences once.
"""

from __future__ import annotations

import datetime
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cupaged.bench.limits import machine, product_limit, read_limit, weight_and_kv_bytes, weight_count
from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    from cupaged.llm import LLM

_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def bench_decode(
    model: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    threads: int | None = None,
    load_format: str = "auto",
    tokens: int = 128,
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Measure decode steps of so many sequences of so many tokens each, through the engine, and return a result file.

    Args:
        model, device, dtype, kv_cache_dtype, quantization, threads, load_format: as for `LLM`.
        batches, contexts: of equal length, or one of them a single number for all.
        tokens: steps that are measured of each case.
        report: gets each row once it is known.

    Returns:
        A result file. Of each case two rows: the prefill (s; its share is of the largest matrix product) and the decode step
        (ms: the median of whole steps of the engine, by the host's clock; tok_s; its share is of the read limit).
    """
    from cupaged import LLM

    for name, values in (("batch", batches), ("context", contexts), ("tokens", [tokens])):
        if not values or min(values) < 1:
            raise InvalidArgument(f"{name} is {min(values, default=None)}; give numbers of at least 1")
    if len(batches) != len(contexts) and 1 not in (len(batches), len(contexts)):
        cause = f"there are {len(batches)} batches and {len(contexts)} contexts"
        raise InvalidArgument(f"{cause}; give as many of both, or one of either")
    count = max(len(batches), len(contexts))
    both = [list(values) * (count if len(values) == 1 else 1) for values in (batches, contexts)]
    cases = list(zip(*both, strict=True))
    # While the last prompts are prefilled, the first sequences grow already.
    llm = LLM(
        model,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        threads=threads,
        load_format=load_format,
        max_num_seqs=max(batches),
        max_model_len=max(context + tokens + 2 + batch * context // 256 for batch, context in cases),
        kv_memory=None,
        enable_prefix_caching=False,
    )
    weight_bytes, kv_bytes = weight_and_kv_bytes(llm)
    bytes_per_s, flop_per_s = read_limit(llm.device, weight_bytes, threads), product_limit(llm, threads)
    size = re.search(r"(\d+)b$", llm.path.stem)
    name = f"{size[1]}B" if size else llm.path.stem
    rows: list[dict] = []
    _measure(llm, 1, 8, 4)  # compile, warm up
    for batch, context in cases:
        seconds, step_ms, num_cached = _measure(llm, batch, context, tokens)
        flop = 2 * weight_count(llm) * batch * context
        rows.append({"case": f"{name} prefill {batch}x{context}", "s": seconds, "share": flop / seconds / flop_per_s})
        report(rows[-1])
        read = weight_bytes + kv_bytes * num_cached
        kinds = (
            f"w={llm.quantization or _SHORT.get(llm.dtype, llm.dtype)} kv={_SHORT.get(llm.kv_cache_dtype, llm.kv_cache_dtype)}"
        )
        figures = {"ms": step_ms, "tok_s": 1e3 * batch / step_ms, "share": read / bytes_per_s / (step_ms / 1e3)}
        rows.append({"case": f"{name} {batch}x{context} {kinds}", **figures})
        report(rows[-1])
    return {
        "machine": machine(llm.device, threads),
        "limit_tbps": bytes_per_s / 1e12,
        "limit_tflops": flop_per_s / 1e12,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def _measure(llm: LLM, batch: int, context: int, tokens: int) -> tuple[float, float, float]:
    """Seconds of the prefill of all sequences, median milliseconds of a step after it, tokens that such a step finds cached."""
    from cupaged import SamplingParams

    rng = np.random.default_rng()
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)  # ended by hand
    requests = []
    try:
        for _ in range(batch):
            ids = rng.integers(0, llm.config.vocab_size, context).tolist()
            requests.append(llm.add({"prompt_token_ids": ids}, params))
        start = time.perf_counter()
        while not all(request.metrics.num_generated_tokens for request in requests):
            llm.step()
        seconds, times = time.perf_counter() - start, []
        generated = sum(request.metrics.num_generated_tokens for request in requests)
        for _ in range(tokens):
            start = time.perf_counter()
            llm.step()
            times.append(1e3 * (time.perf_counter() - start))
        for request in requests:
            if request.error is not None:
                raise CupagedError(request.error)
        if any(request.finished for request in requests) or llm.stats().num_preemptions:
            cause = f"the KV pool does not hold {batch} sequences of {context} tokens"
            raise InvalidArgument(f"{cause} and {tokens} more; lower --batch, --context or --tokens")
        return seconds, statistics.median(times), batch * context + generated + batch * tokens / 2
    finally:
        for request in requests:
            llm.abort(request)
