"""SamplingParams, and what they do to a step's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupaged.errors import InvalidArgument

LogitsProcessor = Callable[[list[int], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and defaults are vLLM's.

    Attributes:
        n: independent completions of one prompt.
        temperature: 0 takes the most probable token; otherwise, from 1e-5 on, logits are divided by it.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to this.
        min_p: keep tokens at least this share of the most probable one.
        repetition_penalty: above 1 makes tokens of prompt and output less likely.
        presence_penalty: subtracted from the logits of generated tokens.
        frequency_penalty: subtracted once for each time a token was generated.
        seed: makes the draws of this request reproducible, whatever else runs beside it.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: tokens that end the output, beside the model's own.
        min_tokens: no end of sequence before so many tokens.
        max_tokens: the most tokens to generate; None goes on until the model ends or its context is full.
        ignore_eos: go on past the model's end-of-sequence tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: log-probabilities to give with every generated token: its own, and those of so many most probable ones, at
            most 20. They are the model's, before any of the above changes them.
        prompt_logprobs: the same for the tokens of the prompt; its K/V are then not taken from the prefix cache.
        logit_bias: {token id: what is added to its logit}, from -100 to 100 or -inf.
        logits_processors: functions of (token ids generated so far, float32 logits [vocab]) that return the logits to go on
            with, or change and return the array that they get: -inf forbids a token. They run on the host, first of all that
            changes logits. One that raises ends its own request, with `RequestOutput.error`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        for name, expected in (("stop", "a string or a list of strings"), ("stop_token_ids", "a list of token ids")):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            self._check(name, isinstance(value, Sequence), expected)
            object.__setattr__(self, name, tuple(value))
        processors = () if self.logits_processors is None else self.logits_processors
        self._check("logits_processors", isinstance(processors, Sequence) and all(map(callable, processors)), "functions")
        object.__setattr__(self, "logits_processors", tuple(processors))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)

        def is_count(value: object, least: int) -> bool:
            return _is_int(value) and value >= least

        check = self._check
        check("n", is_count(self.n, 1), "a whole number of at least 1")
        check("temperature", self.temperature == 0 or _is_number(self.temperature, 1e-5, 1e4), "0, or 0.00001 to 10000")
        check("top_k", is_count(self.top_k, 0) and self.top_k < 2**31, "a whole number of at least 0 (0: off)")
        check("top_p", _is_number(self.top_p, 1e-10, 1), "above 0 and at most 1")
        check("min_p", _is_number(self.min_p, 0, 1), "between 0 and 1")
        check("repetition_penalty", _is_number(self.repetition_penalty, 1e-4, 1e4), "between 0.0001 and 10000")
        check("presence_penalty", _is_number(self.presence_penalty, -1e4, 1e4), "between -10000 and 10000")
        check("frequency_penalty", _is_number(self.frequency_penalty, -1e4, 1e4), "between -10000 and 10000")
        check("seed", self.seed is None or (_is_int(self.seed) and abs(self.seed) < 2**63), "a 64-bit number or None")
        check("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings")
        check("stop_token_ids", all(_is_int(i) for i in self.stop_token_ids), "token ids")
        check("min_tokens", is_count(self.min_tokens, 0), "a whole number of at least 0")
        check("max_tokens", self.max_tokens is None or is_count(self.max_tokens, 1), "at least 1, or None")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(name, value is None or (is_count(value, 0) and value <= 20), "a whole number from 0 to 20, or None")
        bias = self.logit_bias
        sound = isinstance(bias, Mapping) and all(
            _is_int(token) and (_is_number(value, -100, 100) or value == -np.inf) for token, value in bias.items()
        )
        check("logit_bias", bias is None or sound, "{token id: a number from -100 to 100, or -inf}")
        for name in ("ignore_eos", "skip_special_tokens"):
            check(name, isinstance(getattr(self, name), bool), "True or False")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidArgument(f"{name} is {getattr(self, name)!r}; give {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object, least: float, most: float) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and least <= value <= most


class SeenTokens:
    """The distinct tokens of a prompt and what follows it, and how often each was generated: as arrays, for penalties."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array(list(self._place), np.int32)
        self._counts = np.zeros(len(self._place), np.int32)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> np.ndarray:
        """int32 [n]"""
        return self._ids[: len(self)]

    @property
    def counts(self) -> np.ndarray:
        """int32 [n]: times generated, 0 for what is only in the prompt."""
        return self._counts[: len(self)]

    def add(self, token_id: int) -> None:
        """One more was generated."""
        place = self._place.setdefault(token_id, len(self))
        if place == len(self._ids):  # room for as many again
            self._ids, self._counts = (np.concatenate((a, np.zeros(len(a) + 8, np.int32))) for a in (self._ids, self._counts))
        self._ids[place] = token_id
        self._counts[place] += 1

    def and_also(self, token_ids: Iterable[int]) -> SeenTokens:
        """A copy with more of them."""
        copy = SeenTokens(())
        copy._place, copy._ids, copy._counts = dict(self._place), self._ids.copy(), self._counts.copy()
        for token_id in token_ids:
            copy.add(token_id)
        return copy


