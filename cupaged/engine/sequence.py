"""One token sequence on its way through the engine: integers only."""

from __future__ import annotations

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
    page_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens that were found in the pool when it was admitted
    num_published: int = 0  # leading full blocks that the block manager knows by content
    content_hash: bytes = b""  # of those blocks

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
