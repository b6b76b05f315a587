"""What goes wrong with one request, or in the midst of a step, is nobody else's: the others give what each gives alone."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import step_by_step
import tiny_models
from op_cases import SEED

import cupaged
from cupaged import LLM, BeamSearchParams, InvalidArgument, SamplingParams

ENGINE = str(Path(cupaged.__file__).parent / "engine")
BLOCK_BYTES = 4 * 1536  # of 4 tokens of the model below
PARAMS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "n": 3, "frequency_penalty": 0.5},
    {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1, "repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 4, "top_k": 9},
    {"temperature": 0, "stop_token_ids": list(range(0, 256, 9)), "min_tokens": 4},
]
LAYOUTS = {
    "roomy": {"kv_memory": "4MB"},
    "tiny": {"block_size": 4, "kv_memory": 19 * BLOCK_BYTES, "max_num_batched_tokens": 20},
    "guessing": {"kv_memory": "4MB", "block_size": 4, "speculative": "ngram", "num_speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", tiny_models.CONFIGS["llama-gqa"])


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


class Requests:
    """A mix of requests, and what each of them gives alone."""

    def __init__(self, folder):
        plain = LLM(folder, device="cpu", kv_memory="4MB")
        rng = np.random.default_rng([SEED, 5])
        self.prompts = [rng.integers(0, 256, length).tolist() for length in (9, 14, 21, 1, 30)]
        self.params = [SamplingParams(max_tokens=12, ignore_eos=True, **params) for params in PARAMS]
        self.expected = [
            [step_by_step.complete(plain, prompt, params, candidate) for candidate in range(params.n)]
            for prompt, params in zip(self.prompts, self.params, strict=True)
        ]

    def add(self, llm):
        return [llm.add(prompt, params) for prompt, params in zip(self.prompts, self.params, strict=True)]

    def check(self, requests):
        """Those without an error are as alone; how many have one."""
        for request, of_request, params in zip(requests, self.expected, self.params, strict=True):
            assert request.finished
            for output, plain in zip(request.outputs, of_request, strict=True):
                if request.error is None:
                    plain.assert_equal(output.token_ids, output.finish_reason)
                    if params.logprobs is not None:
                        assert len(output.logprobs) == len(output.token_ids)
                        assert len(request.prompt_logprobs) == len(request.prompt_token_ids)
                else:
                    assert output.finish_reason is not None
                    shorter = min(len(output.token_ids), plain.num_certain)
                    assert output.token_ids[:shorter] == plain.token_ids[:shorter]
        return sum(request.error is not None for request in requests)


@pytest.fixture(scope="module")
def mix(folder):
    return Requests(folder)


def finish(llm, requests, most=2000):
    """Step until all are finished; there is an end to it."""
    for _ in range(most):
        if all(request.finished for request in requests):
            return
        llm.step()
    raise AssertionError("requests that never finish")


def assert_empty(llm):
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_free == llm.pool_stats().num_blocks - 1
    llm.engine.blocks.validate([])


# ---- requests that are wrong


def test_malformed_prompts_among_many(folder, mix, layout):
    llm = LLM(folder, device="cpu", **layout)
    wrong = [[], [-1], [260], [1.5], [None], list(range(200)), {"prompt": "x"}, b"hi", None, 7.5, "\ud800", [[1]], {}]
    prompts, params, right = [], [], []
    for index, prompt in enumerate(wrong):
        prompts.append(prompt)
        params.append(SamplingParams(n=2, max_tokens=4))
        if index < len(mix.prompts):
            right.append(len(prompts))
            prompts.append(mix.prompts[index])
            params.append(mix.params[index])
    requests = llm.generate(prompts, params)
    assert mix.check([requests[place] for place in right]) == 0
    for place, request in enumerate(requests):
        if place not in right:
            assert request.finished
            assert request.error
            assert "\n" not in request.error
            assert [output.finish_reason for output in request.outputs] == ["abort"] * len(request.outputs)
    assert_empty(llm)


def test_what_cannot_be_drawn_from_is_the_fault_of_its_own_request(folder, mix, layout):
    """Everything forbidden, in each of the ways to forbid: an error of this request's, or of `add`; the others go on."""
    llm = LLM(folder, device="cpu", **layout)

    def constant(value):
        return lambda output, logits: np.full_like(logits, value)

    def only_the_end(output, logits):
        masked = np.full_like(logits, -np.inf)
        masked[257] = 1
        return masked

    nothing = [
        {"logit_bias": dict.fromkeys(range(260), -np.inf)},
        {"stop_token_ids": list(range(260)), "min_tokens": 3},
        {"logits_processors": [only_the_end], "min_tokens": 3},
        {"logits_processors": [only_the_end], "logit_bias": {257: -np.inf}},
        {"logits_processors": [constant(-np.inf)]},
        {"logits_processors": [constant(np.nan)]},
        {"logits_processors": [constant(np.inf)]},
        {"logits_processors": [lambda output, logits: logits[:5]]},
        {"logits_processors": [lambda output, logits: None]},
        {"logits_processors": [lambda output, logits: "x"]},
    ]
    for how in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 1}):
        requests, wrong, refused = mix.add(llm), [], 0
        for params in nothing:
            try:
                wrong.append(llm.add([1, 2, 3], SamplingParams(max_tokens=5, **how, **params)))
            except InvalidArgument:
                refused += 1
        finish(llm, [*requests, *wrong])
        assert mix.check(requests) == 0
        assert all(request.error and "\n" not in request.error for request in wrong)
        assert refused + len(wrong) == len(nothing)
    assert_empty(llm)


