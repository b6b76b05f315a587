"""Which sequences compute how many tokens in the next step. Integers only."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.sequence import Sequence

_rank = attrgetter("priority", "arrival")


class Scheduler:
    """By priority, then first come, first served, under a token budget: running sequences first, decodes before prefill chunks.

    A waiting sequence is admitted if the pool is expected to hold it and all that run until it ends or has as many tokens
    again (`_growth`). When the pool runs out nevertheless, the youngest running sequence of the lowest priority gives its
    blocks back and waits to be computed again (cheaply, as far as its full blocks are still cached); it keeps its place among
    those that wait. A sequence alone always fits: `Sequence.max_tokens` is at most the block manager's capacity. So the first
    of the running ones moves on in every step, and each sequence finishes unless more urgent ones keep coming for ever.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both in the order of rank
        self.running: list[Sequence] = []
        self._turns: list[tuple[Sequence, int]] = []  # each of those with one token, which is what most steps consist of
        self._behind: list[Sequence] = []  # of those running, the ones with more to compute than their last token
        self.num_preemptions = 0
        self.num_looked_up = self.num_found = 0  # tokens of admitted sequences; of them, found in the prefix cache
        self._arrivals = itertools.count()
        self._refused: tuple[Sequence, int] | None = None  # who was not admitted last, and `num_releases` then
        self._num_ended = 0
        self._mean_length: float = blocks.capacity  # tokens that these generated, late ones counting more; at first, no limit
        self._usual_length = blocks.capacity  # what it was when the running ones were looked at last (`_foresee`)

    def add(self, seq: Sequence) -> None:
        self._number(seq)
        bisect.insort(self.waiting, seq, key=_rank)

    def fork(self, seq: Sequence) -> Sequence:
        """A second running sequence with the blocks of this one; it waits, without blocks, where no more may run."""
        child = self.blocks.fork(seq)
        self._number(child)
        if len(self.running) < self.max_num_seqs:
            self._enter(child)
            if seq in self._behind:
                bisect.insort(self._behind, child, key=_rank)
        else:
            self.blocks.release(child)
            bisect.insort(self.waiting, child, key=_rank)
        return child

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks; one that is not here is ignored."""
        if seq.page_table:
            self._num_ended += 1
            self._mean_length += (seq.num_tokens - seq.num_prompt_tokens - self._mean_length) / min(self._num_ended, 256)
            if abs(self._mean_length - self._usual_length) * 2 > self.blocks.block_size:
                self._usual_length = max(1, round(self._mean_length))
                for each in self.running:
                    self._foresee(each)
        for group in (self.running, self.waiting):
            place = bisect.bisect_left(group, _rank(seq), key=_rank)
            if place < len(group) and group[place] is seq:
                del group[place]
                if group is self.running:
                    del self._turns[place]
                break
        self.blocks.release(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens to compute) pairs; their blocks are allocated. Empty only when nothing is left to do.

        The tokens are those of token_ids from num_computed on, then those of the draft, which is dropped where it has no room.
        """
        budget, num_preemptions = self.max_num_batched_tokens, self.num_preemptions
        behind, self._behind = self._behind, []
        late = set(behind)
        decoding = [seq for seq in self.running if seq not in late] if late else self.running[:]
        turns = self._turns[:]
        for seq in decoding[budget:]:
            seq.draft.clear()
        del decoding[budget:]
        # One pass, not two, finds those that need more than a turn: passes over all sequences are most of what a step costs.
        special = [seq for seq in decoding if seq.num_computed >= seq.num_writable or seq.draft]
        full = [seq for seq in special if seq.num_computed >= seq.num_writable]
        if full and not self.blocks.begin_blocks(full):
            for seq in full:
                if seq.page_table:  # else it was preempted for an earlier one
                    self._grow(seq, 1)
            decoding = [seq for seq in decoding if seq.page_table]
        budget -= len(decoding)
        chunks: list[tuple[Sequence, int]] = []
        for seq in behind:
            if seq.page_table:
                count = self._chunk(seq, budget)
                if count and self._grow(seq, count):
                    chunks.append((seq, count))
                    budget -= count
            while decoding and not decoding[-1].page_table:  # preempted for this one
                decoding.pop()
                budget += 1
        if self.num_preemptions == num_preemptions:  # whoever had to leave in this step does not come back in it
            budget = self._admit(budget, chunks)
        decodes = turns if len(turns) == len(decoding) else [(seq, 1) for seq in decoding]
        if any(seq.draft for seq in special):
            self._add_drafts(decodes, budget)
        return decodes + chunks

    def reserve(self, sequences: list[Sequence]) -> list[int]:
        """Which of these decodes go on behind the token that they are about to get: their places; none if not all have room."""
        going, full = [], []
        for place, seq in enumerate(sequences):
            num_tokens = seq.num_computed + 2
            if num_tokens < seq.max_tokens:
                going.append(place)
                if num_tokens > seq.num_writable:
                    full.append(seq)
        return going if self.blocks.begin_blocks(full) else []  # or somebody is about to be preempted

    def recover(self, others: Iterable[Sequence] = ()) -> None:
        """After an exception (Ctrl-C too) at any place in a step: all sequences wait, to be computed again from their tokens.

        `others` are those with blocks that are not the scheduler's; they keep them.
        """
        mine = list(dict.fromkeys([*self.running, *self.waiting]))
        self.blocks.reconcile([*mine, *others])
        self.running, self._turns, self._behind, self.waiting = [], [], [], sorted(mine, key=_rank)
        for seq in mine:
            seq.draft.clear()
            self.blocks.release(seq)

    def _admit(self, budget: int, chosen: list[tuple[Sequence, int]]) -> int:
        """Let waiting sequences run, in order, as far as `budget` and the pool reach; what is left of the budget."""
        endings: defaultdict[int, list[int]] = defaultdict(list)  # what `_growth` has found out for all who are admitted now
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            now = (seq, self.blocks.num_releases)
            if self._refused == now or not self.blocks.admit(seq, self.running, self._growth(seq, endings)):
                self._refused = now  # a long prompt is not looked up in vain at every step
                break
            if seq.num_cached < 0:  # else it finds what it computed itself before it was preempted
                seq.num_cached = seq.num_computed
                self.num_looked_up += seq.num_tokens
                self.num_found += seq.num_computed
            self._enter(seq)
            del self.waiting[0]
            if endings:
                endings[seq.num_foreseen - len(seq.page_table)].append(len(seq.page_table))
            chosen.append((seq, self._chunk(seq, budget)))
            budget -= chosen[-1][1]
        return budget

    def _add_drafts(self, decodes: list[tuple[Sequence, int]], budget: int) -> None:
        """Guesses take what nobody else wants: they are verified whole, in blocks that are free, or not at all."""
        for place, (seq, _) in enumerate(decodes):
            count = len(seq.draft)
            if 0 < count <= budget and self.blocks.grow(seq, seq.num_tokens + count):
                decodes[place] = seq, 1 + count
                budget -= count
            else:
                seq.draft.clear()

    def _chunk(self, seq: Sequence, budget: int) -> int:
        """How many of the tokens that a running sequence is behind with are its turn now."""
        num_left = seq.num_tokens - seq.num_computed
        count = min(num_left, budget, seq.max_chunk or budget)
        if num_left - count > 1:
            bisect.insort(self._behind, seq, key=_rank)
        return count

    def _growth(self, seq: Sequence, endings: dict[int, list[int]]) -> int:
        """The most blocks that `seq` and the running ones are expected to take, less those that come back meanwhile.

        Looked at is the time until `seq` ends or has as many tokens again: from then on it has gained more by being admitted
        now than a preemption, which has it computed once more, takes. `endings` holds the blocks that each of the running ones
        has, by the number that it still takes; it is filled where it is needed first.
        """
        if not self.running:  # a sequence alone always fits
            return 0
        self._foresee(seq)
        num_pages, alive = -(-seq.num_tokens // self.blocks.block_size), len(self.running) + 1
        horizon = min(num_pages, seq.num_foreseen - num_pages)
        if num_pages + alive * horizon <= self.blocks.num_free:
            return alive * horizon
        if not endings:
            for each in self.running:
                num_held = len(each.page_table)
                if num_held > each.num_foreseen:
                    self._foresee(each)
                endings[each.num_foreseen - num_held].append(num_held)
        most = given_back = 0
        for num_taken in range(1, horizon + 1):
            ending = endings.get(num_taken - 1, ())
            alive -= len(ending)
            most = max(most, alive * num_taken - given_back)
            given_back += sum(ending)  # only now: within a block's time one may take it before another ends
        return most

    def _foresee(self, seq: Sequence) -> None:
        """Note how many blocks a sequence is expected to have when it ends.

        It generates as many tokens as others did; or twice as many if it has those, and so on; at most up to max_tokens.
        """
        usual, num_tokens = self._usual_length, len(seq.token_ids)
        end = min(num_tokens + usual - (num_tokens - seq.num_prompt_tokens) % usual, seq.max_tokens)
        seq.num_foreseen = max(-(-end // self.blocks.block_size), len(seq.page_table))  # a draft may have brought it more

    def _grow(self, seq: Sequence, count: int) -> bool:
        """Make room for the next `count` tokens of a running sequence, at the cost of later ones; False if it had to go."""
        while not self.blocks.grow(seq, seq.num_computed + count):
            if self._preempt_last() is seq:
                return False
        return True

    def _enter(self, seq: Sequence) -> None:
        """Let a sequence be one of those that run."""
        place = bisect.bisect(self.running, _rank(seq), key=_rank)
        self.running.insert(place, seq)
        self._turns.insert(place, (seq, 1))

    def _number(self, seq: Sequence) -> None:
        seq.arrival = next(self._arrivals)

    def _preempt_last(self) -> Sequence:
        seq = self.running[-1]
        bisect.insort(self.waiting, seq, key=_rank)  # always in one of the lists: see `recover`
        self.running.pop()
        self._turns.pop()
        self.blocks.release(seq)
        seq.draft.clear()
        self.num_preemptions += 1
        return seq
