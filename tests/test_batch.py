"""`cupaged batch` on a tiny model: every request is answered once, as it would be alone, however often the run is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from op_cases import SEED
from tiny_models import CONFIGS, write_model

from cupaged import LLM, SamplingParams
from cupaged.batch import BatchSummary, run_batch
from cupaged.cli import main

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Tokens are bytes, the context 512 of them, and no token ends an answer."""
    folder = write_model(tmp_path_factory.mktemp("instruct"), {**CONFIGS["llama-gqa"], "max_position_embeddings": 512})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model, device="cpu", kv_memory="4MB")


@pytest.fixture
def batch(model, tmp_path, capsys):
    """Run `cupaged batch` over these lines (objects, or text as it is); (exit code, lines of OUT, stderr)."""

    def call(*lines: object, options: tuple = (), source: Path = tmp_path / "in.jsonl") -> tuple[int, list[dict] | None, str]:
        if lines:
            write(source, *lines)
        code = main(words(model, source, tmp_path / "out.jsonl", *options))
        out, err = capsys.readouterr()
        assert out == ""
        return code, read(tmp_path / "out.jsonl"), err

    return call


def words(model: str, source: Path, target: Path, *options: object) -> list[str]:
    return ["batch", str(source), str(target), "--model", model, "--device", "cpu", "--kv-memory", "4MB", *map(str, options)]


def write(path: Path, *lines: object) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read(path: Path) -> list[dict] | None:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else None


def request(custom_id: str, url: str = COMPLETIONS, **body: object) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "some-model", **body}}


def chat(custom_id: str, text: str, **body: object) -> dict:
    return request(custom_id, CHAT, messages=[{"role": "user", "content": text}], **body)


def some_requests(count: int, max_tokens: int = 20) -> list[dict]:
    rng = random.Random(SEED)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 80))) for _ in range(count)]
    kinds = [
        lambda name, text, limit: chat(name, text, max_tokens=limit),
        lambda name, text, limit: request(name, prompt=text, max_tokens=limit),
        lambda name, text, limit: request(name, prompt=text, max_tokens=limit, temperature=1.5),  # with the seed it is given
    ]
    return [kinds[i % 3](f"request {i}", text, rng.randint(1, max_tokens)) for i, text in enumerate(texts)]


def said(line: dict) -> list[str]:
    return [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in line["response"]["body"]["choices"]
    ]


def is_one_line(err: str) -> bool:
    return err.startswith("cupaged: ") and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err


# ---- answers