@dataclass
class SamplingRow:
    """What one row of logits is sampled under."""

    params: SamplingParams
    seed: int  # the request's, drawn by the engine where params.seed is None; [0, 2^64)
    candidate: int  # which of params.n
    position: int  # of the token to be drawn
    seen: SeenTokens | None  # None: no penalty asks for it
    bias: Mapping[int, float]  # distinct tokens -> what is added to their logits


DRAWS = np.dtype(  # what `ops.sample` takes for each row, in its order
    [
        *(("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32)),
        *(("seed", np.uint64), ("candidate", np.int32), ("position", np.int32)),
    ]
)


def draws(rows: list[SamplingRow]) -> np.ndarray:
    """DRAWS [R] of the rows: all that their tokens depend on, but logits, penalties and bias."""
    params = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in (row.params for row in rows)]
    values = [(*of_row, row.seed, row.candidate, row.position) for of_row, row in zip(params, rows, strict=True)]
    return np.array(values, DRAWS)


def sample(ops: ModuleType, logits: np.ndarray, rows: list[SamplingRow]) -> list[int]:
    """One token id per row of `logits`, a float32 [R, vocab] device array that is overwritten."""

    def column(values: list, dtype: type) -> np.ndarray:
        return ops.upload(np.array(values, dtype))

    params = [row.params for row in rows]
    if any(row.seen for row in rows):
        ops.penalise(
            logits,
            column(np.cumsum([0] + [len(row.seen or ()) for row in rows]), np.int32),
            ops.upload(np.concatenate([row.seen.ids for row in rows if row.seen])),
            ops.upload(np.concatenate([row.seen.counts for row in rows if row.seen])),
            column([p.repetition_penalty for p in params], np.float32),
            column([p.presence_penalty for p in params], np.float32),
            column([p.frequency_penalty for p in params], np.float32),
        )
    if any(row.bias for row in rows):
        ops.bias(
            logits,
            column(np.cumsum([0] + [len(row.bias) for row in rows]), np.int32),
            column([token for row in rows for token in row.bias], np.int32),
            column([value for row in rows for value in row.bias.values()], np.float32),
        )
    under = draws(rows)
    tokens = ops.sample(logits, *(ops.upload(np.ascontiguousarray(under[name])) for name in DRAWS.names))
    return ops.download(tokens).tolist()


Score = list[tuple[int, float, int]]  # (token id, log-probability, rank): of the token in question, then of the most probable


def score(ops: ModuleType, logits: np.ndarray, token_ids: Sequence[int], count: int) -> list[Score]:
    """Log-probabilities of one token for each row of `logits`, a float32 [R, vocab] device array, and of its `count` best."""
    tokens = np.array(token_ids, np.int32)
    count = min(count, logits.shape[1])
    best = ops.download(ops.largest(logits, count))
    asked = np.concatenate([tokens[:, None], best], axis=1)
    logprobs = ops.download(ops.logprobs(logits, ops.upload(asked)))
    ranks = np.empty(asked.shape, np.int32)
    ranks[:, 0] = ops.download(ops.ranks(logits, ops.upload(tokens)))
    ranks[:, 1:] = np.arange(1, count + 1)
    columns = zip(asked.tolist(), logprobs.tolist(), ranks.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in columns]
