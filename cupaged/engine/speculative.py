"""Guesses of the next tokens, cheap to make; the engine verifies them in one step. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from cupaged.engine.sequence import Sequence
from cupaged.errors import InvalidArgument

_ENTRIES = 4096  # tokens that enter an index in one step, in about 2 ms


class Proposer(Protocol):
    """What guesses: prompt lookup below, a draft model some day."""

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow `seq.token_ids`; none if there is no good guess."""
        ...


@dataclass
class _Index:
    after: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position behind its latest occurrence
    num_tokens: int = 0  # that have been entered as followers


class NgramProposer:
    """Prompt lookup (Saxena 2023): what followed the latest occurrence of the last tokens, the longest n-gram first.

    Every token is entered once into the sequence's index, so a step costs the same however long the sequence is. Of a long
    prompt a step enters _ENTRIES tokens, and there are no guesses before all are in.

    Args:
        num_tokens: guessed at once, at most.
        longest, shortest: lengths of the n-grams that are looked up.
    """

    def __init__(self, num_tokens: int = 4, longest: int = 3, shortest: int = 1) -> None:
        for name, value, least in (("num_tokens", num_tokens, 1), ("shortest", shortest, 1), ("longest", longest, shortest)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least {least}")
        self.num_tokens, self.lengths = num_tokens, range(longest, shortest - 1, -1)
        self._indices: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        tokens = seq.token_ids
        index = self._indices.setdefault(seq, _Index())
        stop = min(len(tokens), index.num_tokens + _ENTRIES)
        for position in range(index.num_tokens, stop):
            for length in self.lengths:
                if length <= position:
                    index.after[tuple(tokens[position - length : position])] = position
        index.num_tokens = stop
        if stop < len(tokens):
            return []
        for length in self.lengths:
            start = index.after.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if start is not None:
                draft: list[int] = []
                for position in range(start, start + min(limit, self.num_tokens)):  # runs on into the guesses themselves
                    draft.append(tokens[position] if position < len(tokens) else draft[position - len(tokens)])
                return draft
        return []
