"""What a request gives equals decoding by its definition (tests/step_by_step.py), however it is batched, cut and preempted."""

import json
import shutil

import numpy as np
import pytest
import step_by_step
import tiny_models
from op_cases import SEED

from cupaged import LLM, BeamSearchParams, InvalidArgument, OutOfMemory, SamplingParams

BLOCK_BYTES = 4 * 1536  # of 4 tokens of the model below
LAYOUTS = {  # each is to give the same
    "at once": {},
    "pages of 1, chunks of 5": {"block_size": 1, "max_num_batched_tokens": 5},
    "two at a time": {"max_num_seqs": 2},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_seqs": 3},
    "a tiny pool": {"block_size": 4, "kv_memory": 20 * BLOCK_BYTES},
    "guessing": {"speculative": "ngram", "num_speculative_tokens": 3, "max_num_batched_tokens": 40},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", tiny_models.CONFIGS["llama-gqa"])


@pytest.fixture(scope="module")
def plain(folder):
    """For the definition: it has room for anything."""
    return LLM(folder, device="cpu", kv_memory="4MB")


@pytest.fixture(params=LAYOUTS)
def llm(request, folder):
    """One engine for each layout; after the test its pool is empty."""
    llm = LLM(folder, device="cpu", **({"kv_memory": "4MB"} | LAYOUTS[request.param]))
    yield llm
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_free == llm.pool_stats().num_blocks - 1


@pytest.fixture
def rng(request):
    return np.random.default_rng([SEED, sum(map(ord, request.node.originalname))])


def random_prompts(rng, *lengths):
    return [rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def with_ends(folder, tmp_path_factory):
    """Folders of the same model with other tokens as its end of sequence."""

    def make(token_ids):
        copy = tmp_path_factory.mktemp("ends") / "model"
        shutil.copytree(folder, copy)
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [int(token) for token in token_ids]}))
        return copy

    return make


# ---- n


def test_candidates_are_the_draws_of_their_number(llm, plain, rng):
    prompts = random_prompts(rng, 1, 9, 33)
    params = [
        SamplingParams(n=5, temperature=0.9, seed=int(rng.integers(2**31)), max_tokens=16, ignore_eos=True),
        SamplingParams(n=3, temperature=1.3, top_k=30, seed=-5, max_tokens=11, frequency_penalty=0.7, ignore_eos=True),
        SamplingParams(n=7, temperature=1.0, seed=0, max_tokens=20, repetition_penalty=1.4, ignore_eos=True),
    ]
    for prompt, wanted, request in zip(prompts, params, llm.generate(prompts, params), strict=True):
        assert [output.index for output in request.outputs] == list(range(wanted.n))
        for output in request.outputs:
            expected = step_by_step.complete(plain, prompt, wanted, output.index)
            expected.assert_equal(output.token_ids, output.finish_reason)
        assert len({tuple(output.token_ids) for output in request.outputs}) == wanted.n
        assert request.metrics.num_generated_tokens == sum(len(output.token_ids) for output in request.outputs)


def test_greedy_candidates_are_all_the_same(llm, rng):
    [prompt] = random_prompts(rng, 21)
    outputs = llm.generate(prompt, SamplingParams(n=4, temperature=0, max_tokens=10, ignore_eos=True))[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 1


def test_candidates_end_each_for_itself(with_ends, rng):
    ends = rng.choice(256, 40, replace=False)
    llm = LLM(with_ends(ends), device="cpu", kv_memory="4MB", max_num_seqs=3, block_size=4)
    [prompt] = random_prompts(rng, 10)
    params = SamplingParams(n=8, temperature=1.5, seed=3, max_tokens=15)
    outputs = llm.generate(prompt, params)[0].outputs
    for output in outputs:
        step_by_step.complete(llm, prompt, params, output.index).assert_equal(output.token_ids, output.finish_reason)
    assert len({len(output.token_ids) for output in outputs}) > 1
    assert llm.stats().blocks_used == 0


def test_more_candidates_than_the_pool_holds_preempt_and_are_right(folder, plain, rng):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory=14 * BLOCK_BYTES)
    [prompt] = random_prompts(rng, 13)
    params = SamplingParams(n=9, temperature=1.0, seed=8, max_tokens=30, ignore_eos=True)
    outputs = llm.generate(prompt, params)[0].outputs
    assert llm.stats().num_preemptions > 0
    assert llm.stats().blocks_used == 0
    for output in outputs:
        step_by_step.complete(plain, prompt, params, output.index).assert_equal(output.token_ids)


def test_candidates_share_the_blocks_of_the_prompt(folder, rng):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory="4MB", enable_prefix_caching=False)
    [prompt] = random_prompts(rng, 41)
    llm.generate(prompt, SamplingParams(n=6, seed=1, max_tokens=4, ignore_eos=True))
    assert llm.pool_stats().peak_used_blocks <= 10 + 6 * 2  # apart: 66


