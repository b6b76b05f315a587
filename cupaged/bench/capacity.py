"""What the same bytes of K/V hold: pages taken as they are needed, against slots reserved for the longest request.

Both serve the same requests in the same order, on the same engine. Reserved means that no more requests run at a time than the
bytes hold times `max_model_len` slots, as a contiguous cache would have it; their attention is the paged one in either case, so
that what differs is how many run.
"""

from __future__ import annotations

import datetime
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cupaged.bench.decode import warm_up
from cupaged.bench.limits import machine, read_limit, weight_and_kv_bytes
from cupaged.bench.results import card, model_name, types_if_unusual
from cupaged.errors import CupagedError, InvalidArgument

_SPREAD = 32  # the longest request over the shortest


def bench_capacity(
    model: str,
    *,
    kv_memory: int | str,
    max_model_len: int = 8192,
    num_requests: int = 128,
    tokens: int = 128,
    report: Callable[[dict], None] = lambda row: None,
    **arguments: Any,
) -> dict:
    """Serve requests over reserved slots, then over pages, and return a result file.

    Args:
        model: as for `LLM`, and so are further arguments.
        kv_memory: of both.
        max_model_len: slots that are reserved for a request. Prompt and answer together are from a 32nd of it to all of it:
            as many of each power of two (evenly on a logarithmic scale), in an order drawn fresh.
        num_requests: of each of the two.
        tokens: of each answer; but at most half of its request's length.
        report: gets each row once it is known.

    Returns:
        A result file of two rows, each over the time in which requests wait: concurrent (requests that run, the mean over that
        time) and most, tok_s (generated), kv_gb. The second one's ratio is to the first.
    """
    from cupaged import LLM

    for name, value, least in (
        ("max_model_len", max_model_len, 2 * _SPREAD),
        ("requests", num_requests, 1),
        ("tokens", tokens, 1),
    ):
        if value < least:
            raise InvalidArgument(f"{name} is {value}; give at least {least}")
    llm = LLM(
        model,
        kv_memory=kv_memory,
        max_model_len=max_model_len,
        max_num_seqs=num_requests,
        enable_prefix_caching=False,
        **arguments,
    )
    weight_bytes, kv_bytes = weight_and_kv_bytes(llm)
    pool = llm.pool_stats()
    slots = pool.bytes // (kv_bytes * max_model_len)
    rng = random.Random()
    shares = [_SPREAD ** ((number + 0.5) / num_requests - 1) for number in range(num_requests)]
    lengths = [round(max_model_len * share) for share in rng.sample(shares, num_requests)]
    answers = [min(tokens, length // 2) for length in lengths]
    prompts = [
        [rng.randrange(llm.config.vocab_size) for _ in range(length - answer)]
        for length, answer in zip(lengths, answers, strict=True)
    ]
    requests = list(zip(prompts, answers, strict=True))
    if sum(lengths) <= (pool.num_blocks - 1) * pool.block_size:
        raise InvalidArgument(f"kv_memory holds all {num_requests} requests at once; lower it, or give more requests")
    threads = arguments.get("threads")
    machine_name, rows = machine(llm.device, threads), []
    unusual = types_if_unusual(llm.quantization or llm.dtype, llm.kv_cache_dtype)

    def add(case: str, limit: float) -> None:
        figures = {**_serve(llm, requests, limit), "kv_gb": pool.bytes / 1e9}
        if rows:
            figures["ratio"] = {name: figures[name] / rows[0][name] for name in ("concurrent", "most", "tok_s")}
        rows.append({"case": f"{model_name(llm.path)} capacity {case}{unusual}{card(machine_name)}", **figures})
        report(rows[-1])

    warm_up(llm)
    add("contiguous", slots)
    add("paged", math.inf)
    return {
        "machine": machine_name,
        "limit_tbps": read_limit(llm.device, weight_bytes, threads) / 1e12,
        "limit_tflops": None,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def _serve(llm: Any, requests: list[tuple[list[int], int]], limit: float) -> dict[str, float]:
    """Run (prompt, tokens of the answer) in order, at most `limit` at a time, for as long as one of them waits."""
    from cupaged import SamplingParams

    waiting, sent, live = deque(requests), [], []
    seconds = area = 0.0
    most = 0
    try:
        while waiting or llm.stats().num_waiting:
            while waiting and len(live) < limit:
                prompt, count = waiting.popleft()
                params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
                live.append(llm.add({"prompt_token_ids": prompt}, params))
                sent.append(live[-1])
            start = time.perf_counter()
            llm.step()
            took = time.perf_counter() - start
            still = [request for request in live if not request.finished]
            running = len(live) - len(still) + llm.stats().num_running  # those that ended with this step ran in it
            live, seconds, area, most = still, seconds + took, area + took * running, max(most, running)
        for request in sent:
            if request.error is not None:
                raise CupagedError(request.error)
        generated = sum(request.metrics.num_generated_tokens for request in sent)
        return {"tok_s": generated / seconds, "concurrent": area / seconds, "most": most}
    finally:
        for request in live:
            llm.abort(request)
