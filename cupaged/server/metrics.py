"""What the server counts, in the format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from cupaged.engine.outputs import EngineStats, RequestOutput

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds, as the next
_BETWEEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class ServerMetrics:
    """Counters and histograms of requests, and the engine's own figures at the moment when they are asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "cupaged_http_requests",
            "Requests that were answered, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "cupaged_time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token.",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self._between = Histogram(
            "cupaged_inter_token_seconds",
            "From each step that gave a request tokens to the next that did.",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self._prompt_tokens = Counter("cupaged_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._first_seen: set[str] = set()  # ids of requests whose first token was counted
        self._engine: tuple[EngineStats, int] | None = None
        self._registry.register(self)

    def answered(self, path: str, status: int | None) -> None:
        """A request has its answer."""
        self._answers.labels(path if path in _PATHS else "other", str(status or 499)).inc()

    def grown(self, output: RequestOutput) -> None:
        """An output has more tokens; its first ones count once."""
        seconds = output.metrics.time_to_first_token
        if seconds is not None and output.request_id not in self._first_seen:
            self._first_seen.add(output.request_id)
            self._first_token.observe(seconds)

    def ended(self, outputs: Sequence[RequestOutput]) -> None:
        """No more comes of these."""
        for output in outputs:
            self._first_seen.discard(output.request_id)
            self._prompt_tokens.inc(output.metrics.num_prompt_tokens)
            for seconds in output.metrics.inter_token_times:
                self._between.observe(seconds)

    def exposition(self, stats: EngineStats, num_requests: int) -> tuple[bytes, str]:
        """The text, and its content type."""
        self._engine = stats, num_requests
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """The engine's figures, for the registry."""
        if self._engine is None:
            return
        stats, num_requests = self._engine
        for name, what, value in (
            ("requests", "Requests that are running and waiting.", num_requests),
            ("sequences_running", "Sequences that are computed.", stats.num_running),
            ("sequences_waiting", "Sequences that wait for room.", stats.num_waiting),
            ("prefix_cache_hit_rate", "Share of prompt tokens that were found in the prefix cache.", stats.prefix_hit_rate),
            ("kv_waste", "Share of the slots of used blocks that hold no token.", stats.kv_waste),
        ):
            yield GaugeMetricFamily(f"cupaged_{name}", what, value=value)
        blocks = GaugeMetricFamily(
            "cupaged_kv_blocks", "Blocks of the KV pool; cached ones are among the free.", labels=["state"]
        )
        for state in ("used", "free", "cached"):
            blocks.add_metric([state], getattr(stats, f"blocks_{state}"))
        yield blocks
        for name, what, value in (
            ("generated_tokens", "Tokens that were generated.", stats.num_generated_tokens),
            ("preemptions", "Sequences that gave their blocks back for others and were computed again.", stats.num_preemptions),
            ("steps", "Steps of the engine.", stats.num_steps),
        ):
            yield CounterMetricFamily(f"cupaged_{name}", what, value=value)
