"""One token sequence on its way through the engine: integers only."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it.

    Invariant: the K/V of the first `num_computed` tokens are in the pool, in the blocks of `page_table`. The engine
    computes tokens until `num_computed` has caught up with `num_tokens`, then draws the next one: prefill, decode and
    recomputation after a preemption are the same thing.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int  # ends when it holds so many tokens, prompt included
    priority: int = 0  # the smaller goes first
    max_chunk: int | None = None  # tokens that may be computed in one step; None: as many as the step has room for
    use_cache: bool = True  # whether blocks of an equal prefix may be taken over
    arrival: int = -1  # the scheduler's count of sequences when this one came: orders those of equal priority
    page_table: array[int] = field(default_factory=lambda: array("i"))  # int32, to be copied to the device as it is
    num_computed: int = 0
    draft: list[int] = field(default_factory=list)  # guesses of the tokens after token_ids, to be verified in the next step
    num_writable: int = 0  # from num_computed up to here there is room, in blocks that no other sequence has
    num_cached: int = -1  # tokens that were found in the pool when it was admitted first; -1: not admitted yet
    num_published: int = 0  # leading tokens, in full blocks that can be found by their content
    num_foreseen: int = 0  # blocks that it is expected to have when it ends: see the scheduler

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