def test_every_request_is_answered_in_order_as_it_would_be_alone(batch, llm, tmp_path):
    requests = some_requests(30)
    code, lines, err = batch(*requests, options=("--max-num-seqs", 4))
    assert (code, err) == (0, f"cupaged: wrote {tmp_path / 'out.jsonl'}: 30 answers and 0 errors\n")
    assert [line["custom_id"] for line in lines] == [request["custom_id"] for request in requests]
    for request_, line in zip(requests, lines, strict=True):
        body = request_["body"]
        if body.get("temperature"):
            continue
        prompt = body.get("prompt") or {"prompt_token_ids": llm.tokenizer.encode_chat(body["messages"])}
        alone = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=body["max_tokens"], logprobs=2))[0]
        steps = [sorted(entry.logprob for entry in step.values())[-2:] for step in alone.outputs[0].logprobs]
        near_tie = any(second > first - 0.02 for second, first in steps)  # the shape of a batch may decide it
        assert said(line) == [alone.outputs[0].text] or near_tie, f"CUPAGED_TEST_SEED={SEED}"
        usage = line["response"]["body"]["usage"]
        assert usage["prompt_tokens"] == len(alone.prompt_token_ids)
        assert usage["completion_tokens"] == usage["total_tokens"] - usage["prompt_tokens"] == body["max_tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_are_of_openais_format(batch, llm):
    _, (talk, text), _ = batch(chat("a", "Hello", max_completion_tokens=3), request("b", prompt="Hello"))
    for line in (talk, text):
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        body = line["response"]["body"]
        assert body["model"] == "some-model"
        assert abs(body["created"] - time.time()) < 60
        assert body["choices"][0]["finish_reason"] == "length"
    assert talk["id"] != text["id"]
    assert talk["response"]["body"]["object"] == "chat.completion"
    assert list(talk["response"]["body"]["choices"][0]["message"]) == ["role", "content", "refusal"]
    assert talk["response"]["body"]["usage"]["completion_tokens"] == 3
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["body"]["usage"]["completion_tokens"] == 16  # the API's default for completions


def test_bodies_in_all_their_forms(batch, llm):
    ids = [72, 101, 108, 108, 111]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    code, lines, _ = batch(
        request("text", prompt="Hello", max_tokens=8),
        request("ids", prompt=ids, max_tokens=8),
        request("many", prompt=["Hello", "Bye"], max_tokens=8, n=2, temperature=1, seed=5),
        request("many ids", prompt=[ids, [9]], max_tokens=8),
        request(
            "nulls", prompt="Hello", max_tokens=8, temperature=None, stop=None, tools=None, stream=False, user="me", best_of=1
        ),
        request("stop", prompt="Hello", max_tokens=8, stop="\ufffd\ufffd\ufffd"),
        chat("whole", "Hello", max_tokens=8),
        request("parts", CHAT, messages=[{"role": "user", "content": parts}], max_tokens=8),
    )
    assert (code, [line["error"] for line in lines]) == (0, [None] * 8)
    answers = {line["custom_id"]: said(line) for line in lines}
    assert answers["text"] == answers["ids"] == answers["nulls"] == answers["many ids"][:1]
    params = SamplingParams(n=2, temperature=1, seed=5, max_tokens=8)
    expected = [completion.text for output in llm.generate(["Hello", "Bye"], params) for completion in output.outputs]
    assert answers["many"] == expected
    assert [choice["index"] for choice in lines[2]["response"]["body"]["choices"]] == [0, 1, 2, 3]
    assert answers["whole"] == answers["parts"]


def test_log_probabilities_are_those_of_the_model(batch, llm):
    common = {"temperature": 1.5, "seed": 4, "max_tokens": 6}
    _, (talk, own, text), _ = batch(
        chat("chat", "Hello", logprobs=True, top_logprobs=3, **common),
        chat("own only", "Hello", logprobs=True, **common),
        request("text", prompt="Hello", logprobs=2, **common),
    )
    params = SamplingParams(logprobs=3, **common)
    prompt = {"prompt_token_ids": llm.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])}
    for line, prompt_, count in ((talk, prompt, 3), (own, prompt, 0), (text, "Hello", 2)):
        expected = llm.generate(prompt_, params)[0].outputs[0]
        drawn = [step[token_id] for step, token_id in zip(expected.logprobs, expected.token_ids, strict=True)]
        best = [sorted(step.values(), key=lambda entry: entry.rank)[:count] for step in expected.logprobs]
        given = line["response"]["body"]["choices"][0]["logprobs"]
        if line is text:
            assert given["tokens"] == [entry.decoded_token for entry in drawn]
            assert given["token_logprobs"] == pytest.approx([entry.logprob for entry in drawn], abs=1e-4)
            assert given["text_offset"][0] == 0
            for step, tops, own_entry in zip(given["top_logprobs"], best, drawn, strict=True):
                several = sorted({*tops, own_entry}, key=lambda entry: -entry.rank)
                wanted = {entry.decoded_token: entry.logprob for entry in several}  # many read the same: parts of characters
                assert step == pytest.approx(wanted, abs=1e-4)
            continue
        assert [step["token"] for step in given["content"]] == [entry.decoded_token for entry in drawn]
        assert [step["logprob"] for step in given["content"]] == pytest.approx([entry.logprob for entry in drawn], abs=1e-4)
        assert [bytes(step["bytes"]).decode(errors="replace") for step in given["content"]] == [
            entry.decoded_token for entry in drawn
        ]
        for step, tops in zip(given["content"], best, strict=True):
            assert [top["token"] for top in step["top_logprobs"]] == [entry.decoded_token for entry in tops]


