"""Decodes queued one step ahead, on a lazy device: whatever comes in between, each request gives what it gives alone."""

import contextlib
import functools
import itertools
import random
import secrets
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import step_by_step
import tiny_models
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lazy_device import IntegerModel, LazyDecoder, LazyOps
from op_cases import SEED
from test_isolation import Interrupt, count_lines

from cupaged import LLM, NgramProposer, SamplingParams
from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.engine.beam_search import BeamSearchParams, beam_search
from cupaged.engine.engine import Engine
from cupaged.errors import DeviceError, OutOfMemory

EOS = (0,)
CONTEXT = 60


@functools.cache
def tokenizer():
    """Token i is the character i."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_tokenizer(Path(folder))
        return Tokenizer.from_folder(Path(folder))


def engine_of(num_blocks=200, block_size=4, max_num_seqs=8, budget=64, caching=True, ahead=True, most=64, guessing=False):
    model = IntegerModel(num_blocks, block_size, ahead, most)
    proposer = NgramProposer(3) if guessing else None
    return Engine(model, tokenizer(), model.pool, EOS, CONTEXT, max_num_seqs, budget, caching, 0, proposer, 3 * guessing)


@functools.cache
def alone(prompt, **params):
    """(token ids, text, finish_reason, stop_reason) of each completion of a request that runs by itself, nothing ahead."""
    engine = engine_of(ahead=False, caching=False)
    request = engine.add(None, list(prompt), params_of(**params))
    while not request.finished:
        engine.step()
    return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in request.outputs]


def params_of(**params):
    if "logit_bias" in params:
        params["logit_bias"] = dict(params["logit_bias"])
    if "processor" in params:
        del params["processor"]
        params["logits_processors"] = [lambda token_ids, logits: np.where(np.arange(len(logits)) % 2, logits, -1)]
    return SamplingParams(**params)


PLAIN = [
    {"temperature": 0},
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "ignore_eos": True},
    {"temperature": 0.7, "seed": 4, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.5, "seed": 5, "min_p": 0.02, "stop_token_ids": (7,)},
    {"temperature": 1.0, "seed": 6, "stop": ("\x03", "\x05\x04")},
    {"temperature": 1.0, "seed": 7, "min_tokens": 3},
]
OTHERS = [
    {"temperature": 0.8, "seed": 8, "n": 3},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 9, "repetition_penalty": 1.3},
    {"temperature": 0, "logit_bias": ((5, 1.5),)},
    {"temperature": 1.0, "seed": 10, "processor": True},
]


class Requests:
    """Those given to an engine, with what each of them gives alone."""

    def __init__(self, engine):
        self.engine, self.added = engine, []

    def add(self, prompt, priority=0, **params):
        request = self.engine.add(None, list(prompt), params_of(**params), priority)
        self.added.append((request, alone(tuple(prompt), **params)))
        return request

    def check(self):
        """All that is there is right, and where a request is finished it is all there is."""
        for request, expected in self.added:
            for output, (token_ids, text, *reasons) in zip(request.outputs, expected, strict=True):
                if request.finished and request.error is None:
                    assert (output.token_ids, output.text) == (token_ids, text)
                    assert [output.finish_reason, output.stop_reason] == reasons
                else:
                    assert output.token_ids == token_ids[: len(output.token_ids)]
                    assert text.startswith(output.text)

    def unfinished(self):
        return [request for request, _ in self.added if not request.finished]

    def finish(self, most=3000):
        for _ in range(most):
            if not self.unfinished():
                break
            self.engine.step()
        assert not self.unfinished(), "requests that never finish"
        self.check()
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
        generated = sum(request.metrics.num_generated_tokens for request, _ in self.added)
        assert stats.num_generated_tokens == generated
        self.engine.blocks.validate([])


def forever(number):
    """A prompt, and parameters under which there is no end but that of the context."""
    rng = np.random.default_rng(number)
    return rng.integers(1, 12, 5).tolist(), {"temperature": 1.0, "seed": number, "ignore_eos": True, "max_tokens": None}


# ---- one thing at a time


def test_the_next_step_is_queued_before_tokens_are_waited_for():
    engine = engine_of()
    decoder, requests = engine.model.decoder, Requests(engine)
    for number in range(3):
        prompt, params = forever(number)
        requests.add(prompt, **params | {"max_tokens": 20})
    engine.step()
    assert decoder.num_queued == 0
    for count in range(2, 21):
        engine.step()
        assert [len(request.outputs[0].token_ids) for request, _ in requests.added] == [count] * 3
    assert decoder.queued_behind == [1] * 18 + [0]  # nothing behind what the length ends
    assert decoder.num_queued == 19
    requests.finish()


def test_after_an_end_the_others_go_on_from_the_step_ahead():
    engine = engine_of()
    decoder, requests = engine.model.decoder, Requests(engine)
    for number in range(4):
        prompt, params = forever(number)
        requests.add(prompt, **params)
    stopping = alone(tuple(forever(1)[0]), **forever(1)[1])[0][0][7]
    prompt, params = forever(1)
    ended = requests.add(prompt, **params | {"stop_token_ids": (stopping,)})
    prompt, params = forever(2)
    aborted = requests.add(prompt, **params)
    for step in range(30):
        if step == 12:
            assert ended.finished
            engine.abort(aborted)
        engine.step()
    assert decoder.num_queued == 30  # 29 of them waited for, and the next
    assert set(decoder.queued_behind) == {1}
    assert len(aborted.outputs[0].token_ids) == 12
    requests.finish()


def test_a_new_request_is_computed_beside_the_step_ahead():
    engine = engine_of()
    decoder, requests = engine.model.decoder, Requests(engine)
    requests.add([1, 2, 3], **forever(1)[1])
    for _ in range(5):
        engine.step()
    assert decoder.num_queued == 5
    second = requests.add([4, 5, 6], **forever(2)[1])
    engine.step()
    assert len(second.outputs[0].token_ids) == 1
    assert len(requests.added[0][0].outputs[0].token_ids) == 6
    assert (decoder.num_queued, decoder.queued_behind[-1]) == (5, 0)
    engine.step()
    assert (decoder.num_queued, decoder.queued_behind[-1]) == (7, 1)
    requests.finish()


def test_no_step_ahead_where_the_pool_has_no_room_for_all():
    engine = engine_of(num_blocks=9, block_size=2, caching=False)
    decoder, requests = engine.model.decoder, Requests(engine)
    for number in (1, 2):
        requests.add([number, 2, 3], **forever(number)[1] | {"max_tokens": 9})
    requests.finish()
    assert engine.stats().num_preemptions > 0
    assert {0, 1} == set(decoder.queued_behind)


@pytest.mark.parametrize("guessing", [False, True])
def test_what_asks_for_more_than_tokens_goes_by_the_logits(guessing):
    for params in OTHERS:
        engine = engine_of(guessing=guessing)
        requests = Requests(engine)
        requests.add([1, 2, 3], **{"max_tokens": 9, "ignore_eos": True} | params)
        requests.finish()
        # Once the prompt has its log-probabilities and candidates have begun, there is nothing special about their decodes.
        assert (engine.model.decoder.num_queued > 0) == ("n" in params or "prompt_logprobs" in params)
        assert guessing <= (set(engine.model.decoder.queued_behind) <= {0})


def test_a_failed_step_is_told_and_computed_again():
    engine = engine_of()
    requests = Requests(engine)
    for number in range(3):
        requests.add(forever(number)[0], **forever(number)[1])
    for _ in range(7):
        engine.step()
    engine.model.decoder.fails = True
    with pytest.raises(DeviceError):
        engine.step()
    assert [len(request.outputs[0].token_ids) for request, _ in requests.added] == [7] * 3
    engine.step()
    requests.finish()


def test_ctrl_c_while_tokens_are_waited_for():
    engine = engine_of()
    requests, decoder = Requests(engine), engine.model.decoder
    for number in range(3):
        requests.add(forever(number)[0], **forever(number)[1])

    def interrupt():
        decoder.before_tokens = lambda: None
        raise KeyboardInterrupt

    for _ in range(4):
        for _ in range(5):
            engine.step()
        decoder.before_tokens = interrupt
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    requests.finish()


def test_a_text_that_cannot_be_made_ends_its_own_request():
    engine = engine_of()
    requests = Requests(engine)
    for number in range(3):
        requests.add(forever(number)[0], **forever(number)[1])
    for _ in range(7):
        engine.step()
    broken = requests.added[1][0]
    [completion] = engine._of_request[id(broken)]
    completion.detokenizer.append = None
    engine.step()
    assert "its text cannot be made" in broken.error
    requests.finish()


def test_what_runs_beside_the_scheduler_between_two_steps():
    engine = engine_of(num_blocks=60)
    requests = Requests(engine)
    for number in range(3):
        requests.add(forever(number)[0], **forever(number)[1])
    others = [[3, 1, 4], [1, 5, 9]]
    expected = [beam_search(engine_of(ahead=False), prompt, BeamSearchParams(3, 8)) for prompt in others]
    for prompt, beams in zip(others, expected, strict=True):
        for _ in range(4):
            engine.step()
        assert beam_search(engine, prompt, BeamSearchParams(3, 8)) == beams
        engine.step()
        for _ in engine.logits(prompt):
            engine.step()
    requests.finish()


def test_more_sequences_than_the_decoder_takes():
    engine = engine_of(most=2)
    requests = Requests(engine)
    for number in range(4):
        requests.add(forever(number)[0], **forever(number)[1] | {"max_tokens": 5 + 5 * number})
    requests.finish()
    assert engine.model.decoder.num_queued == 10  # since there are two left


def test_those_that_begin_alike_are_neighbours_in_a_batch():
    """So attention may read what they share once: `cupaged.attention.shared_prefixes` looks at neighbours."""
    engine = engine_of(ahead=False)
    prefixes = [[1, 2, 3, 4], [5, 6, 7, 8]]
    requests, forward, seen = Requests(engine), engine.model.forward, []
    for prefix in prefixes:
        requests.add([*prefix, 9], max_tokens=1)
    requests.finish()

    def spied(batch, *pools):
        seen.append(batch.page_indices[batch.page_indptr[:-1]].tolist())
        return forward(batch, *pools)

    engine.model.forward = spied
    for number in range(6):
        requests.add([*prefixes[number % 2], *range(1, number + 2)], **forever(number)[1] | {"max_tokens": 5})
    requests.finish()
    for first_blocks in seen:
        assert [len(list(group)) for _, group in itertools.groupby(first_blocks)] == [3, 3]


@pytest.mark.parametrize("call", ["scheduler.schedule", "scheduler.reserve", "blocks.advance", "scheduler.remove"])
def test_what_policy_takes_is_counted(call):
    engine = engine_of()
    owner, name = call.split(".")
    owner, calls = getattr(engine, owner), []
    original = getattr(owner, name)

    def slow(*args):
        calls.append(1)
        time.sleep(0.003)
        return original(*args)

    setattr(owner, name, slow)
    requests = Requests(engine)
    requests.add(forever(1)[0], **forever(1)[1] | {"max_tokens": 6})
    requests.finish()
    assert calls
    assert 0.003 * len(calls) <= engine.stats().policy_s < engine.stats().step_s


def test_ctrl_c_at_any_line():
    engine = engine_of(num_blocks=20, budget=20)
    seed = secrets.randbits(32)
    rng = random.Random(seed)

    def added():
        requests = Requests(engine)
        for number in range(6):
            requests.add(forever(number)[0], **PLAIN[number % len(PLAIN)] | {"max_tokens": 12})
        return requests

    steps, requests = [], added()
    while requests.unfinished():
        steps.append(count_lines(engine.step))
    hit = 0
    for trial in range(150):
        requests = added()
        place = rng.randrange(len(steps))
        for _ in range(place):
            engine.step()
        tracer = Interrupt(rng.randint(1, steps[place]), quiet=("recover",))
        try:
            with tracer:
                engine.step()
        except KeyboardInterrupt:
            hit += 1
        try:
            while requests.unfinished():
                engine.step()
            requests.check()
            assert sum(request.error is not None for request, _ in requests.added) <= 1
            assert engine.blocks.num_used == 0
            engine.blocks.validate([])
        except Exception as error:
            raise AssertionError(f"interrupted at {tracer.where}, trial {trial}, seed {seed}") from error
    assert hit > 50


# ---- anything in any order


class Serving(RuleBasedStateMachine):
    """Any history of an engine whose device is one step ahead."""

    requests = None

    @precondition(lambda self: self.requests is None)
    @rule(
        num_blocks=st.sampled_from([8, 12, 20, 100]),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from([1, 3, 9, 64]),
        caching=st.booleans(),
        most=st.sampled_from([2, 64, 64]),
        guessing=st.sampled_from([False, False, True]),
    )
    def configure(self, **sizes):
        self.requests = Requests(engine_of(**sizes))
        self.engine = self.requests.engine

    @precondition(lambda self: self.requests)
    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=6),
        length=st.integers(1, 25),
        several=st.lists(st.sampled_from(PLAIN), max_size=4),
        one=st.sampled_from([*PLAIN, *OTHERS]),
        priority=st.integers(0, 1),
    )
    def add(self, prompt, length, several, one, priority):
        for number, params in enumerate([*several, one]):
            room = min(CONTEXT, self.engine.blocks.capacity) - len(prompt) - number
            if room >= 1:
                self.requests.add([*prompt, *[1] * number], priority, **params | {"max_tokens": min(room, length + number)})

    @precondition(lambda self: self.requests)
    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.requests and self.requests.unfinished())
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(self.requests.unfinished())))

    @precondition(lambda self: self.requests and self.requests.unfinished())
    @rule(data=st.data())
    def break_text(self, data):
        request = data.draw(st.sampled_from(self.requests.unfinished()))
        for completion in self.engine._of_request[id(request)]:
            completion.detokenizer.append = None

    @precondition(lambda self: self.requests)
    @rule()
    def fail(self):
        self.engine.model.decoder.fails = True
        step = self.engine.step if self.requests.unfinished() else self.engine.model.check
        with pytest.raises(DeviceError):
            step()

    @precondition(lambda self: self.requests)
    @rule()
    def interrupt(self):
        def interrupt():
            raise KeyboardInterrupt

        self.engine.model.decoder.before_tokens = interrupt
        with contextlib.suppress(KeyboardInterrupt):
            self.engine.step()
        self.engine.model.decoder.before_tokens = lambda: None

    @precondition(lambda self: self.requests)
    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=6), beams=st.booleans())
    def compute_beside(self, prompt, beams):
        with contextlib.suppress(OutOfMemory):
            if beams:
                beam_search(self.engine, prompt, BeamSearchParams(1, 3))
            else:
                list(self.engine.logits(prompt))

    @invariant()
    def books_agree(self):
        if self.requests:
            scheduler = self.engine.scheduler
            self.engine.blocks.validate([*scheduler.running, *scheduler.waiting])
            self.requests.check()

    def teardown(self):
        if self.requests:
            self.requests.finish()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ---- a real model


def test_a_model_of_numpy_gives_what_it_gives_step_by_step(tmp_path):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    plain, rng = LLM(folder, device="cpu", kv_memory="4MB"), np.random.default_rng([SEED, 7])
    prompts = [rng.integers(0, 256, length).tolist() for length in (9, 4, 2, 1, 30, 9)]
    hows = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 4, "top_k": 9}] * 2
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **how) for how in hows]
    expected = [step_by_step.complete(plain, prompt, how) for prompt, how in zip(prompts, params, strict=True)]
    for sizes in ({}, {"block_size": 4, "kv_memory": 19 * 4 * 1536, "max_num_batched_tokens": 20}):
        llm = LLM(folder, device="cpu", **{"kv_memory": "4MB", **sizes})
        model, forward, pool = llm.engine.model, llm.engine.model.forward, llm.engine.pool
        model.ops = LazyOps()
        decoder = LazyDecoder(lambda batch, forward=forward, pool=pool: forward(batch, pool.k, pool.v, ops=LazyOps()))

        def lazily(batch, *pools, forward=forward, decoder=decoder):
            decoder.finish_queue()
            return forward(batch, *pools)

        model.forward, model.decoder, model.ops.finish_queue = lazily, decoder, decoder.finish_queue
        for request, one in zip(llm.generate(prompts, params), expected, strict=True):
            one.assert_equal(request.outputs[0].token_ids, request.outputs[0].finish_reason)
        assert decoder.queued_behind.count(1) > 15
        assert (llm.stats().num_preemptions > 0) == bool(sizes)
