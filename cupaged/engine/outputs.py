"""What a request gives back; names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CompletionOutput:
    """One completion of a prompt: `text` without special tokens and stop string, `token_ids` all that was generated."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" | "length" | "abort"; None: still running
    stop_reason: int | str | None = None  # the stop string or stop token id; None for the model's own end


@dataclass
class RequestMetrics:
    """Times in seconds of `time.perf_counter`; counts in tokens, generated ones over all completions."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens that were computed, not found in the cache, over the time to the first token."""
        seconds = self.time_to_first_token
        return None if not seconds else (self.num_prompt_tokens - self.num_cached_tokens) / seconds

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens after the first over the time since it."""
        if self.first_token_time is None or self.finished_time is None or self.num_generated_tokens < 2:
            return None
        seconds = self.finished_time - self.first_token_time
        return (self.num_generated_tokens - 1) / seconds if seconds > 0 else None


@dataclass
class RequestOutput:
    """A prompt, its completions so far, and how it went."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    error: str | None = None