def test_a_bias_decides_the_answer(batch):
    _, (line,), _ = batch(request("a", prompt="Hello", max_tokens=5, logit_bias={str(ord("z")): 100}))
    assert said(line) == ["zzzzz"]


def test_what_is_drawn_can_be_repeated(batch, tmp_path):
    lines = [request(name, prompt="Hello", temperature=1.5, max_tokens=20) for name in "abcd"]
    _, first, _ = batch(*lines)
    (tmp_path / "out.jsonl").unlink()
    _, second, _ = batch(*reversed(lines), options=("--max-num-seqs", 1))
    assert [said(line) for line in first] == [said(line) for line in reversed(second)]
    assert len({said(line)[0] for line in first}) > 1


def test_a_request_that_fails_is_a_line_with_an_error(batch, llm):
    fine = request("fine", prompt="Hello", max_tokens=8)
    wrong = [  # (line, its custom_id in the output, what the error says)
        ('{"custom_id": "torn', None, "line 2 is not JSON"),
        ("[" * 100000, None, "line 3"),
        ("[1, 2]", None, "line 4 is no JSON object"),
        ({**fine, "custom_id": 7}, None, "line 5 has no custom_id"),
        ({**fine, "custom_id": ""}, None, "line 6 has no custom_id"),
        (request("fine", prompt="another"), None, "line 7 has the custom_id 'fine' of line 1"),
        ({**fine, "custom_id": "get", "method": "GET"}, "get", "'GET'"),
        ({**fine, "custom_id": "url", "url": "/v1/embeddings"}, "url", "/v1/embeddings"),
        ({**fine, "custom_id": "body", "body": "text"}, "body", "body"),
        (request("empty", prompt=""), "empty", "empty"),
        (request("no prompt"), "no prompt", "prompt"),
        (request("mixed", prompt=["a", 3]), "mixed", "prompt"),
        (request("foreign", prompt=[1, 260]), "foreign", "260"),
        (request("long", prompt="x" * 600), "long", "600 tokens"),
        (request("second of two", prompt=["x", "x" * 600]), "second of two", "600 tokens"),
        (request("hot", prompt="x", temperature="hot"), "hot", "temperature"),
        (request("nan", prompt="x", temperature=float("nan")), "nan", "temperature"),
        (request("many", prompt="x", n=10**9), "many", "128"),
        (request("none", prompt="x", max_tokens=0), "none", "max_tokens"),
        (request("tools", CHAT, messages=[{"role": "user", "content": "x"}], tools=[{"type": "function"}]), "tools", "tools"),
        (request("stream", prompt="x", stream=True), "stream", "stream"),
        (request("json", prompt="x", response_format={"type": "json_object"}), "json", "response_format"),
        (request("bias", prompt="x", logit_bias=[1]), "bias", "logit_bias"),
        (request("no id", prompt="x", logit_bias={"x": 1}), "no id", "logit_bias"),
        (request("foreign bias", prompt="x", logit_bias={"260": 1}), "foreign bias", "260"),
        (request("all", prompt="x", logprobs=-1), "all", "logprobs"),
        (chat("how many", "x", logprobs=3), "how many", "true or false"),
        (chat("too many", "x", logprobs=True, top_logprobs=21), "too many", "top_logprobs"),
        (request("text", CHAT, messages="Hello"), "text", "messages"),
        (request("silent", CHAT, messages=[]), "silent", "messages"),
        (request("role", CHAT, messages=[{"content": "x"}]), "role", "messages[0]"),
        (request("null", CHAT, messages=[{"role": "user", "content": None}]), "null", "messages[0].content"),
        (
            request("image", CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
            "image",
            "image_url",
        ),
        (request("surrogate", prompt="\ud800"), "surrogate", "surrogate"),
        (request("\ud800", prompt="x", max_tokens=-1), "\ud800", "max_tokens"),
    ]
    code, lines, err = batch(fine, *(line for line, _, _ in wrong), "", "   ", request("last", prompt="Hello", max_tokens=8))
    assert (code, len(lines), is_one_line(err)) == (0, len(wrong) + 2, True), err
    assert f"2 answers and {len(wrong)} errors" in err
    expected = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    for line, name in ((lines[0], "fine"), (lines[-1], "last")):
        assert (line["custom_id"], said(line), line["error"]) == (name, [expected], None)
    for line, (_, custom_id, says) in zip(lines[1:-1], wrong, strict=True):
        assert (line["custom_id"], line["response"]) == (custom_id, None)
        assert says in line["error"]["message"], line
        assert "internal error" not in line["error"]["message"]
    assert len({line["id"] for line in lines}) == len(lines)


def test_an_error_that_nobody_expected_is_its_requests_alone(batch, monkeypatch):
    add = LLM.add

    def fails_on_x(self: LLM, prompt: object, params: SamplingParams) -> object:
        if prompt == "x":
            raise RuntimeError("no\nx")
        return add(self, prompt, params)

    monkeypatch.setattr(LLM, "add", fails_on_x)
    code, lines, _ = batch(request("a", prompt="x"), request("b", prompt="y"))
    assert code == 0
    assert lines[0]["error"]["message"] == "internal error: RuntimeError: no x"
    assert said(lines[1]) != [""]


def test_no_more_run_at_a_time_than_asked_for_and_nothing_is_left_behind(llm, tmp_path, monkeypatch):
    outputs, most, add = [], [], llm.add

    def spied(prompt: object, params: SamplingParams) -> object:
        outputs.append(add(prompt, params))
        most.append(sum(not output.finished for output in outputs))
        return outputs[-1]

    def run() -> BatchSummary:
        return run_batch(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "model", lambda: llm, max_running=3)

    monkeypatch.setattr(llm, "add", spied)
    write(tmp_path / "in.jsonl", *some_requests(12), request("half", prompt=["x", "x" * 600], max_tokens=400))
    assert run() == BatchSummary(total=13, failed=1, done_before=0)
    assert max(most) == 3
    llm.generate("Hello")  # what is left behind would move on with this
    assert llm.pool_stats().used_blocks == 0

    write(tmp_path / "in.jsonl", request("endless", prompt="x", max_tokens=400))
    (tmp_path / "out.jsonl").unlink()
    step = llm.step
    monkeypatch.setattr(llm, "step", lambda: step() if len(outputs[-1].outputs[0].token_ids) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert llm.pool_stats().used_blocks == 0


# ---- files that cannot be used


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b'[\n  {"custom_id":\n  "a"}\n]\n', "not JSON"),
        (b"[{}]", "no JSON object"),
        (b"na\xefve", "UTF-8"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_a_file_without_requests_is_one_line(batch, tmp_path, content, says):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    code, lines, err = batch()
    assert (code, lines, is_one_line(err)) == (2, None, True), err
    assert says in err
    assert str(tmp_path / "in.jsonl") in err
    assert [path.name for path in tmp_path.iterdir()] == (["in.jsonl"] if content is not None else [])


def test_outputs_that_cannot_be_written_are_one_line(model, tmp_path, capsys):
    write(tmp_path / "in.jsonl", request("a", prompt="x"))
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "no" / "out.jsonl", tmp_path / "folder", Path(os.devnull)):
        assert main(words(model, tmp_path / "in.jsonl", target)) == 2
        err = capsys.readouterr().err
        assert is_one_line(err), err
        assert str(target) in err
    assert main(words(model, tmp_path / "in.jsonl", tmp_path / "in.jsonl")) == 2
    assert is_one_line(capsys.readouterr().err)
    assert read(tmp_path / "in.jsonl") == [request("a", prompt="x")]


def test_a_wrong_option_or_model_leaves_no_file(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = request("a", prompt="x")
    for options, expected in ((("--max-num-seqs", 0), 2), (("--block-size", 3), 2), (("--model", "no-such-model"), 1)):
        code, lines, err = batch(line, options=options)
        assert (code, lines, is_one_line(err)) == (expected, None, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
@pytest.mark.parametrize(
    "content", ["a poem\nof two lines\n", '{"id": "batch_req_1", "custom_id": "a", "error": null}\n', "[]\n"]
)
def test_a_file_that_holds_something_else_is_left_alone(model, tmp_path, capsys, monkeypatch, name, content):
    monkeypatch.setattr(LLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / name).write_text(content)
    write(tmp_path / "in.jsonl", request("a", prompt="x"))
    code = main(words(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    err = capsys.readouterr().err
    assert (code, is_one_line(err)) == (2, True), err
    assert str(tmp_path / name) in err
    assert (tmp_path / name).read_text() == content


def test_answers_to_other_requests_or_of_another_model_are_not_taken(batch, model, tmp_path, capsys):
    batch(request("a", prompt="x"))
    before = (tmp_path / "out.jsonl").read_bytes()
    other = write_model(tmp_path / "other", CONFIGS["llama-mha"])
    for line, folder in ((request("a", prompt="y"), model), (request("a", prompt="x"), str(other))):
        write(tmp_path / "in.jsonl", line)
        assert main(words(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 2
        err = capsys.readouterr().err
        assert is_one_line(err)
        assert "out.jsonl" in err
        assert (tmp_path / "out.jsonl").read_bytes() == before


def test_two_runs_do_not_write_one_file(batch, tmp_path):
    with FileLock(tmp_path / "out.jsonl.lock"):
        code, lines, err = batch(request("a", prompt="x"))
    assert (code, lines, is_one_line(err)) == (2, None, True)
    assert "another process" in err


# ---- going on


def without_times(lines: list[dict]) -> list[dict]:
    """The lines less what depends on when they were computed, and beside what."""
    for line in lines:
        if line["response"] is not None:
            line["response"]["body"]["created"] = 0
            del line["response"]["body"]["usage"]["prompt_tokens_details"]
    return lines


@posix
def test_kill_9_at_any_moment_loses_and_repeats_nothing(model, tmp_path):
    rng = random.Random(SEED)
    requests = [*some_requests(30, max_tokens=60), "no JSON", request("request 3", prompt="again")]
    source, target, partial = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
    write(source, *requests)
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed, finished = 0, []
    while not target.exists():
        command = [sys.executable, "-m", "cupaged", *words(model, source, target, "--max-num-seqs", 4)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
        # Killed once it has answered a few more; in the last rounds it is let be.
        goal = len(finished) + rng.randint(1, 6)
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if partial.exists() and partial.read_bytes().count(b"\n") >= goal and killed < 4:
                time.sleep(rng.random() * 0.02)
                child.send_signal(signal.SIGKILL)
                child.wait()
                killed += child.returncode == -signal.SIGKILL
                break
            time.sleep(0.002)
        err = child.communicate(timeout=60)[1]
        assert child.returncode in (0, -signal.SIGKILL), err
        if not partial.exists():
            break
        lines = partial.read_bytes().split(b"\n")[:-1]
        assert lines[: len(finished)] == finished  # what was done is still there, as it was
        finished = lines
        with partial.open("ab") as file:  # as a crash of the machine may leave it
            file.write(rng.choice([b"", b'{"id": "batch_req_', b"\0" * 100]))
    assert killed == 4, f"CUPAGED_TEST_SEED={SEED}"
    assert set(finished) <= set(target.read_bytes().splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    names = [line["custom_id"] for line in read(target)]
    assert names == [*(f"request {i}" for i in range(30)), None, None]
    unbroken = tmp_path / "unbroken.jsonl"
    assert main(words(model, source, unbroken)) == 0
    pairs = list(zip(without_times(read(target)), without_times(read(unbroken)), strict=True))
    assert sum(a != b for a, b in pairs) <= 1, f"CUPAGED_TEST_SEED={SEED}"  # a near-tie may go either way
    assert [a["id"] for a, _ in pairs] == [b["id"] for _, b in pairs]


def test_a_second_run_computes_nothing(batch, tmp_path, monkeypatch):
    requests = [*some_requests(5), "no JSON"]
    batch(*requests)
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(LLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    code, _, err = batch()
    assert (code, (tmp_path / "out.jsonl").read_bytes()) == (0, before)
    assert "5 answers and 1 errors, 6 of them from an earlier run" in err
    # killed between the renaming and the removal of the partial file
    (tmp_path / "out.jsonl.partial").write_bytes(before)
    assert batch()[0] == 0
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_requests_that_came_later_are_all_that_is_computed(batch, tmp_path):
    requests = some_requests(9)
    batch(*requests[3:6])
    before = (tmp_path / "out.jsonl").read_bytes().splitlines()
    code, lines, err = batch(*requests)
    assert (code, [line["custom_id"] for line in lines]) == (0, [request["custom_id"] for request in requests])
    assert (tmp_path / "out.jsonl").read_bytes().splitlines()[3:6] == before
    assert "3 of them from an earlier run" in err


def test_a_line_that_was_mended_is_computed_and_the_others_are_kept(batch, tmp_path):
    right, wrong = request("a", prompt="hi", max_tokens=3), request("b", prompt="hi", max_tokens=0)
    _, first, _ = batch(right, wrong)
    assert [line["error"] is None for line in first] == [True, False]
    code, second, _ = batch(right, request("b", prompt="hi", max_tokens=2))
    assert code == 0
    assert second[0] == first[0]
    assert second[1]["error"] is None


def test_a_step_that_fails_keeps_what_was_done(batch, tmp_path, monkeypatch):
    step, steps = LLM.step, []

    def fails_late(self: LLM) -> None:
        steps.append(None)
        if len(steps) == 12:
            raise RuntimeError("the device is on fire")
        step(self)

    requests = [request(str(n), prompt="Hello", max_tokens=4) for n in range(6)]
    monkeypatch.setattr(LLM, "step", fails_late)
    code, lines, err = batch(*requests, options=("--max-num-seqs", 2))
    assert (code, lines) == (1, None)
    assert "4 of 6 requests are done" in err.splitlines()[0]
    assert "on fire" in err.splitlines()[1]
    done = (tmp_path / "out.jsonl.partial").read_bytes().splitlines()
    monkeypatch.undo()
    code, lines, _ = batch()
    assert (code, len(lines)) == (0, 6)
    assert set(done) <= set((tmp_path / "out.jsonl").read_bytes().splitlines())


@posix
def test_ctrl_c_ends_with_130_and_the_run_can_go_on(model, tmp_path):
    write(tmp_path / "in.jsonl", *(request(str(n), prompt="Hello", max_tokens=n + 1) for n in range(200)))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "cupaged", *words(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    partial = tmp_path / "out.jsonl.partial"
    while child.poll() is None and (not partial.exists() or not partial.read_bytes()):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert f"of 200 requests are done and kept in {partial}" in err
    assert partial.read_bytes()
    assert not (tmp_path / "out.jsonl").exists()


@posix
def test_progress_is_shown_on_a_terminal_only(model, tmp_path):
    write(tmp_path / "in.jsonl", *(request(str(n), prompt="Hello", max_tokens=3) for n in range(20)))
    import fcntl
    import termios

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def stderr(*options: str) -> str:
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        terminal, end = os.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        command = [sys.executable, "-m", "cupaged", *words(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options)]
        child = subprocess.Popen(command, stderr=end, env=env)
        os.close(end)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # Linux says so when the last writer is gone
            pass
        os.close(terminal)
        assert child.wait(60) == 0
        return shown.decode()

    assert "/20" in stderr()
    assert stderr("-q") == ""
