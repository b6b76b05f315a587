"""Guessed tokens change how many steps it takes, never what comes out: not the greedy text, not a draw, not a distribution."""

import numpy as np
import pytest
import step_by_step
import tiny_models
from op_cases import SEED

from cupaged import LLM, SamplingParams

VOCAB = 260
BLOCK_BYTES = 4 * 1536  # of 4 tokens of the model below


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", tiny_models.CONFIGS["llama-gqa"])


@pytest.fixture(scope="module")
def plain(folder):
    return LLM(folder, device="cpu", kv_memory="4MB")


class Guesses:
    """A proposer that knows what comes, and says it, or something else, from the `first_wrong` guess on."""

    def __init__(self, expected, first_wrong):
        self.expected = [list(tokens) for tokens in expected]  # prompts with their continuations
        self.first_wrong = first_wrong

    def propose(self, seq, limit):
        done = list(seq.token_ids)
        known = next((tokens for tokens in self.expected if tokens[: len(done)] == done), done)
        guess = (known[len(done) :] + [0] * limit)[:limit]
        return [token if i < self.first_wrong else (token + 1) % VOCAB for i, token in enumerate(guess)]


class Noise:
    """A proposer that guesses anything, often nothing, sometimes more than it may."""

    def __init__(self, seed, tokens=range(VOCAB)):
        self.rng, self.tokens = np.random.default_rng(seed), list(tokens)

    def propose(self, seq, limit):
        return self.rng.choice(self.tokens, self.rng.integers(0, limit + 3)).tolist()


OPTIONS = [
    {},
    {"block_size": 1},
    {"enable_prefix_caching": False},
    {"max_num_batched_tokens": 6},
    {"block_size": 4, "kv_memory": 15 * BLOCK_BYTES},
    {"max_num_seqs": 2, "block_size": 2},
]
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.9},
    {"temperature": 0, "stop_token_ids": list(range(0, 256, 7)), "min_tokens": 5},
    {"temperature": 0, "logit_bias": {65: 3.0, 66: 3.0, 67: 3.0}},
    {"temperature": 1.0, "seed": 5, "n": 3},
    {"temperature": 0.8, "seed": 6, "top_p": 0.8, "frequency_penalty": 1.0},
    {"temperature": 2.0, "seed": 7, "top_k": 5, "min_p": 0.01, "stop_token_ids": [65, 66, 67, 68]},
    {"temperature": 0, "logit_bias": {65: 100.0}},  # repeats itself, and is the last: some of its guesses find room
]


def requests_of(rng):
    """Prompts, some of which repeat themselves, and parameters."""
    prompts = [rng.integers(0, 256, int(rng.integers(1, 30))).tolist() for _ in PARAMS]
    prompts[0] = prompts[0][:5] * 5
    return prompts, [SamplingParams(max_tokens=24, ignore_eos=True, **params) for params in PARAMS]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("proposer", ["ngram", "right", "wrong", "two right", "noise"])
def test_the_same_tokens_with_and_without(folder, plain, proposer, options):
    rng = np.random.default_rng([SEED, len(proposer), len(str(options))])
    prompts, params = requests_of(rng)
    expected = [
        [step_by_step.complete(plain, prompt, wanted, candidate) for candidate in range(wanted.n)]
        for prompt, wanted in zip(prompts, params, strict=True)
    ]
    whole = [[*prompt, *each.token_ids] for prompt, of_prompt in zip(prompts, expected, strict=True) for each in of_prompt]
    guess = {
        "right": Guesses(whole, first_wrong=99),
        "wrong": Guesses(whole, first_wrong=0),
        "two right": Guesses(whole, first_wrong=2),
        "noise": Noise(rng),
    }.get(proposer, proposer)
    llm = LLM(folder, device="cpu", speculative=guess, num_speculative_tokens=4, **({"kv_memory": "4MB"} | options))
    for request, of_prompt in zip(llm.generate(prompts, params), expected, strict=True):
        assert request.error is None
        for output, each in zip(request.outputs, of_prompt, strict=True):
            each.assert_equal(output.token_ids, output.finish_reason)
    stats = llm.stats()
    assert stats.blocks_used == 0
    assert stats.num_drafts > 0
    if "kv_memory" in options:
        assert stats.num_preemptions > 0


@pytest.mark.parametrize("first_wrong", [0, 1, 3, 99])
def test_text_stops_and_logprobs_are_the_same(folder, plain, first_wrong):
    rng = np.random.default_rng([SEED, first_wrong])
    prompts = [rng.integers(32, 127, length).tolist() for length in (3, 20, 33)]
    only_letters = dict.fromkeys([*range(65), *range(91, 260)], -np.inf)
    free = SamplingParams(temperature=0, max_tokens=30, logit_bias=only_letters, frequency_penalty=0.5, logprobs=3)
    expected = plain.generate(prompts, free)
    guess = Guesses([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in expected], first_wrong)
    llm = LLM(folder, device="cpu", kv_memory="4MB", speculative=guess, num_speculative_tokens=5)
    for request, got in zip(expected, llm.generate(prompts, free), strict=True):
        a, b = request.outputs[0], got.outputs[0]
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert [list(entry) for entry in a.logprobs] == [list(entry) for entry in b.logprobs]
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
        stop = a.text[7:10]
        cut = SamplingParams(temperature=0, max_tokens=30, logit_bias=only_letters, frequency_penalty=0.5, stop=[stop])
        ended = llm.generate(request.prompt_token_ids, cut)[0].outputs[0]
        assert (ended.text, ended.finish_reason, ended.stop_reason) == (a.text[: a.text.index(stop)], "stop", stop)
        assert ended.token_ids == a.token_ids[: a.text.index(stop) + 3]  # not one more, although more were accepted


