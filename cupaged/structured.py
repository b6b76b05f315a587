"""Answers that are JSON, of a schema if there is one: which token may come next is llguidance's to say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from cupaged.errors import InvalidArgument

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from cupaged.checkpoint.tokenizer import Tokenizer
    from cupaged.llm import LLM

_tokenizers: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()  # making one takes up to a second


class JSONConstraint:
    """A logits processor that allows only what continues a JSON text of the schema, and the end once it is whole.

    Args:
        llm: whose tokens they are.
        schema: a JSON schema; {"type": "object"} for any object.

    Raises:
        InvalidArgument: llguidance is not installed, or cannot make a grammar of the schema.
    """

    def __init__(self, llm: LLM, schema: dict[str, Any]) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            cause = "response_format needs llguidance, which is not installed"
            raise InvalidArgument(f"{cause}; pip install 'cupaged[serve]'") from error
        if not llm.engine.eos_token_ids:
            raise InvalidArgument("response_format needs a model that knows how to end, and this one names no end token")
        self._tokenizer = _tokenizer(llm)
        self._eos = list(llm.engine.eos_token_ids)
        # Blanks between the parts could go on for ever.
        try:
            self._grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
            self._mask(self._matcher())
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"response_format has a schema that cannot be used ({error}); change it") from error
        self._states: dict[tuple[int, ...], LLMatcher] = {}  # after these tokens; candidates of a request have each their own

    def __call__(self, token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        """-inf for every token that may not follow `token_ids`, those generated so far."""
        matcher = self._states.pop(tuple(token_ids[:-1]), None) if token_ids else None
        new = token_ids[-1:]
        if matcher is None:  # the beginning, or two candidates that began alike
            matcher, new = self._matcher(), token_ids
        for token_id in new:
            if not matcher.is_stopped() and not matcher.consume_token(token_id):
                raise ValueError(_cause(matcher))
        allowed = np.zeros(len(logits), bool)
        if matcher.is_stopped():  # it is whole, and the request ignores ends
            allowed[self._eos] = True
        else:
            bits = np.unpackbits(np.frombuffer(self._mask(matcher), np.uint8), count=len(logits), bitorder="little")
            allowed[: len(bits)] = bits
        self._states[tuple(token_ids)] = matcher
        return np.where(allowed, logits, -np.inf)

    def _mask(self, matcher: LLMatcher) -> bytes:
        """A bit for each token that may come next; ValueError where the grammar is too much or leads nowhere."""
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(_cause(matcher))
        return mask

    def _matcher(self) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, self._grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(_cause(matcher))
        return matcher


def _cause(matcher: LLMatcher) -> str:
    text = matcher.get_error().partition("<state>")[0] or "the tokens so far do not fit the grammar"  # what follows is a dump
    return " ".join(text.split())[:300]


def constraint(llm: LLM, response_format: object) -> JSONConstraint | None:
    """What OpenAI's `response_format` asks for; None for {"type": "text"}. InvalidArgument where it is wrong."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return JSONConstraint(llm, {"type": "object"})
    if kind == "json_schema":
        wrapped = response_format.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if not isinstance(schema, dict):
            raise InvalidArgument(
                'response_format has no json_schema; give {"type": "json_schema", "json_schema": {"schema": {...}}}'
            )
        return JSONConstraint(llm, schema)
    raise InvalidArgument('response_format is of no known type; give {"type": "text"}, "json_object" or "json_schema"')


def _tokenizer(llm: LLM) -> LLTokenizer:
    from llguidance import LLTokenizer

    if llm.tokenizer not in _tokenizers:
        size = max(llm.config.vocab_size, llm.tokenizer.vocab_size)
        try:
            made = LLTokenizer(llm.tokenizer.to_json(), n_vocab=size, eos_token=list(llm.engine.eos_token_ids))
        except Exception as error:  # it says no more of what it raises
            raise InvalidArgument(
                f"response_format cannot be used with this model's tokenizer ({error}); leave it out"
            ) from error
        _tokenizers[llm.tokenizer] = made
    return _tokenizers[llm.tokenizer]
