"""LLM on tiny random models: what a request gives does not depend on what runs beside it, nor on how the pool is cut."""

import io
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_models

from cupaged import LLM, DeviceError, InvalidArgument, OutOfMemory, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[7], list(range(1, 40)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(200, 100, -1)), [256, 65, 66]]


def token_ids(llm, prompt, **params):
    """What one prompt gives by itself, greedily and 24 tokens unless said otherwise."""
    params = SamplingParams(**({"temperature": 0, "max_tokens": 24, "ignore_eos": True} | params))
    return llm.generate(prompt, params)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", tiny_models.CONFIGS["llama-gqa"])


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, device="cpu", kv_memory="4MB")


@pytest.fixture(scope="module")
def alone(llm):
    """Token ids of each of PROMPTS, run by itself."""
    return [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 1},
        {"block_size": 256},
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"block_size": 4, "kv_memory": 36 * 4 * 1536},  # 36 blocks of 4: all preempt one another all the time
    ],
    ids=str,
)
def test_together_as_alone(folder, alone, options):
    llm = LLM(folder, device="cpu", **({"kv_memory": "4MB"} | options))
    together = llm.generate(PROMPTS, GREEDY)
    assert [request.outputs[0].token_ids for request in together] == alone
    assert [request.prompt_token_ids for request in together] == PROMPTS
    assert llm.pool_stats().used_blocks == 0


def test_the_last_option_above_does_preempt(folder):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory=36 * 4 * 1536)
    assert llm.pool_stats().num_blocks == 36
    llm.generate(PROMPTS, GREEDY)
    assert llm.pool_stats().peak_used_blocks == 35
    assert llm.stats().num_preemptions > 0


def test_prefix_is_found_in_the_pool(folder):
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    first = llm.generate(list(range(64)), GREEDY)[0]
    again = llm.generate(list(range(64)), GREEDY)[0]
    assert first.metrics.num_cached_tokens == 0
    assert again.metrics.num_cached_tokens == 48  # the last block is left, so that there is something to compute
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_stream_is_the_text_in_pieces(llm):
    stream = llm.stream("hello", GREEDY)
    pieces = list(stream)
    assert stream.output.finished
    assert "".join(pieces) == stream.output.outputs[0].text == llm.generate("hello", GREEDY)[0].outputs[0].text
    assert len(pieces) > 1


def test_a_closed_stream_frees_its_blocks(llm):
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert llm.pool_stats().used_blocks > 0
    stream.close()
    assert llm.pool_stats().used_blocks == 0
    assert stream.output.outputs[0].finish_reason == "abort"


def test_two_streams_at_once(llm):
    first, second = llm.stream("abc", GREEDY), llm.stream("xyz", GREEDY)
    texts = ["", ""]
    for a, b in zip(first, second, strict=False):
        texts[0] += a
        texts[1] += b
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    expected = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in ("abc", "xyz")]
    assert expected[0].startswith(texts[0])  # zip may drop the piece it had already taken from the longer one
    assert texts[1] == expected[1]


def test_seeded_draws_do_not_depend_on_the_batch(llm):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    other = SamplingParams(temperature=0.7, top_p=0.9, seed=5, max_tokens=30, ignore_eos=True)
    alone = llm.generate([PROMPTS[2]], params)[0].outputs[0].token_ids
    beside = llm.generate([PROMPTS[0], PROMPTS[2], PROMPTS[1]], [other, params, other])[1].outputs[0].token_ids
    assert alone == beside
    assert alone != token_ids(llm, PROMPTS[2], temperature=1.0, seed=12, max_tokens=20)


def test_n_gives_different_candidates(llm):
    outputs = llm.generate("a", SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=12))[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in outputs}) == 3


def test_unseeded_draws_differ_and_repeat_with_the_seed_of_the_llm(folder):
    def run():
        llm = LLM(folder, device="cpu", kv_memory="4MB", seed=3)
        return [r.outputs[0].token_ids for r in llm.generate(["a", "a"], SamplingParams(max_tokens=12))]

    first = run()
    assert first == run()
    assert first[0] != first[1]


def test_penalties_and_limits_reach_the_sampler(llm):
    plain = token_ids(llm, "a", max_tokens=40)
    for penalty in ({"repetition_penalty": 50.0}, {"presence_penalty": 100.0}, {"frequency_penalty": 100.0}):
        assert len(set(token_ids(llm, "a", max_tokens=40, **penalty))) > len(set(plain))
    assert token_ids(llm, "a", max_tokens=40, temperature=5.0, top_k=1) == plain