# ---- logprobs


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_the_model(llm, plain, rng, count):
    prompts = random_prompts(rng, 3, 30)
    changes = {"logit_bias": {7: 4.0, 8: -np.inf}, "presence_penalty": 1.0, "repetition_penalty": 1.3, "min_tokens": 3}
    params = SamplingParams(n=2, temperature=1.5, seed=4, max_tokens=12, ignore_eos=True, logprobs=count, **changes)
    for prompt, request in zip(prompts, llm.generate(prompts, params), strict=True):
        for output in request.outputs:
            rows = plain.logits([*prompt, *output.token_ids])[len(prompt) - 1 : -1]
            check_logprobs(output.token_ids, output.logprobs, rows, count, llm.tokenizer)
            total = sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
            assert output.cumulative_logprob == pytest.approx(total, abs=1e-9)


def test_logprobs_are_not_given_unasked(plain):
    output = plain.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))[0]
    assert (output.prompt_logprobs, output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None, None, None)


@pytest.mark.parametrize("count", [0, 4])
def test_prompt_logprobs_are_those_of_the_model(llm, plain, rng, count):
    prompts = random_prompts(rng, 1, 2, 23, 50)
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))  # now they are in the prefix cache
    params = SamplingParams(n=2, temperature=1.0, seed=9, max_tokens=14, ignore_eos=True, prompt_logprobs=count, logprobs=1)
    for prompt, request in zip(prompts, llm.generate(prompts, params), strict=True):
        assert request.prompt_logprobs[0] is None
        rows = plain.logits(prompt)[:-1]
        check_logprobs(prompt[1:], request.prompt_logprobs[1:], rows, count, llm.tokenizer)
        for output in request.outputs:
            step_by_step.complete(plain, prompt, params, output.index).assert_equal(output.token_ids)


def check_logprobs(token_ids, given, rows, count, tokenizer):
    """Of each token its own log-probability, and those of the `count` most probable ones in their order."""
    assert len(given) == len(token_ids) == len(rows)
    for token, entry, row in zip(token_ids, given, rows, strict=True):
        logprobs = step_by_step.log_softmax(row)
        assert token in entry
        assert count <= len(entry) <= count + 1
        for each, found in entry.items():
            assert found.logprob == pytest.approx(logprobs[each], abs=1e-3)
            assert found.decoded_token == tokenizer.decode_token(each)
            above = np.sum(logprobs > logprobs[each] + 1e-3)  # others within rounding may go before or after it
            below = np.sum(logprobs >= logprobs[each] - 1e-3)
            assert above < found.rank <= below
        ranks = [found.rank for found in entry.values()]
        assert set(range(1, count + 1)) <= set(ranks)


# ---- logit_bias, min_tokens, processors


def test_logit_bias_forces_and_forbids(llm, plain, rng):
    [prompt] = random_prompts(rng, 12)
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    ids = llm.generate(prompt, SamplingParams(**greedy))[0].outputs[0].token_ids
    assert llm.generate(prompt, SamplingParams(**greedy, logit_bias={65: 100}))[0].outputs[0].token_ids == [65] * 8
    forbidden = dict.fromkeys(ids, -np.inf)
    params = SamplingParams(**greedy, logit_bias=forbidden | {3: 0.5})
    others = llm.generate(prompt, params)[0].outputs[0].token_ids
    assert not set(others) & set(ids)
    step_by_step.complete(plain, prompt, params).assert_equal(others)


@pytest.mark.parametrize("bias", [{260: 1}, {-1: 1}])
def test_logit_bias_beyond_the_vocabulary_is_refused(plain, bias):
    with pytest.raises(InvalidArgument, match="logit_bias"):
        plain.generate([1], SamplingParams(logit_bias=bias))


