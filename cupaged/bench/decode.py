"""What a decode step of many sequences takes, and the prefill before it, of any model and also of random weights.

The floor of a step is its bytes at the machine's read limit: every weight once, and the K/V of all sequences once.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cupaged.bench.contiguous import contiguous_step
from cupaged.bench.limits import machine, product_limit, read_limit, weight_and_kv_bytes, weight_count
from cupaged.bench.peers import check as check_peers
from cupaged.bench.peers import transformers_steps
from cupaged.bench.results import card, model_name, types, types_if_unusual
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.fetch import resolve
from cupaged.engine.dtypes import bytes_of, choose_dtype
from cupaged.engine.kv_pool import activation_bytes
from cupaged.errors import CupagedError, InvalidArgument
from cupaged.model.parameters import unquantised_bytes

if TYPE_CHECKING:
    from cupaged.llm import LLM


def bench_decode(
    model: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokens: int = 128,
    cache: str = "paged",
    peers: bool = False,
    serve: bool = False,
    report: Callable[[dict], None] = lambda row: None,
    **arguments: Any,
) -> dict:
    """Measure decode steps of so many sequences of so many tokens each, through the engine, and return a result file.

    Args:
        model, device, dtype: as for `LLM`, and so are further arguments.
        batches, contexts: of equal length, or one of them a single number for all.
        tokens: steps that are measured of each case.
        cache: "contiguous" measures the same steps over a cache of that kind too (`bench.contiguous`).
        peers: measure transformers too (`bench.peers`), before the model is loaded.
        serve: measure instead whole requests: all of a case are sent at once, and each is answered with `tokens`.
        report: gets each row once it is known.

    Returns:
        A result file. Of each case two rows: the prefill (s; its share is of the largest matrix product; scores_gb, what the
        scores of one layer would be, were they all in memory, and step_gb, what is kept for the largest step here) and the
        decode step (ms: the median of whole steps of the engine, by the host's clock; tok_s; its share is of the read limit;
        peers, the milliseconds of others). With the contiguous cache a third, whose ratio is its time over that of the pages.
        With `serve` one: tok_s, of all that is generated over the time until the last request is done.
    """
    from cupaged.llm import LLM, select_device

    cases = _cases(batches, contexts, tokens)
    if cache == "contiguous" and arguments.get("kv_cache_dtype", "auto") != "auto":
        raise InvalidArgument("a contiguous cache is of the model's dtype; leave kv_cache_dtype out")
    if serve and (peers or cache != "paged"):
        raise InvalidArgument("peers and other caches are measured by the step, not by the request; leave them or serve out")
    if peers and (arguments.get("quantization") or arguments.get("kv_cache_dtype", "auto") != "auto"):
        raise InvalidArgument("peers have weights and K/V of the model's dtype; leave quantization and kv_cache_dtype out")
    of_peers: list[dict[str, float]] = [{}] * len(cases)
    if peers:
        check_peers()
        ops, index = select_device(device)
        path = Path(model) if Path(model).is_file() else resolve(model)
        kind = choose_dtype(dtype, load_config(path).dtype or "float32", ops)
        place = "cpu" if index is None else f"cuda:{index}"
        of_peers = transformers_steps(path, cases, place, kind, tokens, arguments.get("threads"))
    # While the last prompts are prefilled, the first sequences grow already; and a sequence takes whole blocks.
    longest = max(context + tokens + 2 + batch * context // 256 for batch, context in cases)
    llm = LLM(
        model,
        device=device,
        dtype=dtype,
        max_num_seqs=max(batches),
        max_model_len=-(-longest // 16) * 16,
        kv_memory=None,
        enable_prefix_caching=False,
        **arguments,
    )
    threads = arguments.get("threads")
    weight_bytes, kv_bytes = weight_and_kv_bytes(llm)
    bytes_per_s, flop_per_s = read_limit(llm.device, weight_bytes, threads), product_limit(llm, threads)
    machine_name = machine(llm.device, threads)
    name, end = model_name(llm.path), card(machine_name)
    kinds = llm.quantization or llm.dtype, llm.kv_cache_dtype
    unusual = types_if_unusual(*kinds)
    step_bytes = activation_bytes(llm.config, llm.engine.scheduler.max_num_batched_tokens, max(batches))
    step_bytes += unquantised_bytes(llm.config, llm.dtype, llm.quantization)
    rows: list[dict] = []

    def add(case: str, **figures: Any) -> None:
        rows.append({"case": f"{name} {case}{end}", **figures})
        report(rows[-1])

    warm_up(llm) if serve else _measure(llm, 1, 8, 4)
    for (batch, context), others in zip(cases, of_peers, strict=True):
        if serve:
            add(f"serve {batch}x{context}+{tokens}{unusual}", tok_s=_served(llm, batch, context, tokens))
            continue
        seconds, step_ms, num_cached = _measure(llm, batch, context, tokens)
        share = 2 * weight_count(llm) * batch * context / seconds / flop_per_s
        scores = batch * llm.config.num_heads * context**2 * bytes_of(llm.dtype)
        sizes = {"scores_gb": scores / 1e9, "step_gb": step_bytes / 1e9}
        add(f"prefill {batch}x{context}{unusual}", s=seconds, share=share, **sizes)
        shape, read = f"{batch}x{context} {types(*kinds)}", weight_bytes + kv_bytes * num_cached

        def figures(ms: float, batch: int = batch, read: float = read) -> dict[str, float]:
            return {"ms": ms, "tok_s": 1e3 * batch / ms, "share": read / bytes_per_s / (ms / 1e3)}

        contiguous_ms = contiguous_step(llm, batch, context, tokens) if cache == "contiguous" else None
        others = others if contiguous_ms is None else {**others, "contiguous": contiguous_ms}
        add(shape, **figures(step_ms), **({"peers": others} if others else {}))
        if contiguous_ms is not None:
            add(f"{shape} contiguous", **figures(contiguous_ms), ratio={"time over pages": contiguous_ms / step_ms})
    return {
        "machine": machine_name,
        "limit_tbps": bytes_per_s / 1e12,
        "limit_tflops": flop_per_s / 1e12,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def _cases(batches: Sequence[int], contexts: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """(batch, context) of each case; InvalidArgument where they do not go together."""
    for name, values in (("batch", batches), ("context", contexts), ("tokens", [tokens])):
        if not values or min(values) < 1:
            raise InvalidArgument(f"{name} is {min(values, default=None)}; give numbers of at least 1")
    if len(batches) != len(contexts) and 1 not in (len(batches), len(contexts)):
        cause = f"there are {len(batches)} batches and {len(contexts)} contexts"
        raise InvalidArgument(f"{cause}; give as many of both, or one of either")
    count = max(len(batches), len(contexts))
    both = [list(values) * (count if len(values) == 1 else 1) for values in (batches, contexts)]
    return list(zip(*both, strict=True))


def warm_up(llm: LLM) -> None:
    """Compile, and capture the steps of every size that graphs are made for: a batch of 63 shrinks by one a step."""
    from cupaged import SamplingParams

    lengths = range(1, min(64, llm.max_model_len))
    ends = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    llm.generate([[1]] * len(ends), ends, use_tqdm=False)


def _served(llm: LLM, batch: int, context: int, tokens: int) -> float:
    """Tokens a second of so many requests, from the first step to the end of the last."""
    from cupaged import SamplingParams

    ids = np.random.default_rng().integers(0, llm.config.vocab_size, (batch, context)).tolist()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    requests = llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for request in requests:
        if request.error is not None:
            raise CupagedError(request.error)
    return batch * tokens / seconds


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
