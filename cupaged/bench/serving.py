"""What is measured of many requests at once: throughput, what each of them waits, and what the scheduler itself costs.

Requests come in a closed loop (so many at any time: as one ends, the next is sent) or as a Poisson process (so many a second on
average, whether or not the earlier ones are done; the wait counts from when a request was due, not from when the loop saw it).
Prompts are random tokens; lengths are drawn fresh from a log-normal distribution, as those of real chats roughly are.
"""

from __future__ import annotations

import datetime
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cupaged.bench.limits import machine, product_limit, read_limit, weight_and_kv_bytes
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence as TokenSequence
from cupaged.errors import InvalidArgument
from cupaged.model.sampling import SamplingParams

if TYPE_CHECKING:
    from cupaged.engine.outputs import EngineStats, RequestOutput
    from cupaged.llm import LLM


@dataclass(frozen=True)
class Lengths:
    """Prompt and output tokens: log-normal with these means and this deviation of the logarithm, at most four times the mean.

    A spread of 0 gives every request exactly the means.
    """

    prompt_tokens: int = 256
    tokens: int = 128
    spread: float = 0.7

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("tokens", 2), ("spread", 0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least:
                raise InvalidArgument(f"{name} is {value}; give at least {least}")

    @property
    def longest(self) -> int:
        """Tokens of the longest request that `draw` may give."""
        return (4 if self.spread else 1) * (self.prompt_tokens + self.tokens)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""

        def one(mean: int, least: int) -> int:
            value = mean * rng.lognormvariate(-(self.spread**2) / 2, self.spread)  # whose mean is `mean`
            return min(max(round(value), least), 4 * mean)

        return one(self.prompt_tokens, 1), one(self.tokens, 2)


# ---- requests over a model


@dataclass
class _Request:
    """One request and when its tokens came, in seconds since the run began."""

    token_ids: list[int]
    max_tokens: int
    due: float = 0.0
    output: RequestOutput | None = None
    arrivals: list[float] = field(default_factory=list)  # of each token

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


def bench_serving(
    llm: LLM,
    concurrencies: Sequence[int] = (1, 8, 64, 256),
    rates: Sequence[float] = (),
    num_requests: int | None = None,
    lengths: Lengths = Lengths(),
    threads: int | None = None,
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Serve requests in a closed loop at each of `concurrencies`, then as Poisson processes of each of `rates` (requests/s).

    Args:
        num_requests: of each case; default: twice the concurrency, at least 8; at a rate, what comes in 30 s.
        report: gets each row once it is known.

    Returns:
        A result file. Its rows: tok_s (generated tokens over the time from the first request to the last token), requests_s,
        ttft_ms and itl_ms (time to first token and between tokens: p50, p90, p99 over all requests), itl_worst (the largest
        ratio of a request's own p99 to its p50 between tokens, counted after the last prefill; null where no request has 20
        gaps then), step_ms (median), policy_us (what the scheduler and the block manager take of a step, mean), policy_share
        (of all step time) and failed (requests that ended with an error).
    """
    for name, values in (("concurrency", concurrencies), ("rate", rates)):
        if any(not math.isfinite(value) or value <= 0 for value in values):
            raise InvalidArgument(f"{name} holds {min(values)}; give numbers above 0")
    if num_requests is not None and num_requests < 1:
        raise InvalidArgument(f"the number of requests is {num_requests}; give at least 1")
    rng = random.Random()
    name = f"{llm.path.stem} {llm.precision}" + (f" kv {llm.kv_cache_dtype}" if llm.kv_cache_dtype != llm.dtype else "")
    shape = f"{lengths.prompt_tokens}+{lengths.tokens}"
    rows: list[dict] = []

    def fresh(count: int) -> list[_Request]:
        drawn = (lengths.draw(rng) for _ in range(count))
        return [_Request([rng.randrange(llm.config.vocab_size) for _ in range(n)], m) for n, m in drawn]

    def add(case: str, requests: list[_Request], concurrency: float) -> None:
        before = llm.stats()
        steps = _serve(llm, requests, concurrency)
        rows.append({"case": f"{name} {case} {shape}", **_figures(requests, steps, before, llm.stats())})
        report(rows[-1])

    for warm_up in (1, 4):  # compile kernels, start threads
        _serve(llm, [replace(request, max_tokens=4) for request in fresh(warm_up)], warm_up)
    for concurrency in concurrencies:
        add(f"concurrency {concurrency}", fresh(num_requests or max(2 * concurrency, 8)), concurrency)
    for rate in rates:
        requests = fresh(num_requests or max(round(30 * rate), 8))
        due = 0.0
        for request in requests:
            request.due = due
            due += rng.expovariate(rate)
        add(f"rate {rate:g}/s", requests, math.inf)
    return {
        "machine": machine(llm.device, threads),
        "limit_tbps": read_limit(llm.device, weight_and_kv_bytes(llm)[0], threads) / 1e12,
        "limit_tflops": product_limit(llm, threads) / 1e12,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def _serve(llm: LLM, requests: list[_Request], concurrency: float) -> list[float]:
    """Run all requests, each when it is due and fewer than `concurrency` run; returns the seconds of each step."""
    waiting, running, steps = deque(requests), [], []
    start = time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - start
        while waiting and waiting[0].due <= now and len(running) < concurrency:
            request = waiting.popleft()
            if math.isfinite(concurrency):
                request.due = now
            params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            request.output = llm.add({"prompt_token_ids": request.token_ids}, params)
            running.append(request)
        if not running:
            time.sleep(max(waiting[0].due - now, 0))
            continue
        before = time.perf_counter()
        llm.step()
        after = time.perf_counter()
        steps.append(after - before)
        for request in running:
            count = request.output.metrics.num_generated_tokens - len(request.arrivals)
            request.arrivals += [after - start] * count
        running = [request for request in running if not request.output.finished]
    return steps


def _figures(requests: list[_Request], steps: list[float], before: EngineStats, after: EngineStats) -> dict[str, Any]:
    done = [request for request in requests if request.output.error is None]
    last_prefill = max((request.arrivals[0] for request in done), default=0.0)
    ratios = []
    for request in done:
        late = [arrival for arrival in request.arrivals if arrival >= last_prefill]
        gaps = [b - a for a, b in itertools.pairwise(late)]
        if len(gaps) >= 20:
            ratios.append(percentile(gaps, 99) / percentile(gaps, 50))
    seconds = max((request.arrivals[-1] for request in done), default=math.nan) - min(request.due for request in requests)
    return {
        "tok_s": sum(len(request.arrivals) for request in done) / seconds if done else 0.0,
        "requests_s": len(done) / seconds if done else 0.0,
        "ttft_ms": _percentiles([request.arrivals[0] - request.due for request in done]),
        "itl_ms": _percentiles([gap for request in done for gap in request.gaps]),
        "itl_worst": max(ratios, default=None),
        "step_ms": 1e3 * statistics.median(steps),
        "policy_us": 1e6 * (after.policy_s - before.policy_s) / (after.num_steps - before.num_steps),
        "policy_share": (after.policy_s - before.policy_s) / (after.step_s - before.step_s),
        "failed": len(requests) - len(done),
    }


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    return {f"p{share}": 1e3 * percentile(seconds, share) if seconds else None for share in (50, 90, 99)}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` percent of them do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share / 100 * len(values)) - 1, 0)]


def format_row(row: dict) -> str:
    """One line of the table."""
    if "us" in row:
        quiet = "-" if row["decode_us"] is None else f"{row['decode_us']:.0f}"
        figures = f"{row['us']:.0f} us a step, p99 {row['p99_us']:.0f}; {row['schedule_us']:.0f} of it to choose"
        return f"{row['case']:48} {figures}; {quiet} where all decode"

    def three(figures: dict[str, float | None]) -> str:
        return " ".join(f"{'-':>7}" if value is None else f"{value:7.1f}" for value in figures.values())

    worst = "-" if row["itl_worst"] is None else f"{row['itl_worst']:.2f}"
    policy = f"{row['policy_us']:6.0f} us {row['policy_share']:6.2%}"
    failed = f"   {row['failed']} failed" if row["failed"] else ""
    return f"{row['case']:48} {row['tok_s']:8.1f} {three(row['ttft_ms'])}  {three(row['itl_ms'])} {worst:>6} {policy}{failed}"


HEADER = (
    f"{'':48} {'tok/s':>8} {'first token, ms':>23}  {'between tokens, ms':>23} {'worst':>6} {'policy a step':>16}\n"
    f"{'':48} {'':8} {'p50':>7} {'p90':>7} {'p99':>7}  {'p50':>7} {'p90':>7} {'p99':>7} {'99/50':>6}"
)


# ---- the scheduler by itself


def bench_policy(
    num_seqs: int = 256, steps: int = 2000, lengths: Lengths = Lengths(512, 256), block_size: int = 16, num_waiting: int = 0
) -> dict:
    """A row: microseconds a step of scheduling and block-keeping, without a model, with `num_seqs` sequences always running.

    With `num_waiting`, so many more are always there, and what keeps them out is the pool: it holds `num_seqs` of mean length.

    Timed is all that an engine asks of the scheduler and the block manager in a step: remove what has ended, add what comes,
    choose, allocate, reserve room for the step ahead where all decode (`Ahead`), and advance. As one sequence ends the next one
    comes, its prompt beside the others' decodes.
    Medians are `us`, `schedule_us` (of it to choose and allocate) and `decode_us` (of the steps in which nothing came or went).
    """
    if num_seqs < 1 or steps < 1:
        raise InvalidArgument(f"{num_seqs} sequences and {steps} steps are asked for; give at least 1 of each")
    # The time of this thread, which other programs do not lengthen; Windows counts that in ticks of 16 ms.
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter
    rng = random.Random()
    num_tokens = lengths.prompt_tokens + lengths.tokens if num_waiting else lengths.longest
    blocks = BlockManager(max(num_seqs * -(-num_tokens // block_size), -(-lengths.longest // block_size)) + 1, block_size)
    scheduler = Scheduler(blocks, num_seqs + num_waiting, 8192)

    def draw(ahead: float = 0) -> TokenSequence:
        num_prompt, num_new = lengths.draw(rng)
        token_ids = [rng.randrange(32000) for _ in range(num_prompt + int(ahead * (num_new - 1)))]
        return TokenSequence(token_ids, num_prompt, num_prompt + num_new)

    arriving, ended = [draw(ahead=rng.random()) for _ in range(num_seqs + num_waiting)], []  # at random places of their answers
    seconds, choosing, decoding = [], [], []
    warm_up = 20 + num_seqs * 4 * lengths.prompt_tokens // 8192  # until all run
    for step in range(warm_up + steps):
        quiet = not (ended or arriving)
        start = clock()
        for seq in ended:
            scheduler.remove(seq)
        for seq in arriving:
            scheduler.add(seq)
        before = clock()
        scheduled = scheduler.schedule()
        choosing.append(clock() - before)
        if quiet:
            scheduler.reserve([seq for seq, _ in scheduled])
        scheduler.blocks.advance(scheduled)
        seconds.append(clock() - start)
        if quiet and step >= warm_up:
            decoding.append(seconds[-1])
        drawing = [seq for seq, _ in scheduled if seq.num_computed == seq.num_tokens]
        for seq in drawing:
            seq.token_ids.append(7)
        ended = [seq for seq in drawing if seq.num_tokens >= seq.max_tokens]
        arriving = [draw() for _ in ended]
    seconds, choosing = seconds[warm_up:], choosing[warm_up:]
    return {
        "case": f"policy at {num_seqs} sequences" + (f", {num_waiting} more than the pool holds" if num_waiting else ""),
        "us": 1e6 * statistics.median(seconds),
        "p99_us": 1e6 * percentile(seconds, 99),
        "schedule_us": 1e6 * statistics.median(choosing),
        "decode_us": 1e6 * statistics.median(decoding) if decoding else None,
    }
