"""Which sequences compute how many tokens in the next step. Integers only."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from operator import attrgetter

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.sequence import Sequence

_rank = attrgetter("priority", "arrival")


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
                break
        self.blocks.release(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens to compute) pairs; their blocks are allocated. Empty only when nothing is left to do.

        The tokens are those of token_ids from num_computed on, then those of the draft, which is dropped where it has no room.
        """
        budget, num_preemptions = self.max_num_batched_tokens, self.num_preemptions
        decodes: list[tuple[Sequence, int]] = []
        chunks: list[tuple[Sequence, int]] = []
        prefills, guessing = [], False
        enough = len(self.running) <= budget
        for seq in self.running:  # a preemption takes its last one
            missing = len(seq.token_ids) - seq.num_computed
            if missing > 1:
                prefills.append(seq)
            elif missing and (enough or len(decodes) < budget) and (seq.num_computed < seq.num_writable or self._grow(seq, 1)):
                decodes.append((seq, 1))
                if seq.draft:
                    guessing = True
            else:
                seq.draft.clear()
        budget -= len(decodes)
        for seq in prefills:
            count = min(seq.num_tokens - seq.num_computed, budget, seq.max_chunk or budget)
            if count and seq.page_table and self._grow(seq, count):
                chunks.append((seq, count))
                budget -= count
            while decodes and not decodes[-1][0].page_table:  # preempted for this one
                decodes.pop()
                budget += 1
        if self.num_preemptions == num_preemptions:  # whoever had to leave in this step does not come back in it
            budget = self._admit(budget, chunks)
        for place, (seq, _) in enumerate(decodes if guessing else ()):
            # Guesses take what nobody else wants: they are verified whole, in blocks that are free, or not at all.
            count = len(seq.draft)
            if count <= budget and self.blocks.grow(seq, seq.num_tokens + count):
                decodes[place] = seq, 1 + count
                budget -= count
            else:
                seq.draft.clear()
        return decodes + chunks

    def reserve(self, sequences: list[Sequence]) -> list[int]:
        """Which of these decodes go on behind the token that they are about to get: their places; none if not all have room."""
        going: list[int] = []
        for place, seq in enumerate(sequences):
            num_tokens = seq.num_computed + 2
            if num_tokens < seq.max_tokens:
                if num_tokens > seq.num_writable and not self.blocks.grow(seq, num_tokens):
                    return []  # somebody is about to be preempted
                going.append(place)
        return going

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

    def _admit(self, budget: int, chosen: list[tuple[Sequence, int]]) -> int:
        """Let waiting sequences run, in order, as far as `budget` and the pool reach; what is left of the budget."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self._refused == (seq, self.blocks.num_free) or not self.blocks.admit(seq, self.running):
                self._refused = (seq, self.blocks.num_free)  # a long prompt is not looked up in vain at every step
                break
            if seq.num_cached < 0:  # else it finds what it computed itself before it was preempted
                seq.num_cached = seq.num_computed
                self.num_looked_up += seq.num_tokens
                self.num_found += seq.num_computed
            bisect.insort(self.running, seq, key=_rank)
            del self.waiting[0]
            count = min(seq.num_tokens - seq.num_computed, budget, seq.max_chunk or budget)
            chosen.append((seq, count))
            budget -= count
        return budget

    def _grow(self, seq: Sequence, count: int) -> bool:
        """Make room for the next `count` tokens of a running sequence, at the cost of later ones; False if it had to go."""
        while not self.blocks.grow(seq, seq.num_computed + count):
            if self._preempt_last() is seq:
                return False
        return True

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