def test_how_a_completion_ends(llm):
    ids = llm.generate("a", GREEDY)[0].outputs[0].token_ids
    stop_id = ids[5]
    by_id = llm.generate("a", SamplingParams(temperature=0, stop_token_ids=[stop_id], max_tokens=24))[0].outputs[0]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", stop_id)
    assert by_id.token_ids == ids[: ids.index(stop_id) + 1]
    later = token_ids(llm, "a", stop_token_ids=[stop_id], min_tokens=10)
    assert len(later) >= 10
    assert stop_id not in later[:10]
    assert llm.generate("a", GREEDY)[0].outputs[0].finish_reason == "length"
    text = llm.generate("a", GREEDY)[0].outputs[0].text
    cut = llm.generate("a", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=text[3:5]))[0].outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", text[3:5])
    assert cut.text == text[: text.index(text[3:5])]


def test_generation_ends_where_the_context_does(folder):
    llm = LLM(folder, device="cpu", max_model_len=40, kv_memory="4MB")
    output = llm.generate(list(range(30)), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_logits_of_a_prompt_do_not_depend_on_chunks(folder, llm):
    whole = llm.logits(range(100))
    assert whole.shape == (100, llm.config.vocab_size)
    assert whole.dtype == np.float32
    chunked = LLM(folder, device="cpu", kv_memory="4MB", max_num_batched_tokens=7, block_size=2).logits(range(100))
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-4)


def test_perplexity_is_that_of_the_logits(llm):
    ids = list(range(60))
    logits = llm.logits(ids).astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.exp(-np.mean(log_softmax[np.arange(59), ids[1:]]))
    assert llm.perplexity(ids) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("generation_config", "given", "expected"),
    [
        ({}, {}, {"temperature": 0, "top_p": 1.0, "max_tokens": None}),
        ({"temperature": 0.6}, {}, {"temperature": 0}),
        ({"do_sample": True}, {}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"top_k": 5}, {"temperature": 0.6, "top_k": 5}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.9}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}),
        ({"max_new_tokens": 7}, {}, {"max_tokens": 7}),
        ({"max_new_tokens": 7}, {"max_tokens": 9}, {"max_tokens": 9}),
        ({"repetition_penalty": 1.5}, {}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.0, "top_p": None}, {"repetition_penalty": 1.0}),
    ],
    ids=str,
)
def test_what_is_given_goes_before_generation_config_before_greedy(folder, tmp_path, generation_config, given, expected):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation_config))
    params = LLM(tmp_path / "model", device="cpu", kv_memory="1MB").default_sampling_params(**given)
    assert {name: getattr(params, name) for name in expected} == expected


