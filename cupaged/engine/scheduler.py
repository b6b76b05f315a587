"""Which sequences compute how many tokens in the next step. Integers only."""

from __future__ import annotations

from collections import deque

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.sequence import Sequence


class Scheduler:
    """First come, first served under a token budget: running sequences first, decodes before prefill chunks, then new ones.

    When the pool runs out, the youngest running sequence gives its blocks back and waits to be computed again (cheaply, as
    far as its full blocks are still cached). A sequence alone always fits: `Sequence.max_tokens` is at most the
    block manager's capacity.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks; one that is not here is ignored."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.blocks.release(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens to compute) pairs; their blocks are allocated. Empty only when nothing is left to do."""
        chosen: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        preempted = False
        for seq in sorted(self.running, key=lambda seq: seq.num_tokens - seq.num_computed > 1):
            if seq not in self.running:  # preempted for one before it
                continue
            count = min(seq.num_tokens - seq.num_computed, budget)
            if count == 0:
                break
            while seq in self.running and not self.blocks.grow(seq, seq.num_computed + count):
                budget += chosen.pop(self._preempt_youngest(), 0)
                preempted = True
            if seq in self.running:
                chosen[seq] = count
                budget -= count
        # Whoever had to leave in this step does not come back in it.
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            self.blocks.adopt_prefix(seq)
            count = min(seq.num_tokens - seq.num_computed, budget)
            # Admitted only when all of its tokens fit: else it would preempt, or be preempted, at once.
            if not self.blocks.grow(seq, seq.num_tokens):
                self.blocks.release(seq)
                break
            if seq.num_tokens == seq.num_prompt_tokens:
                seq.num_cached = seq.num_computed
            self.running.append(self.waiting.popleft())
            chosen[seq] = count
            budget -= count
        return list(chosen.items())

    def _preempt_youngest(self) -> Sequence:
        seq = self.running.pop()
        self.blocks.release(seq)
        self.waiting.appendleft(seq)
        return seq
