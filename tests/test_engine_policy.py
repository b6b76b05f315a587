"""Block manager, scheduler and prompt lookup, rule by rule: integers, no model."""

import random
import secrets
import sys

import pytest

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence
from cupaged.engine.speculative import NgramProposer
from cupaged.errors import InvalidArgument


def sequence(token_ids, max_tokens=10**9):
    return Sequence(list(token_ids), len(token_ids), max_tokens)


def compute(blocks, seq):
    """What the engine does with a sequence whose tokens all fit."""
    assert blocks.grow(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    blocks.publish(seq)


def occupy(blocks, num_blocks):
    """A sequence beside the scheduler's, as beam search has them, takes so many blocks."""
    compute(blocks, sequence(range(1000, 1000 + num_blocks * blocks.block_size)))


def test_equal_prefixes_share_blocks_and_one_token_is_left_to_compute():
    blocks = BlockManager(20, 4)
    first = sequence(range(12))
    compute(blocks, first)
    second = sequence([*range(12), 99])
    assert blocks.admit(second)
    assert second.page_table[:3] == first.page_table[:3]
    assert second.num_computed == 12
    same = sequence(range(12))
    assert blocks.admit(same)
    assert same.num_computed == 8


def test_content_outlives_its_owner_until_the_pool_needs_it():
    blocks = BlockManager(5, 4)
    first = sequence(range(8))
    compute(blocks, first)
    blocks.release(first)
    assert blocks.num_used == 0
    assert blocks.num_cached == 2
    again = sequence([*range(8), 1])
    assert blocks.admit(again)
    assert again.num_computed == 8
    blocks.release(again)
    other = sequence(range(50, 66))
    compute(blocks, other)  # takes all four blocks
    blocks.release(other)
    lost = sequence([*range(8), 1])
    assert blocks.admit(lost)
    assert lost.num_computed == 0


def run(scheduler, num_steps, token=0):
    """Steps in which every sequence that has caught up gets `token` next."""
    for _ in range(num_steps):
        scheduled = scheduler.schedule()
        scheduler.blocks.advance(scheduled)
        for seq, _ in scheduled:
            if seq.num_computed == seq.num_tokens:
                seq.token_ids.append(token)


@pytest.mark.parametrize("num_prompt", [2, 6, 9])
@pytest.mark.parametrize("running", [True, False])
def test_what_was_generated_is_found_while_its_sequence_runs_and_after(running, num_prompt):
    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    first = sequence(range(100, 100 + num_prompt))
    scheduler.add(first)
    run(scheduler, 14 - num_prompt)  # 13 tokens are computed
    assert first.num_computed == 13
    if not running:
        scheduler.remove(first)
    second = sequence([*first.token_ids[:13], 1])
    scheduler.add(second)
    scheduler.schedule()
    assert second.num_cached == 12
    if running:
        assert second.page_table[:3] == first.page_table[:3]


def test_what_is_left_of_a_sequence_is_found_up_to_the_first_block_that_was_taken():
    scheduler = Scheduler(BlockManager(1 + 6, 4), 8, 64)
    first = sequence(range(100, 121))
    scheduler.add(first)
    run(scheduler, 1)
    scheduler.remove(first)
    assert scheduler.blocks.num_cached == 5
    other = sequence(range(12))
    assert scheduler.blocks.grow(other, 12)  # in the one that was never used, and the last two of the five
    scheduler.blocks.release(other)
    again = sequence(first.token_ids)
    assert scheduler.blocks.admit(again)
    assert again.num_computed == 12
    scheduler.blocks.validate([again])


def test_of_equal_blocks_one_is_found_and_so_is_what_follows_the_other():
    scheduler = Scheduler(BlockManager(40, 4), 8, 64)
    one, two = sequence(range(9)), sequence(range(9))
    scheduler.add(one)
    scheduler.add(two)
    run(scheduler, 1)
    assert not set(one.page_table) & set(two.page_table)
    one.token_ids[-1], two.token_ids[-1] = 50, 60
    run(scheduler, 3)
    for seq in (one, two, one):
        again = sequence([*seq.token_ids[:12], 1])
        scheduler.add(again)
        scheduler.schedule()
        assert again.num_cached == 12
        scheduler.remove(again)
        scheduler.remove(seq)
    scheduler.blocks.validate([])
    assert scheduler.blocks.num_cached == 2 + 2


def test_what_follows_a_forgotten_block_does_not_follow_what_takes_its_place():
    blocks = BlockManager(10, 4)
    one, two, filler = sequence(range(9)), sequence(range(13)), sequence(range(50, 58))
    for seq in (one, two, filler):  # side by side: the first two blocks of `two` are known as those of `one`
        compute(blocks, seq)
    second = one.page_table[1]
    blocks.release(one)
    other = sequence(range(100, 109))
    compute(blocks, other)
    assert second == other.page_table[1]
    blocks.release(other)
    blocks.release(filler)
    blocks.validate([two])
    last = sequence([*range(100, 108), *range(8, 13)])  # and then the third block of `two`
    assert blocks.admit(last)
    assert last.num_computed == 8


def test_a_block_keeps_its_key_when_a_fork_publishes_it_again():
    """In between, what came before it was lost, and computed again by somebody else: other blocks, of other numbers."""
    blocks = BlockManager(8, 1)
    other, parent = sequence([1, 2]), sequence([1, 2, 3])
    compute(blocks, other)
    parent.use_cache = False
    assert blocks.admit(parent)
    parent.num_computed = 3
    child = blocks.fork(parent)
    blocks.publish(parent)
    blocks.release(other)
    filling = sequence([5, 6, 7, 8])  # takes the blocks of `other` too
    assert blocks.admit(filling)
    blocks.release(filling)
    again = sequence([1, 2])
    compute(blocks, again)
    blocks.publish(child)
    blocks.validate([parent, child, again])


def test_one_that_ended_in_the_step_is_passed_over():
    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    one, two = sequence(range(9)), sequence(range(50, 59))
    scheduler.add(one)
    scheduler.add(two)
    scheduled = scheduler.schedule()
    scheduler.remove(one)
    scheduler.blocks.advance(scheduled)
    assert two.num_computed == 9
    scheduler.remove(one)
    scheduler.remove(two)
    assert (scheduler.blocks.num_used, scheduler.blocks.num_cached) == (0, 2)
    scheduler.blocks.validate([])


@pytest.mark.parametrize("num_blocks", [6, 5])
def test_room_for_the_step_ahead_is_for_all_who_go_on_or_for_nobody(num_blocks):
    scheduler = Scheduler(BlockManager(num_blocks + 3, 4), 8, 64)
    sequences = [sequence(range(10 * i, 10 * i + 3), most) for i, most in enumerate((9, 5, 9))]
    for seq in sequences:
        scheduler.add(seq)
    run(scheduler, 1)
    occupy(scheduler.blocks, 3)
    assert scheduler.schedule() == [(seq, 1) for seq in sequences]
    assert scheduler.reserve(sequences) == ([0, 2] if num_blocks == 6 else [])  # the next token of the second is its last
    assert len(sequences[1].page_table) == 1


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    blocks = BlockManager(5, 4)
    first = sequence(range(16))
    compute(blocks, first)
    blocks.release(first)
    other = sequence([7])
    assert blocks.grow(other, 1)
    blocks.release(other)
    again = sequence([*range(16)])
    assert blocks.admit(again)
    assert again.num_computed == 12


def test_the_least_recently_used_content_is_lost_first():
    blocks = BlockManager(8, 4)
    one, two, three = ([*range(start, start + 4), 0] for start in (10, 20, 30))

    def num_found(prompt):
        seq = sequence(prompt)
        assert blocks.admit(seq)
        found, seq.num_computed = seq.num_computed, 5
        blocks.publish(seq)
        blocks.release(seq)
        return found

    assert [num_found(prompt) for prompt in (one, two, three, one)] == [0, 0, 0, 4]
    other = sequence(range(50, 67))
    compute(blocks, other)  # four blocks have nothing to lose, and one more is needed
    blocks.release(other)
    assert [num_found(prompt) for prompt in (one, three, two)] == [4, 4, 0]


def test_what_a_block_costs_does_not_depend_on_the_pool():
    """Counted in lines of Python; what those call takes constant time too."""

    def lines(num_blocks):
        blocks = BlockManager(num_blocks, 1)
        full, seq, count = sequence(range(num_blocks - 1)), sequence([0]), 0
        compute(blocks, full)
        blocks.release(full)
        assert blocks.num_cached == num_blocks - 1

        def trace(frame, event, _):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            blocks.admit(seq)
            blocks.advance([(seq, 1)])
            seq.token_ids.append(10**6)
            blocks.grow(seq, 2)
            blocks.advance([(seq, 1)])
            blocks.release(seq)
        finally:
            sys.settrace(before)
        return count

    assert lines(10) == lines(10_000)


def test_a_different_token_anywhere_before_is_a_different_block():
    blocks = BlockManager(20, 4)
    compute(blocks, sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    other = sequence([9, 2, 3, 4, 5, 6, 7, 8, 0])
    assert blocks.admit(other)
    assert other.num_computed == 0


def test_without_caching_nothing_is_shared():
    blocks = BlockManager(20, 4, enable_prefix_caching=False)
    compute(blocks, sequence(range(8)))
    other = sequence(range(9))
    assert blocks.admit(other)
    assert other.num_computed == 0


def test_a_sequence_that_does_not_fit_is_not_admitted_and_changes_nothing():
    blocks = BlockManager(5, 4)
    compute(blocks, sequence(range(9)))
    seq = sequence([*range(8), *range(100, 106)])  # two blocks are there, two more are needed
    assert not blocks.admit(seq)
    assert not seq.page_table
    assert blocks.num_used == 3


def test_a_sequence_that_was_interrupted_waits_to_be_computed_again():
    blocks = BlockManager(20, 4)
    scheduler = Scheduler(blocks, 8, 64)
    one, two = sequence(range(9)), sequence(range(50, 60))
    scheduler.add(one)
    scheduler.add(two)
    scheduler.schedule()
    scheduler.recover()
    assert scheduler.running == []
    assert scheduler.waiting == [one, two]
    assert blocks.num_used == 0
    assert scheduler.schedule() == [(one, 9), (two, 10)]


def test_growing_beyond_the_pool_changes_nothing():
    blocks = BlockManager(4, 4)
    seq = sequence(range(20))
    assert not blocks.grow(seq, 20)
    assert not seq.page_table
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
    blocks = BlockManager(5 + 4, 2)
    scheduler = Scheduler(blocks, 8, 64)
    old, young = sequence([1, 2, 3, 4]), sequence([5, 6, 7, 8])
    scheduler.add(old)
    scheduler.add(young)
    for seq, count in scheduler.schedule():
        seq.num_computed += count
        blocks.publish(seq)
        seq.token_ids.append(9)
    occupy(blocks, 4)
    assert scheduler.schedule() == [(old, 1)]
    assert list(scheduler.waiting) == [young]
    scheduler.remove(old)
    assert scheduler.schedule() == [(young, 3)]  # its first block was still there, the second was taken


def test_a_fork_shares_blocks_and_the_first_to_write_takes_a_copy():
    blocks = BlockManager(10, 4)
    parent = sequence(range(6))
    compute(blocks, parent)
    child = blocks.fork(parent)
    assert child.page_table == parent.page_table
    assert blocks.num_used == 2
    parent.token_ids.append(6)
    child.token_ids.append(7)
    assert blocks.grow(parent, 7)
    assert blocks.grow(child, 7)  # by now the partial block is the child's alone
    assert blocks.copies() == [(child.page_table[1], parent.page_table[1])]
    assert child.page_table[0] == parent.page_table[0]
    blocks.validate([parent, child])
    blocks.copied()
    assert blocks.copies() == []
    blocks.validate([parent, child])
    assert blocks.num_used == 3


def test_a_fork_needs_a_block_for_each_that_it_shares_and_may_write_to():
    blocks = BlockManager(5, 4)
    parent = sequence(range(6))
    compute(blocks, parent)
    assert blocks.grow(parent, 9)  # one block more than there are tokens for
    child = blocks.fork(parent)
    child.token_ids.append(7)
    assert not blocks.grow(child, 7)
    assert child.page_table == parent.page_table
    blocks.validate([parent, child])


def test_the_source_of_a_copy_is_kept_until_it_is_made():
    blocks = BlockManager(10, 4)
    parent = sequence(range(6))
    compute(blocks, parent)
    child = blocks.fork(parent)
    child.token_ids.append(7)
    assert blocks.grow(child, 7)
    [(source, _)] = blocks.copies()
    blocks.release(parent)
    greedy = sequence(range(100, 128))
    assert not blocks.grow(greedy, 28)
    assert blocks.grow(greedy, 24)
    assert source not in greedy.page_table
    blocks.copied()
    assert blocks.grow(greedy, 28)


def test_rejected_guesses_give_their_blocks_back():
    blocks = BlockManager(10, 2)
    seq = sequence([1, 2, 3])
    compute(blocks, seq)
    assert blocks.grow(seq, 8)
    seq.num_computed = 8
    blocks.shrink(seq, 3)
    assert (seq.num_computed, len(seq.page_table)) == (3, 2)
    blocks.validate([seq])


def test_a_draft_that_does_not_fit_is_dropped_and_the_turn_kept():
    blocks = BlockManager(3, 2)
    scheduler = Scheduler(blocks, 4, 64)
    seq = sequence([1, 2, 3], 4)
    scheduler.add(seq)
    scheduler.schedule()
    seq.num_computed = 3
    seq.token_ids.append(4)
    seq.draft = [5, 6, 7]
    assert scheduler.schedule() == [(seq, 1)]
    assert seq.draft == []


def test_a_draft_without_a_turn_is_dropped():
    scheduler = Scheduler(BlockManager(20, 4), 4, 6)
    sequences = [sequence([1, 2, 3]), sequence([4, 5, 6])]
    for seq in sequences:
        scheduler.add(seq)
    run(scheduler, 1)
    scheduler.max_num_batched_tokens = 1
    for seq in sequences:
        seq.draft = [7]
    assert scheduler.schedule() == [(sequences[0], 1)]
    assert [seq.draft for seq in sequences] == [[], []]


@pytest.mark.parametrize("max_chunk", [None, 1], ids=["decode", "prefill"])
def test_one_that_makes_room_for_an_earlier_prefill_loses_its_turn(max_chunk):
    blocks = BlockManager(7, 4)
    scheduler = Scheduler(blocks, 4, 16)
    parent, young = sequence(range(10)), sequence([1, 2, 3])
    parent.max_chunk, young.max_chunk, young.priority = 1, max_chunk, 1
    for seq in (parent, young):
        scheduler.add(seq)
    run(scheduler, 1)
    child = scheduler.fork(parent)  # which will write to each of the three blocks that they share
    assert blocks.num_free == 2
    assert scheduler.schedule() == [(parent, 1), (child, 1)]
    assert scheduler.waiting == [young]
    blocks.copied()
    blocks.validate([parent, child, young])


def test_priority_goes_before_arrival_and_the_least_urgent_makes_room():
    blocks = BlockManager(5 + 4, 2)
    scheduler = Scheduler(blocks, 8, 64)
    first, urgent = sequence([1, 2, 3, 4]), sequence([5, 6, 7, 8])
    urgent.priority = -1
    scheduler.add(first)
    scheduler.add(urgent)
    assert [seq for seq, _ in scheduler.schedule()] == [urgent, first]
    for seq in (urgent, first):
        seq.num_computed = 4
        seq.token_ids.append(9)
    occupy(blocks, 4)
    assert scheduler.schedule() == [(urgent, 1)]
    assert scheduler.waiting == [first]
    assert scheduler.num_preemptions == 1


def test_the_peak_is_remembered():
    blocks = BlockManager(20, 4)
    one, two = sequence(range(9)), sequence(range(20, 25))
    for seq in (one, two):
        compute(blocks, seq)
    assert blocks.peak_used == 5
    blocks.release(one)
    assert blocks.grow(two, 9)
    assert (blocks.num_used, blocks.peak_used) == (3, 5)
    blocks.shrink(two, 1)
    assert (blocks.num_used, blocks.peak_used) == (1, 5)


def test_waste_is_what_used_blocks_do_not_hold():
    blocks = BlockManager(20, 4)
    one = sequence(range(6))
    compute(blocks, one)
    fork = blocks.fork(one)
    other = sequence(range(100, 109))
    compute(blocks, other)
    assert blocks.unused_slots([one, fork, other]) == 2 + 3
    assert blocks.num_used == 2 + 3


def test_hits_are_counted_once_for_each_admission():
    blocks = BlockManager(20, 4)
    scheduler = Scheduler(blocks, 8, 64)
    for _ in range(2):
        seq = sequence(range(9))
        scheduler.add(seq)
        for _, count in scheduler.schedule():
            seq.num_computed += count
        blocks.publish(seq)
        scheduler.remove(seq)
    assert (scheduler.num_looked_up, scheduler.num_found) == (18, 8)


def test_prompt_lookup_guesses_what_followed_the_longest_repeated_ending():
    proposer = NgramProposer(num_tokens=3)
    seq = sequence([5, 1, 2, 3, 9, 8, 7, 4, 3, 6, 1, 2, 3])
    assert proposer.propose(seq, 10) == [9, 8, 7]  # after 1 2 3, not after the later 3
    assert proposer.propose(seq, 1) == [9]
    seq.token_ids.append(0)
    assert proposer.propose(seq, 10) == []
    seq.token_ids += [4, 4]
    assert proposer.propose(seq, 10) == [4, 4, 4]  # runs on into the guesses
    with pytest.raises(InvalidArgument, match="num_tokens"):
        NgramProposer(num_tokens=0)


def test_prompt_lookup_is_what_a_search_would_find():
    rng = random.Random(secrets.randbits(32))
    proposer, seq = NgramProposer(num_tokens=2, longest=3), sequence([0])
    for _ in range(300):
        tokens = seq.token_ids
        expected = []
        for length in (3, 2, 1):
            ends = [i for i in range(length, len(tokens)) if tokens[i - length : i] == tokens[-length:]]
            if ends:
                start = ends[-1]
                more = tokens[start:]
                expected = (more * 2)[:2]
                break
        assert proposer.propose(seq, 2) == expected
        tokens.append(rng.randint(0, 3))


def test_guesses_take_no_budget_from_decodes_nor_blocks_from_anyone():
    blocks = BlockManager(1 + 64 * 3, 4)
    scheduler = Scheduler(blocks, 64, 80)
    sequences = [sequence(range(100 * i, 100 * i + 5), 12) for i in range(64)]
    for seq in sequences:
        scheduler.add(seq)
    for step in range(40):
        for seq in scheduler.running:
            if seq.num_tokens - seq.num_computed == 1:
                seq.draft = [7] * 15
        for seq, count in scheduler.schedule():
            seq.draft.clear()  # all wrong
            seq.num_computed = min(seq.num_computed + count, seq.num_tokens)
            blocks.shrink(seq, seq.num_tokens)
            if seq.num_computed == seq.num_tokens < 12:
                seq.token_ids.append(step)
            elif seq.num_computed == 12:
                blocks.fork(seq)  # and its blocks stay taken
                scheduler.remove(seq)
    assert scheduler.num_preemptions == 0
    assert {seq.num_tokens for seq in sequences} == {12}


def test_a_guess_that_finds_no_block_is_dropped():
    blocks = BlockManager(3 + 2, 4)
    scheduler = Scheduler(blocks, 2, 80)
    first, second = sequence([1, 2, 3]), sequence([4, 5, 6])
    for seq in (first, second):
        scheduler.add(seq)
    for seq, count in scheduler.schedule():
        seq.num_computed += count
        seq.token_ids.append(9)
        seq.draft = [8, 8]
    occupy(blocks, 2)
    assert scheduler.schedule() == [(first, 1), (second, 1)]
    assert first.draft == second.draft == []


def test_a_prompt_that_found_no_room_is_admitted_once_there_is_some():
    blocks = BlockManager(4, 4)
    scheduler = Scheduler(blocks, 4, 80)
    first, second = sequence(range(8)), sequence(range(50, 58))
    for seq in (first, second):
        scheduler.add(seq)
    for _ in range(3):
        for seq, count in scheduler.schedule():
            seq.num_computed += count
            assert seq is first
    scheduler.remove(first)
    assert scheduler.schedule() == [(second, 8)]