class Weird(Exception):
    def __str__(self):
        return "two\nlines"


@pytest.mark.parametrize("when", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 4])
def test_a_raising_processor_ends_its_own_request(folder, mix, layout, n, when):
    llm = LLM(folder, device="cpu", **layout)
    requests = mix.add(llm)

    def raising(output, logits):
        if len(output) == when:
            raise Weird
        return logits

    prompt = list(range(35))
    wrong = llm.add(prompt, SamplingParams(n=n, seed=1, max_tokens=10, ignore_eos=True, logits_processors=[raising]))
    finish(llm, [*requests, wrong])
    assert mix.check(requests) == 0
    assert "Weird" in wrong.error
    assert "\n" not in wrong.error
    assert {output.finish_reason for output in wrong.outputs} == {"abort"}
    assert max(len(output.token_ids) for output in wrong.outputs) == when
    assert_empty(llm)


def test_one_raising_candidate_of_several(folder, mix, layout):
    """Others of the request are in the same step, before and after it."""
    llm = LLM(folder, device="cpu", **layout)
    requests = mix.add(llm)
    calls = []

    def raising(output, logits):
        calls.append(1)
        if len(calls) == 14:
            raise KeyError(3)
        return logits

    wrong = llm.add(list(range(35)), SamplingParams(n=5, seed=1, max_tokens=10, ignore_eos=True, logits_processors=[raising]))
    finish(llm, [*requests, wrong])
    assert mix.check(requests) == 0
    assert "KeyError" in wrong.error
    assert_empty(llm)


def test_a_raising_proposer_ends_no_other_request(folder, mix):
    class Raising:
        def propose(self, seq, limit):
            if seq.token_ids[:2] == [250, 251]:
                raise Weird
            return [-1] if seq.token_ids[:2] == [252, 253] else []

    llm = LLM(folder, device="cpu", kv_memory="4MB", speculative=Raising())
    requests = mix.add(llm)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    wrong = [llm.add([250, 251, 3], params), llm.add([252, 253, 3], params)]
    finish(llm, [*requests, *wrong])
    assert mix.check(requests) == 0
    assert all(request.error and "\n" not in request.error for request in wrong)
    assert_empty(llm)


# ---- aborts


@pytest.mark.parametrize("trial", range(6))
def test_abort_at_any_moment(folder, mix, layout, trial):
    llm = LLM(folder, device="cpu", **layout)
    rng = random.Random(SEED + trial)
    requests, doomed = mix.add(llm), []
    for prompt, params in zip(mix.prompts, mix.params, strict=True):
        doomed.append(llm.add(prompt[: rng.randint(1, 30)], params))
    moments = [rng.randint(0, 15) for _ in doomed]
    for step in range(16):
        for request, moment in zip(doomed, moments, strict=True):
            if moment == step:
                llm.abort(request)
                assert request.finished
                llm.abort(request)  # once more is harmless
        llm.step()
    finish(llm, requests)
    assert mix.check(requests) == 0
    assert all(output.finish_reason for request in doomed for output in request.outputs)
    for request in doomed:
        aborted = "abort" in [output.finish_reason for output in request.outputs]
        assert (request.error is not None and "aborted" in request.error) == aborted
    for request in requests:
        llm.abort(request)
    assert mix.check(requests) == 0
    assert_empty(llm)


def test_abort_and_add_from_within_a_step(folder, mix, layout):
    """A processor that ends requests, its own too, and makes new ones."""
    llm = LLM(folder, device="cpu", **layout)
    requests, made = [], []

    def meddle(output, logits):
        if len(output) == 3:
            llm.abort(victim)
            made.extend(mix.add(llm))
        if len(output) == 5:
            llm.abort(own)
        return logits

    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logits_processors=[meddle])
    victim = llm.add(list(range(30)), SamplingParams(n=2, seed=1, max_tokens=50, ignore_eos=True))
    requests = mix.add(llm)
    own = llm.add(list(range(20)), params)
    finish(llm, [*requests, own, victim])
    finish(llm, made)
    assert mix.check(requests) == 0
    assert mix.check(made) == 0
    assert (len(own.outputs[0].token_ids), own.outputs[0].finish_reason) == (5, "abort")
    assert victim.outputs[0].finish_reason == ("abort" if layout is not LAYOUTS["tiny"] else "length")  # it was done before
    assert_empty(llm)


# ---- interruptions