@pytest.mark.parametrize("bias", [{1: 101}, {1: float("nan")}, {1: float("inf")}, {"1": 1}, [1], {1: None}], ids=str)
def test_a_wrong_logit_bias_is_named(bias):
    with pytest.raises(InvalidArgument, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_min_tokens_puts_every_end_off(llm, plain, rng):
    [prompt] = random_prompts(rng, 7)
    eos = llm.engine.eos_token_ids[0]
    keen = {"temperature": 0, "max_tokens": 20, "min_tokens": 6}
    for ends, reason in (({"logit_bias": {eos: 100}}, None), ({"logit_bias": {9: 100}, "stop_token_ids": [9]}, 9)):
        params = SamplingParams(**keen, **ends)
        output = llm.generate(prompt, params)[0].outputs[0]
        end = eos if reason is None else reason
        assert end not in output.token_ids[:6]
        assert (output.token_ids[6:], output.finish_reason, output.stop_reason) == ([end], "stop", reason)
        step_by_step.complete(plain, prompt, params).assert_equal(output.token_ids)


def test_min_tokens_puts_stop_strings_off(llm):
    params = {"temperature": 0, "logit_bias": {97: 100}, "stop": ["aa"], "max_tokens": 20}  # it says nothing but "a"
    for min_tokens in (0, 2, 7):  # stop strings are looked for in what comes after
        output = llm.generate([1, 2], SamplingParams(**params, min_tokens=min_tokens))[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == ("a" * min_tokens, "stop", "aa")
        assert len(output.token_ids) == min_tokens + 2


def test_processors_constrain_the_output(llm, plain, rng):
    prompts = random_prompts(rng, 5, 18)
    seen = []

    def digits_in_rising_order(output, logits):
        """As a grammar would: what may come depends on what came."""
        seen.append(tuple(output))
        least = output[-1] if output else ord("0")
        masked = np.full_like(logits, -np.inf)
        masked[least : ord("9") + 1] = logits[least : ord("9") + 1]
        return masked

    def twice_as_keen(output, logits):
        logits *= 2
        return logits

    for given in ([digits_in_rising_order], [digits_in_rising_order, twice_as_keen]):
        params = SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=9, logits_processors=given, logprobs=1)
        for prompt, request in zip(prompts, llm.generate(prompts, params), strict=True):
            for output in request.outputs:
                assert all("0" <= character <= "9" for character in output.text)
                assert list(output.text) == sorted(output.text)
                assert len(output.text) == 9
                assert {tuple(output.token_ids[:count]) for count in range(9)} <= set(seen)
                step_by_step.complete(plain, prompt, params, output.index).assert_equal(output.token_ids)
                rows = plain.logits([*prompt, *output.token_ids])[len(prompt) - 1 : -1]
                check_logprobs(output.token_ids, output.logprobs, rows, 1, llm.tokenizer)  # the model's, before the mask


def test_processors_go_before_penalties_and_bias(plain, rng):
    [prompt] = random_prompts(rng, 4)

    def only_two(output, logits):
        logits[:] = -np.inf
        logits[[50, 60]] = [5, 4]
        return logits

    params = {"temperature": 0, "max_tokens": 4, "logits_processors": [only_two]}
    assert plain.generate(prompt, SamplingParams(**params))[0].outputs[0].token_ids == [50] * 4
    assert plain.generate(prompt, SamplingParams(**params, logit_bias={60: 2}))[0].outputs[0].token_ids == [60] * 4
    by_turns = SamplingParams(**params, presence_penalty=3.0)
    assert plain.generate(prompt, by_turns)[0].outputs[0].token_ids == [50, 60, 50, 50]


# ---- beams


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("ends", [1, 60])
def test_beams_are_those_of_a_search_by_hand(with_ends, rng, width, length_penalty, ends):
    llm = LLM(with_ends(rng.choice(256, ends, replace=False)), device="cpu", kv_memory="4MB", block_size=4)
    for _ in range(4):
        [prompt] = random_prompts(rng, int(rng.integers(1, 20)))
        expected, lead = step_by_step.beams(llm, prompt, width, 7, length_penalty, ignore_eos=False)
        if lead > 1e-4:
            break
    params = BeamSearchParams(beam_width=width, max_tokens=7, length_penalty=length_penalty)
    [request] = llm.beam_search(prompt, params)
    assert [output.token_ids for output in request.outputs] == [token_ids for _, token_ids in expected]
    totals = [total for total, _ in expected]
    np.testing.assert_allclose([output.cumulative_logprob for output in request.outputs], totals, atol=1e-3)
    for output in request.outputs:
        ended = output.token_ids[-1] in llm.engine.eos_token_ids
        assert output.finish_reason == ("stop" if ended else "length")
        assert output.text == llm.tokenizer.decode(output.token_ids)
    assert request.finished
    assert llm.stats().blocks_used == 0


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 1, "max_num_batched_tokens": 5}, {"enable_prefix_caching": False}], ids=str
)
def test_beams_do_not_depend_on_the_layout_nor_on_what_runs_beside(folder, plain, rng, options):
    llm = LLM(folder, device="cpu", **({"kv_memory": "4MB"} | options))
    prompts = random_prompts(rng, 17, 1, 40)
    params = BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=True)
    beside = llm.add(prompts[2], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    llm.step()
    got = llm.beam_search(prompts, params)
    while not beside.finished:
        llm.step()
    for prompt, request in zip(prompts, got, strict=True):
        expected, lead = step_by_step.beams(plain, prompt, 4, 9, 1.0, ignore_eos=True)
        if lead > 1e-4:
            assert [output.token_ids for output in request.outputs] == [token_ids for _, token_ids in expected]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    step_by_step.complete(plain, prompts[2], greedy).assert_equal(beside.outputs[0].token_ids)
    assert llm.stats().blocks_used == 0


def test_beams_where_every_token_is_an_end(with_ends):
    llm = LLM(with_ends(range(260)), device="cpu", kv_memory="4MB")
    outputs = llm.beam_search([5, 6, 7], BeamSearchParams(beam_width=3, max_tokens=5))[0].outputs
    order = np.argsort(-llm.logits([5, 6, 7])[-1])[:3].tolist()
    assert [output.token_ids for output in outputs] == [[token] for token in order]
    assert llm.stats().blocks_used == 0


def test_beams_beyond_the_pool_are_refused_and_leave_it_empty(folder, plain, rng):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory=12 * BLOCK_BYTES)
    [prompt] = random_prompts(rng, 20)
    with pytest.raises(OutOfMemory, match="beam_width"):
        llm.beam_search(prompt, BeamSearchParams(beam_width=8, max_tokens=20, ignore_eos=True))
    assert llm.stats().blocks_used == 0
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = llm.generate(prompt, greedy)[0].outputs[0]
    step_by_step.complete(plain, prompt, greedy).assert_equal(output.token_ids)


