"""One completion in the making: what its tokens are drawn under, what becomes of those drawn, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.engine.detokenizer import Detokenizer
from cupaged.engine.outputs import CompletionOutput, Logprob, RequestOutput
from cupaged.engine.sequence import Sequence as TokenSequence
from cupaged.model.sampling import SamplingParams, SamplingRow, Score, SeenTokens

End = tuple[str, int | str | None]  # finish_reason, stop_reason


@dataclass(eq=False)
class Completion:
    """A sequence, its text, and the request it belongs to."""

    seq: TokenSequence
    request: RequestOutput
    output: CompletionOutput
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    siblings: list[CompletionOutput] = field(default_factory=list)  # to begin as forks of this one once the prompt is computed
    failure: Exception | None = None  # of a logits processor, in this step

    def __post_init__(self) -> None:
        params = self.params
        self.detokenizer = Detokenizer(self.tokenizer, params.stop, params.skip_special_tokens)
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.seen = SeenTokens(self.request.prompt_token_ids) if penalised else None
        self._changes = penalised or bool(params.logit_bias or params.logits_processors)

    def sampling_row(self, draft: Sequence[int], sibling: CompletionOutput | None = None) -> SamplingRow:
        """What the next token is drawn under, those of `draft` being taken for granted; or a sibling's first token."""
        output, params = sibling or self.output, self.params
        seen = self.seen.and_also(draft) if draft and self.seen is not None else self.seen
        bias: Mapping[int, float] = params.logit_bias or {}
        if len(output.token_ids) + len(draft) < params.min_tokens:
            bias = {**bias, **dict.fromkeys((*self.eos_token_ids, *params.stop_token_ids), -np.inf)}
        return SamplingRow(params, self.seed, output.index, self.seq.num_tokens + len(draft), seen, bias)

    @property
    def is_plain(self) -> bool:
        """Whether from now on tokens are drawn from the logits as they are, and nothing but tokens is asked for."""
        params = self.params
        return not self._changes and params.logprobs is None and len(self.output.token_ids) >= params.min_tokens

    def process(self, logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
        """What the request's logits processors make of a row of logits; theirs is what is raised, or ValueError.

        `bias`: what will then be added, which must leave something to draw too.
        """
        values = np.array(logits, np.float32)  # theirs to change
        for processor in self.params.logits_processors:
            values = processor(list(self.output.token_ids), values)
        values = np.asarray(values, np.float32)
        if values.shape != logits.shape:
            raise ValueError(f"it returned shape {values.shape} for logits of shape {logits.shape}")
        if not np.isfinite(values.max()):  # NaN, if there is one, is the maximum
            raise ValueError("it left no token to draw" if values.max() == -np.inf else "it returned NaN or infinity")
        allowed = values > -np.inf
        allowed[[token for token, value in bias.items() if value == -np.inf]] = False
        if not allowed.any():
            raise ValueError("it left no token but what logit_bias or min_tokens forbids")
        return values

    def append(self, token_id: int, score: Score | None, now: float) -> End | None:
        """Take the next token, drawn at the time `now`; how the completion ends, if this is its last one."""
        params, output, metrics = self.params, self.output, self.request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            metrics.num_cached_tokens = self.seq.num_cached
        elif metrics.last_token_time != now:
            metrics.inter_token_times.append(now - metrics.last_token_time)
        metrics.last_token_time = now
        metrics.num_generated_tokens += 1
        output.token_ids.append(token_id)
        if score is not None:
            output.logprobs.append(self.logprobs(score, params.logprobs))
            output.cumulative_logprob += output.logprobs[-1][token_id].logprob
        if self.seen is not None:
            self.seen.add(token_id)
        if token_id in params.stop_token_ids:
            return "stop", token_id
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return "stop", None
        stop = self.detokenizer.append(token_id, may_stop=len(output.token_ids) > params.min_tokens)
        output.text = self.detokenizer.text
        if stop is not None:
            return "stop", stop
        if self.seq.num_prompt_tokens + len(output.token_ids) >= self.seq.max_tokens:
            return "length", None
        return None

    def logprobs(self, score: Score, count: int) -> dict[int, Logprob]:
        """A token's own log-probability, then those of the `count` most probable ones."""
        found: dict[int, Logprob] = {}
        for token_id, logprob, rank in score[: 1 + count]:
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self.tokenizer.decode_token(token_id))
        return found

    def end(self, reason: str, stop_reason: int | str | None) -> None:
        """No more tokens, for the siblings neither that were never begun."""
        if not isinstance(stop_reason, str):
            self.detokenizer.finish()
        self.output.text = self.detokenizer.text
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason
        for output in self.siblings:
            output.finish_reason = reason
