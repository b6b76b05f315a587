"""What a request gives back; names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

_Record = TypeVar("_Record", bound="_Grows")


class _Grows:
    """Something with lists that only ever get longer, all of them together; so a snapshot may share them.

    A list of a snapshot is copied when it is asked for first: what nobody reads costs the same however long it is.
    """

    _lists: ClassVar[tuple[str, ...]]  # their names; as fields they have a factory, for a default would hide `__getattr__`

    def snapshot(self: _Record) -> _Record:
        """What there is now; it stays as it is, and belongs to whoever gets it."""
        twin = object.__new__(type(self))
        own = twin.__dict__ = self.__dict__.copy()
        own["_whole"] = self, len(getattr(self, self._lists[0]))
        for name in self._lists:
            if own.get(name) is not None:
                del own[name]
        return twin

    def __getattr__(self, name: str) -> Any:
        """A list that a snapshot does not have yet."""
        whole, length = self.__dict__.get("_whole", (None, 0))
        if whole is None or name not in self._lists:
            raise AttributeError(f"{type(self).__name__} has no {name}", name=name, obj=self)
        copy = self.__dict__[name] = getattr(whole, name)[:length]
        return copy


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability (natural), and its place among all by probability, from 1."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput(_Grows):
    """One completion of a prompt: `text` without special tokens and stop string, `token_ids` all that was generated."""

    _lists = ("token_ids", "logprobs")
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = field(default_factory=lambda: None)  # of token_ids, by id; None: not asked for
    cumulative_logprob: float | None = None  # of all of token_ids; None: not asked for
    finish_reason: str | None = None  # "stop" | "length" | "abort"; None: still running
    stop_reason: int | str | None = None  # the stop string or stop token id; None for the model's own end


@dataclass
class RequestMetrics(_Grows):
    """Times in seconds of `time.perf_counter`; counts in tokens, generated ones over all completions."""

    _lists = ("inter_token_times",)
    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    inter_token_times: list[float] = field(default_factory=list)  # seconds from each step that gave tokens to the next
    last_token_time: float | None = None

    @property
    def queue_time(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

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
    error: str | None = None  # why it ended before its time, through no fault of others
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # for each prompt token, None for the first


@dataclass
class MeanTimes:
    """Sums over finished requests, for the means of `EngineStats`; each is of seconds, and how many there were."""

    num_finished: int = 0
    queued: tuple[float, int] = (0.0, 0)
    first: tuple[float, int] = (0.0, 0)
    between: tuple[float, int] = (0.0, 0)

    def add(self, metrics: RequestMetrics) -> None:
        def and_these(total: tuple[float, int], seconds: list[float | None]) -> tuple[float, int]:
            known = [each for each in seconds if each is not None]
            return total[0] + sum(known), total[1] + len(known)

        self.num_finished += 1
        self.queued = and_these(self.queued, [metrics.queue_time])
        self.first = and_these(self.first, [metrics.time_to_first_token])
        self.between = and_these(self.between, metrics.inter_token_times)

    def as_dict(self) -> dict[str, float | None]:
        """The fields of `EngineStats` that these are."""
        means = [seconds / count if count else None for seconds, count in (self.queued, self.first, self.between)]
        return {"num_finished": self.num_finished, **dict(zip(("queue_s", "ttft_s", "inter_token_s"), means, strict=True))}


@dataclass
class EngineStats:
    """What the engine has done and holds; times in seconds, counts since it was made unless said otherwise."""

    num_running: int  # now
    num_waiting: int  # now
    blocks_used: int  # now, as the next two
    blocks_cached: int  # without an owner, their content still to be found
    blocks_free: int  # without an owner
    kv_waste: float  # now: share of the slots of used blocks that hold no token
    prefix_hit_rate: float  # tokens of admitted sequences that were found in the prefix cache
    num_preemptions: int
    num_steps: int
    num_generated_tokens: int
    step_s: float  # in steps
    policy_s: float  # of them, in the scheduler and the block manager
    num_drafts: int  # verified guesses of speculative decoding, in runs of several tokens
    num_draft_tokens: int
    num_accepted_tokens: int
    num_finished: int  # requests; over these the next three are means, None where there is nothing to average
    queue_s: float | None  # from arrival to the first step that computed something
    ttft_s: float | None  # from arrival to the first token
    inter_token_s: float | None  # from each step that gave a request tokens to the next
    accepted_lengths: dict[int, int] = field(default_factory=dict)  # accepted tokens of a draft -> drafts