def test_right_guesses_save_steps_and_are_counted(folder, plain):
    prompt = list(range(40, 60))
    greedy = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
    ids = plain.generate(prompt, greedy)[0].outputs[0].token_ids

    def stats(first_wrong):
        guess = Guesses([[*prompt, *ids]], first_wrong)
        llm = LLM(folder, device="cpu", kv_memory="4MB", speculative=guess, num_speculative_tokens=4)
        assert llm.generate(prompt, greedy)[0].outputs[0].token_ids == ids
        return llm.stats()

    right = stats(99)  # the first token from the prompt, then four times five
    assert (right.num_steps, right.num_drafts, right.num_draft_tokens, right.num_accepted_tokens) == (5, 4, 16, 16)
    assert right.accepted_lengths == {4: 4}
    wrong = stats(0)
    assert (wrong.num_steps, wrong.num_accepted_tokens) == (21, 0)
    assert wrong.accepted_lengths == {0: wrong.num_drafts}
    half = stats(2)  # three tokens a step
    assert half.num_steps == 8
    assert half.num_accepted_tokens == sum(length * count for length, count in half.accepted_lengths.items()) == 13
    assert plain.stats().num_drafts == 0


def test_text_that_repeats_itself_is_guessed(folder):
    """A model that goes round in circles, as greedy ones do, is followed by prompt lookup."""
    llm = LLM(folder, device="cpu", kv_memory="4MB", speculative="ngram", num_speculative_tokens=4)
    llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=41, logit_bias={65: 100}, ignore_eos=True))
    assert llm.stats().num_steps < 20
    assert llm.stats().num_accepted_tokens > 25


def test_a_request_with_processors_goes_without(folder):
    calls = []

    def count(output, logits):
        calls.append(len(output))
        return logits

    llm = LLM(folder, device="cpu", kv_memory="4MB", speculative=Noise(1), num_speculative_tokens=4)
    llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logits_processors=[count]))
    assert calls == list(range(10))


def chi_square_limit(freedom):
    """What chi-square exceeds once in a million times (Wilson and Hilferty 1931); 4.75 deviations of a normal."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + 4.75 * share**0.5) ** 3


@pytest.mark.parametrize("kind", ["likely guesses", "noise"])
def test_draws_are_distributed_as_the_model_says(folder, plain, kind):
    """Three tokens, the last two of them guessed: how often each pair comes, against the product of its probabilities."""
    rng = np.random.default_rng([SEED, 17])
    prompt = rng.integers(0, 256, 6).tolist()
    top_k, temperature = 3, 1.5

    def following(output):
        row = plain.logits([*prompt, *output])[-1] / temperature
        kept = np.argsort(-row)[:top_k]
        return dict(zip(kept.tolist(), np.exp(step_by_step.log_softmax(row[kept])), strict=True))

    probability = {}
    for a, p in following([]).items():
        for b, q in following([a]).items():
            for c, r in following([a, b]).items():
                probability[a, b, c] = p * q * r
    tokens = sorted({token for key in probability for token in key})
    guess = Noise(rng, tokens)
    if kind == "likely guesses":
        likely = sorted(probability, key=probability.get)[::-1]
        guess = Guesses([[*prompt, *key] for key in likely], first_wrong=99)
    llm = LLM(folder, device="cpu", kv_memory="4MB", speculative=guess, num_speculative_tokens=2)
    first_seed = int(rng.integers(2**40))
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, max_tokens=4, ignore_eos=True, seed=first_seed + i)
        for i in range(3000)
    ]
    drawn = [tuple(r.outputs[0].token_ids[:3]) for r in llm.generate([prompt] * len(params), params)]
    assert llm.stats().num_drafts >= 1500
    assert set(drawn) <= set(probability)
    expected = np.array(list(probability.values())) * len(drawn)
    counts = np.array([drawn.count(key) for key in probability])
    rare = expected < 8
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < chi_square_limit(len(expected) - 1)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_candidates_that_begin_with_the_last_token_of_a_chunk(folder, plain, n, chunks, enable_prefix_caching):
    """The prompt's last step computes one token, as a decode does, and begins all candidates."""
    budget = 8
    prompt = np.random.default_rng([SEED, n, chunks]).integers(0, 256, chunks * budget + 1).tolist()
    params = SamplingParams(temperature=1.0, seed=4, n=n, max_tokens=6, ignore_eos=True)
    expected = [step_by_step.complete(plain, prompt, params, candidate) for candidate in range(n)]
    layout = {"max_num_batched_tokens": budget, "enable_prefix_caching": enable_prefix_caching, "kv_memory": "4MB"}
    llm = LLM(folder, device="cpu", speculative=Noise(SEED), **layout)
    [request] = llm.generate(prompt, params)
    assert request.error is None
    for output, each in zip(request.outputs, expected, strict=True):
        each.assert_equal(output.token_ids, output.finish_reason)
