"""Block manager and scheduler as integers: properties over random histories, no model."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence


def sequence(token_ids, max_tokens=10**9):
    return Sequence(list(token_ids), len(token_ids), max_tokens)


def compute(blocks, seq):
    """What the engine does with a sequence whose tokens all fit."""
    assert blocks.grow(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    blocks.publish(seq)


class Serving(RuleBasedStateMachine):
    """Requests come, run and leave in any order; the pool's content is modelled by what each slot was last written with."""

    def __init__(self):
        super().__init__()
        self.sequences = []
        self.written = {}  # (block, slot) -> all tokens up to and including the one whose K/V it holds

    def start(self, num_blocks, block_size, max_num_seqs, budget, caching):
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget)

    @precondition(lambda self: not hasattr(self, "blocks"))
    @rule(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.booleans(),
    )
    def configure(self, num_blocks, block_size, max_num_seqs, budget, caching):
        self.start(num_blocks, block_size, max_num_seqs, budget, caching)

    @precondition(lambda self: hasattr(self, "blocks"))
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), extra=st.integers(1, 10))
    def add(self, prompt, extra):
        prompt = prompt[: self.blocks.capacity]
        seq = sequence(prompt, min(len(prompt) + extra, self.blocks.capacity))
        self.sequences.append(seq)
        self.scheduler.add(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.sequences))
        self.scheduler.remove(seq)
        self.sequences.remove(seq)

    @precondition(lambda self: hasattr(self, "blocks"))
    @rule(token=st.integers(0, 1))
    def step(self, token):
        scheduled = self.scheduler.schedule()
        assert bool(scheduled) == bool(self.sequences), "a step with work to do does some"
        assert sum(count for _, count in scheduled) <= self.scheduler.max_num_batched_tokens
        assert len(scheduled) <= self.scheduler.max_num_seqs
        size = self.blocks.block_size
        for seq, count in scheduled:
            assert count > 0
            for position in range(seq.num_computed, seq.num_computed + count):
                self.written[seq.page_table[position // size], position % size] = tuple(seq.token_ids[: position + 1])
        for seq, count in scheduled:
            seq.num_computed += count
            # Attention reads every position up to here: each slot must hold this sequence's own history.
            for position in range(seq.num_computed):
                found = self.written[seq.page_table[position // size], position % size]
                assert found == tuple(seq.token_ids[: position + 1])
            self.blocks.publish(seq)
        for seq, _ in scheduled:
            if seq.num_computed == seq.num_tokens:
                seq.token_ids.append(token)
                if seq.num_tokens >= seq.max_tokens:
                    self.scheduler.remove(seq)
                    self.sequences.remove(seq)

    @invariant()
    def books_agree(self):
        if hasattr(self, "blocks"):
            self.blocks.validate(self.sequences)

    def teardown(self):
        """Whatever happened, everything finishes and nothing is leaked."""
        if not hasattr(self, "blocks"):
            return
        for _ in range(2000):
            if not self.sequences:
                break
            self.step(token=0)
        assert not self.sequences
        assert self.blocks.num_used == 0
        assert self.blocks.num_free == self.blocks.num_blocks - 1


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_equal_prefixes_share_blocks_and_one_token_is_left_to_compute():
    blocks = BlockManager(20, 4)
    first = sequence(range(12))
    compute(blocks, first)
    second = sequence([*range(12), 99])
    blocks.adopt_prefix(second)
    assert second.page_table == first.page_table[:3]
    same = sequence(range(12))
    blocks.adopt_prefix(same)
    assert same.num_computed == 8


def test_content_outlives_its_owner_until_the_pool_needs_it():
    blocks = BlockManager(5, 4)
    first = sequence(range(8))
    compute(blocks, first)
    blocks.release(first)
    assert blocks.num_used == 0
    assert blocks.num_cached == 2
    again = sequence([*range(8), 1])
    blocks.adopt_prefix(again)
    assert again.num_computed == 8
    blocks.release(again)
    compute(blocks, sequence(range(50, 66)))  # takes all four blocks
    lost = sequence([*range(8), 1])
    blocks.adopt_prefix(lost)
    assert lost.num_computed == 0


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    blocks = BlockManager(4, 4)
    first = sequence(range(12))
    compute(blocks, first)
    blocks.release(first)
    other = sequence([7])
    assert blocks.grow(other, 1)
    again = sequence(range(12))
    blocks.adopt_prefix(again)
    assert again.num_computed == 8


def test_a_different_token_anywhere_before_is_a_different_block():
    blocks = BlockManager(20, 4)
    compute(blocks, sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    other = sequence([9, 2, 3, 4, 5, 6, 7, 8, 0])
    blocks.adopt_prefix(other)
    assert other.page_table == []


def test_without_caching_nothing_is_shared():
    blocks = BlockManager(20, 4, enable_prefix_caching=False)
    compute(blocks, sequence(range(8)))
    other = sequence(range(9))
    blocks.adopt_prefix(other)
    assert other.page_table == []


def test_growing_beyond_the_pool_changes_nothing():
    blocks = BlockManager(4, 4)
    seq = sequence(range(20))
    assert not blocks.grow(seq, 20)
    assert seq.page_table == []
    blocks.validate([seq])


@pytest.mark.parametrize("budget", [1, 3, 64])
def test_decodes_go_before_prefill_chunks(budget):
    scheduler = Scheduler(BlockManager(100, 4), 8, budget)
    old, new = sequence(range(4)), sequence(range(100, 130))
    scheduler.add(old)
    while old.num_computed < 4:
        for seq, count in scheduler.schedule():
            seq.num_computed += count
    old.token_ids.append(0)
    scheduler.add(new)
    scheduled = scheduler.schedule()
    assert scheduled[0] == (old, 1)
    assert sum(count for _, count in scheduled) == min(budget, 31)


def test_the_youngest_makes_room_and_comes_back():
    blocks = BlockManager(5, 2)
    scheduler = Scheduler(blocks, 8, 64)
    old, young = sequence([1, 2, 3, 4]), sequence([5, 6, 7, 8])
    scheduler.add(old)
    scheduler.add(young)
    for seq, count in scheduler.schedule():
        seq.num_computed += count
        blocks.publish(seq)
        seq.token_ids.append(9)
    assert scheduler.schedule() == [(old, 1)]
    assert list(scheduler.waiting) == [young]
    scheduler.remove(old)
    assert scheduler.schedule() == [(young, young.num_tokens - young.num_computed)]
