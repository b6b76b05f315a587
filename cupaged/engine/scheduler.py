"""Which sequences compute how many tokens in the next step. Integers only."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.sequence import Sequence


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.priority, seq.arrival


class Scheduler:
    """By priority, then first come, first served, under a token budget: running sequences first, decodes before prefill chunks.

    When the pool runs out, the youngest running sequence of the lowest priority gives its blocks back and waits to be
    computed again (cheaply, as far as its full blocks are still cached); it keeps its place among those that wait. A sequence
    alone always fits: `Sequence.max_tokens` is at most the block manager's capacity. So the first of the running ones moves
    on in every step, and each sequence finishes unless more urgent ones keep coming for ever.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both in the order of rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_looked_up = self.num_found = 0  # tokens of admitted sequences; of them, found in the prefix cache
        self._arrivals = itertools.count()
        self._refused: tuple[Sequence, int] | None = None  # who was not admitted last, and how many blocks were free then

    def add(self, seq: Sequence) -> None:
        self._number(seq)
        bisect.insort(self.waiting, seq, key=_rank)

    def fork(self, seq: Sequence) -> Sequence:
        """A second running sequence with the blocks of this one; it waits, without blocks, where no more may run."""
        child = self.blocks.fork(seq)
        self._number(child)
        if len(self.running) < self.max_num_seqs:
            bisect.insort(self.running, child, key=_rank)
        else:
            self.blocks.release(child)
            bisect.insort(self.waiting, child, key=_rank)
        return child

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks; one that is not here is ignored."""
        for group in (self.running, self.waiting):
            place = bisect.bisect_left(group, _rank(seq), key=_rank)
            if place < len(group) and group[place] is seq:
                del group[place]
        self.blocks.release(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens to compute) pairs; their blocks are allocated. Empty only when nothing is left to do.

        The tokens are those of token_ids from num_computed on, then those of the draft, which is dropped where it has no room.
        """
        chosen: dict[Sequence, int] = {}
        preempted: set[Sequence] = set()
        budget, prefills = self.max_num_batched_tokens, []
        for seq in self.running:  # a preemption takes its last one
            missing = len(seq.token_ids) - seq.num_computed
            if missing > 1:
                prefills.append(seq)
            elif missing and budget and seq.num_computed < seq.num_writable:  # most decodes
                chosen[seq] = 1
                budget -= 1
            else:
                budget = self._choose(seq, budget, chosen, preempted)
        for seq in prefills:
            if seq not in preempted:
                budget = self._choose(seq, budget, chosen, preempted)
        if not preempted:  # whoever had to leave in this step does not come back in it
            budget = self._admit(budget, chosen)
        for seq in self.running:
            # Guesses take what nobody else wants: they are verified whole, in blocks that are free, or not at all.
            count = chosen.get(seq, 0) + len(seq.draft)
            if seq.draft and len(seq.draft) <= budget and seq in chosen and self.blocks.grow(seq, seq.num_computed + count):
                chosen[seq] = count
                budget -= len(seq.draft)
            else:
                seq.draft.clear()
        return list(chosen.items())

    def recover(self, others: Iterable[Sequence] = ()) -> None:
        """After an exception (Ctrl-C too) at any place in a step: all sequences wait, to be computed again from their tokens.

        `others` are those with blocks that are not the scheduler's; they keep them.
        """
        mine = list(dict.fromkeys([*self.running, *self.waiting]))
        self.blocks.reconcile([*mine, *others])
        self.running, self.waiting = [], sorted(mine, key=_rank)
        for seq in mine:
            seq.draft.clear()
            self.blocks.release(seq)

    def _admit(self, budget: int, chosen: dict[Sequence, int]) -> int:
        """Let waiting sequences run, in order, as far as `budget` and the pool reach; what is left of the budget."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self._refused == (seq, self.blocks.num_free) or not self.blocks.admit(seq):
                self._refused = (seq, self.blocks.num_free)  # a long prompt is not looked up in vain at every step
                break
            if seq.num_cached < 0:  # else it finds what it computed itself before it was preempted
                seq.num_cached = seq.num_computed
                self.num_looked_up += seq.num_tokens
                self.num_found += seq.num_computed
            bisect.insort(self.running, seq, key=_rank)
            del self.waiting[0]
            chosen[seq] = min(seq.num_tokens - seq.num_computed, budget, seq.max_chunk or budget)
            budget -= chosen[seq]
        return budget

    def _choose(self, seq: Sequence, budget: int, chosen: dict[Sequence, int], preempted: set[Sequence]) -> int:
        """Choose a running sequence with as many tokens as `budget` has, at the cost of later ones; what is left of it."""
        count = min(seq.num_tokens - seq.num_computed, budget, seq.max_chunk or budget)
        if count == 0:
            return budget
        while not self.blocks.grow(seq, seq.num_computed + count):
            victim = self._preempt_last()
            preempted.add(victim)
            budget += chosen.pop(victim, 0)
            if victim is seq:
                return budget
        chosen[seq] = count
        return budget - count

    def _number(self, seq: Sequence) -> None:
        seq.arrival = next(self._arrivals)

    def _preempt_last(self) -> Sequence:
        seq = self.running[-1]
        bisect.insort(self.waiting, seq, key=_rank)  # always in one of the lists: see `recover`
        self.running.pop()
        self.blocks.release(seq)
        seq.draft.clear()
        self.num_preemptions += 1
        return seq