class Interrupt:
    """Raises `error` once, at the `countdown`-th line that is executed in cupaged/engine while it is entered."""

    def __init__(self, countdown, error=KeyboardInterrupt, quiet=()):
        self.countdown, self.error, self.quiet = countdown, error, quiet  # functions that are let alone, with what they call
        self.where = None

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        caller = frame if event == "call" else None
        while caller is not None:
            if caller.f_code.co_name in self.quiet:
                return None
            caller = caller.f_back
        if event == "line":
            self.countdown -= 1
            if self.countdown == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise self.error
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)


def count_lines(call, quiet=()):
    """How many lines of cupaged/engine `call` executes."""
    tracer = Interrupt(10**9, quiet=quiet)
    with tracer:
        call()
    return 10**9 - tracer.countdown


def test_ctrl_c_at_any_line_of_a_step(folder, mix, layout):
    """Of those in the step one may end with an error, being moved on in that moment; the next steps give what is right."""
    llm = LLM(folder, device="cpu", **layout)
    rng = random.Random(SEED)
    requests = mix.add(llm)
    steps = []
    while not all(request.finished for request in requests):
        steps.append(count_lines(llm.step))
    hit = 0
    for trial in range(60):
        requests = mix.add(llm)
        place = rng.randrange(len(steps))
        for _ in range(place):
            llm.step()
        tracer = Interrupt(rng.randint(1, steps[place]), quiet=("recover",))
        try:
            with tracer:
                llm.step()
        except KeyboardInterrupt:
            hit += 1
        said = f"interrupted at {tracer.where}, trial {trial} (CUPAGED_TEST_SEED={SEED})"
        try:
            finish(llm, requests)
            assert mix.check(requests) <= 1
            assert_empty(llm)
        except Exception as error:
            raise AssertionError(said) from error
    assert hit > 20


@pytest.mark.parametrize(
    "what",
    ["logits", "beam_search", "beside others"],
)
def test_ctrl_c_at_any_line_of_what_runs_beside(folder, mix, what):
    llm = LLM(folder, device="cpu", block_size=4, kv_memory="4MB", max_num_batched_tokens=20)
    rng = random.Random(SEED)
    beams = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    calls = {"logits": lambda: llm.logits(range(50)), "beam_search": lambda: llm.beam_search(list(range(30)), beams)}
    call = calls.get(what, calls["beam_search"])
    quiet = ("recover", "drop", "beside_the_scheduler")
    call()  # what it leaves in the prefix cache shortens the next one
    lines = count_lines(call, quiet)
    for trial in range(25):
        requests = mix.add(llm) if what == "beside others" else []
        for _ in range(3 if requests else 0):
            llm.step()
        tracer = Interrupt(rng.randint(1, lines), quiet=quiet)
        with pytest.raises(KeyboardInterrupt), tracer:
            call()
        try:
            finish(llm, requests)
            assert not requests or mix.check(requests) == 0
            assert_empty(llm)
        except Exception as error:
            raise AssertionError(f"{tracer.where}, trial {trial} (CUPAGED_TEST_SEED={SEED})") from error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("place", ["forward", "sample", "copy_blocks", "upload", "penalise", "download"])
def test_a_device_that_fails_once(folder, mix, layout, monkeypatch, place, error):
    llm = LLM(folder, device="cpu", **layout)
    model = llm.engine.model
    requests = mix.add(llm)
    for count in (1, 2, 5):
        owner = model if place == "forward" else model.ops
        original, calls = getattr(owner, place), []

        def failing(*args, original=original, calls=calls, count=count, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise error("the device")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, place, failing)
            try:
                for _ in range(count):
                    llm.step()
            except error:
                pass
    finish(llm, requests)
    assert mix.check(requests) == 0
    assert_empty(llm)


def test_ctrl_c_leaves_generate_with_nothing_behind(folder, mix):
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    rng = random.Random(SEED)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt), Interrupt(rng.randint(200, 3000), quiet=("recover", "abort", "add")):
            llm.generate(mix.prompts, mix.params)
        assert_empty(llm)
    assert mix.check(llm.generate(mix.prompts, mix.params)) == 0


def test_ends_of_sequence_and_errors_do_not_mix(folder, tmp_path):
    """A request that ends by itself in the very step in which another one fails."""
    shutil.copytree(folder, tmp_path / "model")
    llm = LLM(folder, device="cpu", kv_memory="4MB")
    first = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))[0].outputs[0].token_ids[0]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    llm = LLM(tmp_path / "model", device="cpu", kv_memory="4MB")

    def raising(output, logits):
        raise ValueError("no")

    wrong = SamplingParams(max_tokens=3, logits_processors=[raising])
    right = SamplingParams(temperature=0, max_tokens=3)
    requests = llm.generate([[1, 2], [1, 2], [1, 2]], [wrong, right, wrong])
    assert [request.error is None for request in requests] == [False, True, False]
    assert (requests[1].outputs[0].token_ids, requests[1].outputs[0].finish_reason) == ([first], "stop")
    assert_empty(llm)
