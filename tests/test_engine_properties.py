"""Block manager and scheduler over random histories, interrupted ones too: integers, no model."""

import contextlib
import random
import secrets
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cupaged.engine import scheduler as scheduler_module
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence

POLICY = {str(Path(scheduler_module.__file__).with_name(name)) for name in ("scheduler.py", "block_manager.py")}


def rank(seq):
    return seq.priority, seq.arrival


class History:
    """Requests come, run, fork and leave; the pool's content is modelled by what each slot was last written with."""

    def __init__(self, num_blocks, block_size, max_num_seqs, budget, caching):
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget)
        self.sequences = []  # of the scheduler
        self.held = []  # with blocks, beside the scheduler's
        self.written = {}  # (block, slot) -> all tokens up to and including the one whose K/V it holds

    def add(self, prompt, extra, priority=0, max_chunk=None, use_cache=True):
        prompt = prompt[: self.blocks.capacity]
        most = min(len(prompt) + extra, self.blocks.capacity)
        seq = Sequence(list(prompt), len(prompt), most, priority, max_chunk, use_cache)
        self.sequences.append(seq)
        self.scheduler.add(seq)

    def abort(self, seq):
        self.scheduler.remove(seq)
        self.sequences.remove(seq)

    def hold(self, prompt):
        """A sequence beside the scheduler's, its tokens computed; nothing where the pool has no room."""
        seq = Sequence(list(prompt), len(prompt), len(prompt))
        if self.blocks.admit(seq):
            self._compute([(seq, len(prompt) - seq.num_computed)])
            seq.num_computed = len(prompt)
            self.blocks.publish(seq)
            self.held.append(seq)

    def fork_held(self, token):
        """As a beam does: two continue where one was, and each writes behind what they share."""
        seq = self.held[-1]
        child = self.blocks.fork(seq)
        self.held.append(child)
        for one, end in ((child, token), (seq, 1 - token)):
            one.token_ids.append(end)
            if self.blocks.grow(one, one.num_tokens):
                self._compute([(one, 1)])
                one.num_computed += 1
                self.blocks.publish(one)
            else:
                self.drop(one)

    def drop(self, seq):
        self.blocks.release(seq)
        self.held.remove(seq)

    def step(self, token, guesses=(), right=0, fork=False):
        """One step of the engine: every caught-up sequence guesses `guesses`, of which the first `right` are accepted.

        Where all sequences decode and nobody guesses, room is reserved for the step ahead.
        """
        for seq in self.scheduler.running:
            if seq.num_tokens - seq.num_computed == 1:
                seq.draft = list(guesses[: seq.max_tokens - seq.num_tokens - 1])
        decoding = [seq for seq in self.scheduler.running if seq.num_tokens - seq.num_computed == 1]
        before = set(self.scheduler.running)
        scheduled = self.scheduler.schedule()
        self._check_order(before)
        assert self.held or bool(scheduled) == bool(self.sequences), "a step with work to do does some"
        assert sum(count for _, count in scheduled) <= self.scheduler.max_num_batched_tokens
        assert len(scheduled) <= len(self.scheduler.running) <= self.scheduler.max_num_seqs
        assert all(seq in self.scheduler.running for seq, _ in scheduled)
        if any(seq not in decoding or count > 1 for seq, count in scheduled):
            left_out = set(decoding) - {seq for seq, _ in scheduled}
            assert not left_out & set(self.scheduler.running), "prefill or a guess went before a decode"
        if not guesses and all(seq in decoding for seq, _ in scheduled):
            self._reserve([seq for seq, _ in scheduled])
        self._compute(scheduled)
        self.blocks.advance(scheduled)
        for seq, _ in scheduled:
            if seq.num_computed < seq.num_tokens:
                continue
            if seq.draft:
                seq.token_ids += seq.draft[:right]
                seq.draft = []
                self.blocks.shrink(seq, seq.num_tokens)
                self.blocks.publish(seq)
            if fork and seq.num_tokens + 1 < seq.max_tokens:
                child = self.scheduler.fork(seq)
                child.token_ids.append(1 - token)
                self.sequences.append(child)
            seq.token_ids.append(token)
            if seq.num_tokens >= seq.max_tokens:
                self.abort(seq)

    def interrupt(self, rng):
        """Ctrl-C at some line of what the engine calls; whatever was lost on the way is as if it had not been called."""
        seq = rng.choice(self.sequences)
        if rng.random() < 0.3 and seq in self.scheduler.running:
            self.blocks.fork(seq)  # and lost at once

        def whole_step():
            scheduled = self.scheduler.schedule()
            self._compute(scheduled)
            self.blocks.advance(scheduled)

        call = rng.choice([whole_step, lambda: self.scheduler.remove(seq), lambda: self.scheduler.fork(seq)])
        if call is not whole_step and seq not in self.scheduler.running:
            call = whole_step
        with contextlib.suppress(KeyboardInterrupt), interrupted_after(rng.randint(1, rng.choice([60, 400]))):
            call()
        self.scheduler.recover(self.held)
        forks = [one for one in self.scheduler.waiting if one not in self.sequences]
        for one in forks:
            self.scheduler.remove(one)
        if seq not in self.scheduler.waiting:
            self.sequences.remove(seq)
        assert set(self.scheduler.waiting) == set(self.sequences), "lost one"
        assert self.scheduler.waiting == sorted(self.sequences, key=rank)
        self.validate()

    def finish(self):
        """Whatever happened, everything ends and nothing is leaked."""
        for seq in list(self.held):
            self.drop(seq)
        for _ in range(2000):
            if not self.sequences:
                break
            self.step(token=0)
        assert not self.sequences
        assert self.blocks.num_used == 0
        assert self.blocks.num_free == self.blocks.num_blocks - 1

    def validate(self):
        self.blocks.validate([*self.sequences, *self.held])

    def _compute(self, scheduled):
        size = self.blocks.block_size
        for source, target in self.blocks.copies():
            for slot in range(size):
                self.written[target, slot] = self.written.get((source, slot))
        self.blocks.copied()
        writers = set()
        for seq, count in scheduled:
            assert count > 0
            assert seq.num_computed + count <= max(seq.max_tokens, seq.num_tokens)
            tokens = (*seq.token_ids, *seq.draft)
            for position in range(seq.num_computed, seq.num_computed + count):
                place = seq.page_table[position // size], position % size
                assert place not in writers, "two sequences write to one slot"
                assert place[0] != 0
                writers.add(place)
                self.written[place] = tokens[: position + 1]
        for seq, count in scheduled:
            tokens = (*seq.token_ids, *seq.draft)
            # Attention reads every position up to here: each slot must hold this sequence's own history.
            for position in range(seq.num_computed + count):
                assert self.written[seq.page_table[position // size], position % size] == tokens[: position + 1]

    def _check_order(self, running_before):
        """Who came in or stayed goes before whoever waits; who was put out, behind all that went on."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        entered = [rank(seq) for seq in running if seq not in running_before]
        assert not entered or not waiting or max(entered) < min(map(rank, waiting)), "somebody was overtaken"
        put_out = [rank(seq) for seq in waiting if seq in running_before]
        assert not put_out or max(map(rank, running), default=(-1, -1)) < min(put_out), "not the youngest made room"

    def _reserve(self, sequences):
        going = [place for place, seq in enumerate(sequences) if seq.num_tokens + 1 < seq.max_tokens]
        places = self.scheduler.reserve(sequences)
        assert places in (going, [])
        assert all(sequences[place].num_writable > sequences[place].num_tokens for place in places)
        assert places or not going or self.blocks.num_free < len(going)


@contextlib.contextmanager
def interrupted_after(num_lines):
    """KeyboardInterrupt before the `num_lines`-th line of policy that runs inside."""
    left = num_lines

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in POLICY:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Serving(RuleBasedStateMachine):
    """Any history of a small pool, step by step."""

    history = None

    @precondition(lambda self: self.history is None)
    @rule(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.booleans(),
    )
    def configure(self, **sizes):
        self.history = History(**sizes)

    @precondition(lambda self: self.history)
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        extra=st.integers(1, 10),
        priority=st.integers(0, 2),
        max_chunk=st.sampled_from([None, 1, 3]),
        use_cache=st.booleans(),
    )
    def add(self, **request):
        self.history.add(**request)

    @precondition(lambda self: self.history and self.history.sequences)
    @rule(data=st.data())
    def abort(self, data):
        self.history.abort(data.draw(st.sampled_from(self.history.sequences)))

    @precondition(lambda self: self.history)
    @rule(token=st.integers(0, 1), guesses=st.lists(st.integers(0, 1), max_size=4), right=st.integers(0, 4), fork=st.booleans())
    def step(self, token, guesses, right, fork):
        self.history.step(token, guesses, right, fork and len(self.history.sequences) < 8)

    @precondition(lambda self: self.history and len(self.history.held) < 3)
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def hold(self, prompt):
        self.history.hold(prompt)

    @precondition(lambda self: self.history and 0 < len(self.history.held) < 5)
    @rule(token=st.integers(0, 1))
    def fork_held(self, token):
        self.history.fork_held(token)

    @precondition(lambda self: self.history and self.history.held)
    @rule(data=st.data())
    def drop(self, data):
        self.history.drop(data.draw(st.sampled_from(self.history.held)))

    @precondition(lambda self: self.history and self.history.sequences)
    @rule(seed=st.integers(0, 2**32))
    def interrupt(self, seed):
        self.history.interrupt(random.Random(seed))

    @invariant()
    def books_agree(self):
        if self.history:
            self.history.validate()

    def teardown(self):
        if self.history:
            self.history.finish()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_hundred_thousand_random_steps():
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    steps = preemptions = 0
    while steps < 100_000:
        num_blocks = rng.randint(2, 40)
        sizes = (num_blocks, rng.choice([1, 2, 4, 16]), rng.randint(1, 8), rng.randint(1, 40), rng.random() < 0.7)
        history = History(*sizes)
        try:
            for _ in range(500):
                if len(history.sequences) < 12 and rng.random() < 0.3:
                    prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 30))]
                    chunk, use_cache = rng.choice([None, None, 5]), rng.random() < 0.9
                    history.add(prompt, rng.randint(1, 20), rng.choice([0, 0, 1]), chunk, use_cache)
                if history.sequences and rng.random() < 0.02:
                    history.abort(rng.choice(history.sequences))
                if history.sequences and rng.random() < 0.02:
                    history.interrupt(rng)
                guesses = [rng.randint(0, 1) for _ in range(rng.choice([0, 0, 1, 4]))]
                fork = len(history.sequences) < 12 and rng.random() < 0.1
                history.step(rng.randint(0, 1), guesses, rng.randint(0, 4), fork)
            history.finish()
        except (AssertionError, LookupError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, after {steps} steps, sizes {sizes}") from error
        steps += 500
        preemptions += history.scheduler.num_preemptions
    assert preemptions > 1000


@pytest.mark.parametrize("max_chunk", [None, 2])
def test_nobody_starves_while_newcomers_never_stop(max_chunk):
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    history = History(num_blocks=12, block_size=2, max_num_seqs=4, budget=4, caching=True)
    first, work = [], 0
    for step in range(100_000):
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
        history.add(prompt, rng.randint(1, 12), max_chunk=max_chunk)
        if step < 50:
            first.append(history.sequences[-1])
            work += first[-1].max_tokens
        history.step(rng.randint(0, 1), fork=step >= 50 and rng.random() < 0.1)
        first = [seq for seq in first if seq in history.sequences]
        if step >= 50 and not first:
            break
        assert step < 50 + work, f"seed {seed}: each of these steps should have computed at least one of their tokens"
    assert history.scheduler.num_preemptions > 0