def test_generation_config_says_what_ends_a_completion(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "model")
    plain = token_ids(LLM(folder, device="cpu", kv_memory="1MB"), "a")
    config = {"eos_token_id": [plain[5], 99999999]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path / "model", device="cpu", kv_memory="1MB")
    assert "99999999" in caplog.text
    output = llm.generate("a", SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (plain[: plain.index(plain[5]) + 1], "stop")
    early = SamplingParams(temperature=0, max_tokens=24, min_tokens=20)
    assert len(llm.generate("a", early)[0].outputs[0].token_ids) >= 20


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty"),
        ([-1], "vocabulary"),
        ([260], "vocabulary"),
        ([1.5], "vocabulary"),
        (list(range(129)), "context"),
        ([True], "vocabulary"),
        (list(range(128)), "one of them for the answer"),
        ({"prompt": "x"}, "prompt_token_ids"),
        ({"prompt_token_ids": None}, "prompt_token_ids"),
        (b"hi", "prompt_token_ids"),
        (None, "prompt_token_ids"),
    ],
)
def test_a_wrong_prompt_is_refused_and_harms_nobody(llm, alone, prompt, says):
    with pytest.raises(InvalidArgument, match=says):
        llm.generate([prompt], GREEDY)
    wrong, right = llm.generate([prompt, PROMPTS[0]], GREEDY)
    assert wrong.finished
    assert says in wrong.error
    assert right.error is None
    assert right.outputs[0].token_ids == alone[0]
    assert llm.pool_stats().used_blocks == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm: llm.generate(None), "prompts"),
        (lambda llm: llm.generate([1.5]), "vocabulary"),
        (lambda llm: llm.generate("a", {"max_tokens": 1}), "sampling_params"),
        (lambda llm: llm.generate(["a"], [None]), "sampling_params"),
        (lambda llm: llm.generate(["a"], [GREEDY, GREEDY]), "sampling_params"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[999999], min_tokens=5)), "stop_token_ids"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[-1], min_tokens=5)), "stop_token_ids"),
        (lambda llm: llm.stream("a", {"max_tokens": 1}), "sampling_params"),
        (lambda llm: llm.stream("a", SamplingParams(n=2)), "one completion"),
        (lambda llm: llm.chat(None), "messages"),
        (lambda llm: llm.chat([]), "messages"),
        (lambda llm: llm.logits(None), "token ids"),
        (lambda llm: llm.perplexity(5), "token ids"),
        (lambda llm: llm.perplexity("a"), "at least 2"),
    ],
)
def test_wrong_calls_are_named(llm, call, says):
    with pytest.raises(InvalidArgument, match=says):
        call(llm)
    assert llm.pool_stats().used_blocks == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:"}, "device"),
        ({"device": None}, "device"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization"),
        ({"kv_memory": "9" * 400}, "kv_memory"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"block_size": 3}, "block_size"),
        ({"block_size": 512}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"kv_memory": "12 parsecs"}, "kv_memory"),
        ({"kv_memory": 100}, "kv_memory"),
        ({"kv_memory": 60_000, "max_model_len": 100}, "max_model_len"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"load_format": "pt"}, "load_format"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(folder, arguments, says):
    with pytest.raises(InvalidArgument, match=says):
        LLM(folder, **({"device": "cpu"} | arguments))


def test_a_prompt_beyond_the_pool_is_refused(folder):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory=10 * 4 * 1536)
    with pytest.raises(InvalidArgument, match="KV pool holds 36"):
        llm.generate(list(range(40)), GREEDY)


def test_a_pool_beyond_the_memory_is_refused(folder):
    with pytest.raises(OutOfMemory, match="GB are free"):
        LLM(folder, device="cpu", kv_memory="10000000GB")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 3_000_000_000},
        {"temperature": 1e-40},
        {"frequency_penalty": 1e39},
        {"repetition_penalty": 1e-300},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"ignore_eos": "x"},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"n": 0},
        {"max_tokens": 0},
        {"stop": [""]},
        {"seed": "x"},
        {"presence_penalty": float("inf")},
    ],
    ids=str,
)
def test_wrong_sampling_params_are_named(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_no_gpu_is_said_in_one_line(folder):
    with pytest.raises(DeviceError) as error:
        LLM(folder, device="cuda:63")
    assert "\n" not in str(error.value)


def test_dummy_weights_need_only_a_config(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    llm = LLM(tmp_path, device="cpu", load_format="dummy", kv_memory="1MB")
    assert len(llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids) == 24


def test_import_is_light_and_needs_no_cupy():
    code = (
        "import sys, time; sys.modules['cupy'] = None; t = time.perf_counter(); import cupaged; "
        "assert time.perf_counter() - t < 0.5; assert 'numpy' not in sys.modules; from cupaged import LLM; LLM"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_message_is_logged_where_the_pool_cuts_the_context(folder, caplog):
    with caplog.at_level(logging.INFO, "cupaged"):
        llm = LLM(folder, device="cpu", block_size=4, kv_memory=10 * 4 * 1536)
    assert llm.max_model_len == 36
    assert "36 tokens" in caplog.text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_several_prompts_is_shown_on_a_terminal_only(llm, monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    llm.generate([[1], [2], [3]], GREEDY)
    shown = stream.getvalue()
    assert ("prompt" in shown) == terminal
    assert "\n" not in shown
    llm.generate([1], GREEDY)
    llm.generate([[1], [2]], GREEDY, use_tqdm=False)
    assert stream.getvalue() == shown


def test_batch_invariance_is_refused_where_there_is_none(tmp_path):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    with pytest.raises(InvalidArgument, match=r"batch_invariant is for a GPU of compute capability 9\.0"):
        LLM(folder, device="cpu", batch_invariant=True)
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["mistral-window"])
    with pytest.raises(InvalidArgument, match="without sliding windows"):
        LLM(folder, device="cpu", batch_invariant=True)