# ---- figures


def test_metrics_count_what_happened(folder, rng):
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    prompts = random_prompts(rng, 40, 20)
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=10, ignore_eos=True)
    first = llm.generate(prompts, params)
    again = llm.generate(prompts[0], params)[0]
    for request in (*first, again):
        metrics = request.metrics
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
        assert metrics.num_generated_tokens == 20
        assert metrics.num_prompt_tokens == len(request.prompt_token_ids)
        assert len(metrics.inter_token_times) == 9
        assert sum(metrics.inter_token_times) == pytest.approx(metrics.last_token_time - metrics.first_token_time)
    assert [request.metrics.num_cached_tokens for request in (*first, again)] == [0, 0, 32]
    stats = llm.stats()
    assert stats.num_generated_tokens == 60
    assert stats.num_steps == 20
    assert stats.prefix_hit_rate == pytest.approx(32 / 100)
    assert 0 < stats.policy_s < stats.step_s
    assert stats.num_finished == 3
    for name, of_request in (("queue_s", "queue_time"), ("ttft_s", "time_to_first_token")):
        times = [getattr(request.metrics, of_request) for request in (*first, again)]
        assert getattr(stats, name) == pytest.approx(np.mean(times))
        assert 0 <= min(times) <= max(times) < 60
    gaps = [gap for request in (*first, again) for gap in request.metrics.inter_token_times]
    assert stats.inter_token_s == pytest.approx(np.mean(gaps))


def test_a_stream_that_nobody_holds_ends_with_the_next_step(folder, rng):
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    stream = llm.stream(random_prompts(rng, 40)[0], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    llm.step()
    assert llm.stats().blocks_used > 0
    del stream
    assert (llm.stats().blocks_used, llm.stats().num_running) == (0, 0)


def test_a_beam_search_that_cannot_be_is_its_own_prompts_error(folder, rng):
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    [prompt] = random_prompts(rng, 9)
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    alone = llm.beam_search(prompt, params)[0]
    good, bad = llm.beam_search([prompt, [999999]], params)
    assert [output.token_ids for output in good.outputs] == [output.token_ids for output in alone.outputs]
    assert "vocabulary" in bad.error
    assert [output.finish_reason for output in bad.outputs] == ["abort", "abort"]


def test_little_of_the_pool_is_wasted(folder):
    """Block tables waste less than 4 % of the slots (Kwon et al. 2023, section 1), on lengths as conversations have them."""
    rng = np.random.default_rng([SEED, 4])
    llm = LLM(folder, device="cpu", block_size=16, kv_memory="300MB", max_model_len=2048, max_num_seqs=24)
    # Log-normal, means near 160 and 200, as in ShareGPT; of 96 requests 24 run at a time, as soon as one ends another begins.
    prompt_lengths, output_lengths = (np.clip(np.exp(rng.normal(mean, 1, 96)), 4, 1000).astype(int) for mean in (4.6, 4.85))
    params = [SamplingParams(temperature=0, max_tokens=int(length), ignore_eos=True) for length in output_lengths]
    prompts = random_prompts(rng, *prompt_lengths)
    requests = [llm.add(prompt, wanted) for prompt, wanted in zip(prompts, params, strict=True)]
    waste = []
    while llm.stats().num_waiting and len(waste) < 500:
        llm.step()
        waste.append(llm.stats().kv_waste)
    for request in requests:
        llm.abort(request)
    assert len(waste) > 150
    assert 0.005 < np.mean(waste[50:]) < 0.04  # the first began all at once, and none is far yet
    assert llm.stats().kv_waste == 0
