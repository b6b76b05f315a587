"""How many the scheduler lets run at once: as many as the pool is expected to hold."""

import random
import secrets

import pytest
from test_engine_policy import run, sequence

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.scheduler import Scheduler


def serve(scheduler, lengths):
    """Add a (prompt, tokens that come, max_tokens) for each of `lengths` and run them all; how many ran at once at most."""
    ends = {}
    for number, (num_prompt, num_new, limit) in enumerate(lengths):
        seq = sequence([number, *[7] * (num_prompt - 1)], num_prompt + limit)
        ends[seq] = num_prompt + num_new
        scheduler.add(seq)
    most = 0
    while scheduler.running or scheduler.waiting:
        run(scheduler, 1)
        most = max(most, len(scheduler.running))
        for seq in [seq for seq in scheduler.running if seq.num_tokens >= ends[seq]]:
            scheduler.remove(seq)
    return most


@pytest.mark.parametrize("spare", [0, 1000])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_what_fits_at_full_length_runs_at_once_and_nobody_is_preempted(size, spare):
    rng = random.Random(secrets.randbits(32))
    lengths = [(rng.randint(1, 90), *[rng.randint(2, 60)] * 2) for _ in range(40)]
    num_blocks = sum(-(-(num_prompt + num_new) // size) for num_prompt, num_new, _ in lengths)
    scheduler = Scheduler(BlockManager(1 + num_blocks + spare, size), 40, 10**6)
    assert serve(scheduler, lengths) == 40
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("budget", [10**6, 200])
def test_of_more_than_fit_as_many_run_as_will_fit_at_full_length(budget):
    lengths = [(64, 16, 16)] * 40
    scheduler = Scheduler(BlockManager(1 + 25 * 20, 4), 40, budget)
    assert 25 <= serve(scheduler, lengths) <= 26
    assert scheduler.num_preemptions == 0


def test_a_limit_that_is_seldom_reached_keeps_nobody_waiting_for_long():
    """Until some have ended, room is kept for as many tokens as a prompt has; then for as many as those that ended had."""
    lengths = [(64, 8, 4096)] * 60
    scheduler = Scheduler(BlockManager(1 + 40 * 18, 4), 60, 10**6)
    assert serve(scheduler, lengths[:30]) >= 20
    assert serve(scheduler, lengths) >= 38
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("num_blocks", "together"), [(18, 3), (17, 2)])
def test_what_one_that_ends_gives_back_is_counted_on_but_not_before(num_blocks, together):
    scheduler = Scheduler(BlockManager(1 + num_blocks, 4), 8, 80)
    assert serve(scheduler, [(30, 2, 2), (16, 16, 16), (16, 16, 16)]) == together  # of 8 blocks each at full length
    assert scheduler.num_preemptions == 0


def test_one_that_grows_beyond_its_prompt_does_not_keep_others_out():
    """To be preempted after having generated more than is then computed again is better than to wait."""
    scheduler = Scheduler(BlockManager(1 + 100, 4), 60, 10**6)
    assert serve(scheduler, [(4, 200, 200)] * 30) >= 25


@pytest.mark.parametrize("limit", [10**9, 1])
def test_a_sequence_alone_is_always_admitted(limit):
    scheduler = Scheduler(BlockManager(5, 4), 4, 80)
    whole = sequence(range(16), 16 + limit)
    scheduler.add(whole)
    scheduler.add(sequence([5]))
    assert scheduler.schedule() == [(whole, 16)]


def test_who_waits_for_room_is_not_overtaken_by_one_that_has_it():
    scheduler = Scheduler(BlockManager(1 + 12, 4), 4, 80)
    first, large, small = sequence(range(16), 32), sequence(range(50, 70), 28), sequence([5], 6)
    for seq in (first, large, small):
        scheduler.add(seq)
    for _ in range(16):
        run(scheduler, 1)
        assert scheduler.running == [first]
    scheduler.remove(first)
    assert [seq for seq, _ in scheduler.schedule()] == [large, small]
