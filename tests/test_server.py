"""`cupaged serve`, in a process of its own: driven by OpenAI's own client, by raw bytes, and by those who wish it ill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
import reference
from op_cases import SEED
from tiny_models import CONFIGS, write_model

from cupaged import LLM, SamplingParams
from cupaged.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
KEY = "a secret"
MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Tokens are bytes, the context 512 of them."""
    folder = write_model(tmp_path_factory.mktemp("served") / "tiny", {**CONFIGS["llama-gqa"], "max_position_embeddings": 512})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return str(folder)


class Served:
    """A running `cupaged serve`."""

    def __init__(self, model: str, *options: object, **env: str) -> None:
        command = [sys.executable, "-m", "cupaged", "serve", model, "--port", "0", "--device", "cpu", "--kv-memory", "4MB"]
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **env},
        )
        line = self.process.stderr.readline()
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.resources = psutil.Process(self.process.pid)

    def client(self, key: str = KEY, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def async_client(self, **options: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, **options)

    def post(self, path: str = "/v1/chat/completions", **more: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", **more.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=60, **more)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def wait_until_empty(self) -> None:
        """All requests are gone and every block is free."""
        deadline = time.monotonic() + 20
        while True:
            metrics = self.metrics()
            left = [
                metrics["cupaged_requests"],
                metrics["cupaged_sequences_running"],
                metrics['cupaged_kv_blocks{state="used"}'],
            ]
            if left == [0, 0, 0]:
                return
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, what it said on stderr)"""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def served(model):
    served = Served(model, "--max-num-seqs", 8, "--max-requests", 80, "--max-body", "200KB", CUPAGED_API_KEY=KEY)
    yield served
    served.wait_until_empty()
    assert served.end() == (0, "")


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model, device="cpu", kv_memory="4MB")


def raw(path: str, body: object, length: int | None = None) -> bytes:
    """A request as it goes over the wire, announcing the body's length or another one."""
    text = json.dumps(body)
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {length or len(text)}"]
    return "\r\n".join([*head, "", text]).encode()


# ---- OpenAI's client


def test_a_chat_is_what_the_llm_says(served, llm):
    expected = llm.chat(MESSAGES, SamplingParams(**GREEDY))[0]
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = served.client().chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, **{limit: 8})
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
        assert choice.finish_reason == expected.outputs[0].finish_reason
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
        assert answer.model == "tiny"


def test_content_may_come_in_parts(served, llm):
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    answer = served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], **GREEDY)
    assert answer.choices[0].message.content == llm.chat(MESSAGES, SamplingParams(**GREEDY))[0].outputs[0].text


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_adds_up_to_the_whole(served, chat, n):
    client = served.client()
    make = client.chat.completions.create if chat else client.completions.create
    what = {"messages": MESSAGES} if chat else {"prompt": ["Hello", [72, 105]]}
    asked = {"model": "tiny", "n": n, "temperature": 1.2, "seed": 4, "max_tokens": 20, "stop": ["e"], **what}
    asked["logprobs"] = True if chat else 2
    whole = make(**asked)
    texts, reasons, tokens, usages = {}, {}, {}, []
    for chunk in make(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.id.startswith("chatcmpl-" if chat else "cmpl-")
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the reason to finish"
            piece = choice.delta.content if chat else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.logprobs is not None:
                more = [entry.token for entry in choice.logprobs.content] if chat else choice.logprobs.tokens
                tokens.setdefault(choice.index, []).extend(more)
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert len(whole.choices) == len(texts) == (n if chat else 2 * n)
    for choice in whole.choices:
        assert texts[choice.index] == (choice.message.content if chat else choice.text)
        assert reasons[choice.index] == choice.finish_reason
        expected = [entry.token for entry in choice.logprobs.content] if chat else choice.logprobs.tokens
        assert tokens[choice.index] == expected
    [usage] = usages
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_the_bytes_of_tokens_add_up_to_the_text(served):
    """Tokens are bytes here, so that no character outside of ASCII is a token's own."""
    bias = {str(byte): 100 - place for place, byte in enumerate("🐱é".encode())}
    asked = {
        "model": "tiny",
        "logit_bias": bias,
        "presence_penalty": 2,
        "frequency_penalty": 2,
        "max_tokens": 60,
        "temperature": 0,
    }
    answer = served.client().chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **asked)
    [choice] = answer.choices
    data = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert len(data) == 60
    assert max(data) >= 0x80
    assert data.decode(errors="replace").replace("\ufffd", "") == choice.message.content.replace("\ufffd", "")
    completion = served.client().completions.create(prompt="Hello", logprobs=1, **asked).choices[0]
    assert completion.logprobs.text_offset[0] == 0
    assert completion.logprobs.text_offset == sorted(completion.logprobs.text_offset)


def test_models_health_and_metrics(served):
    client = served.client()
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "cupaged"
    with pytest.raises(openai.NotFoundError, match="no model 'large'"):
        client.models.retrieve("large")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    before = served.metrics()
    client.completions.create(model="tiny", prompt="Hello", **GREEDY)
    after = served.metrics()
    new = {name: after[name] - before.get(name, 0) for name in after}
    assert new['cupaged_http_requests_total{path="/v1/completions",status="200"}'] == 1
    assert new["cupaged_time_to_first_token_seconds_count"] == 1
    assert new["cupaged_inter_token_seconds_count"] == new["cupaged_generated_tokens_total"] - 1
    assert new["cupaged_prompt_tokens_total"] == 5
    assert after['cupaged_kv_blocks{state="free"}'] > after['cupaged_kv_blocks{state="cached"}'] > 0


def test_errors_are_those_the_client_knows(served):
    client = served.client()
    with pytest.raises(openai.AuthenticationError, match="API key"):
        served.client(key="another").chat.completions.create(model="tiny", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="stop"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, stop=[""], stream=True)


# ---- raw requests

WRONG = [
    (b"{", 400, "not JSON"),
    (b"\xff\xfe{}", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b"", 400, "not JSON"),
    (b"[]", 400, "no JSON object"),
    (b"{}", 422, "messages"),
    (b'{"messages": "hi"}', 422, "messages"),
    (b'{"messages": []}', 400, "messages"),
    (b'{"messages": [{"role": "user"}]}', 400, "content"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "text"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}', 422, "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": -1}', 400, "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "n": 0}', 400, "n is 0"),
    (b'{"messages": [{"role": "user", "content": "a"}], "n": 1000}', 400, "n is 1000"),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1.5}', 422, "max_tokens"),
    (b'{"messages": [{"role": "user", "content": "a"}], "stream": "yes"}', 422, "stream"),
    (b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"x": 1}}', 400, "logit_bias"),
    (b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"9999": 1}}', 400, "vocabulary"),
    (b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 99, "logprobs": true}', 400, "top_logprobs"),
    (b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "xml"}}', 400, "response_format"),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "other"}', 404, "no model"),
]


@pytest.mark.parametrize(("body", "status", "says"), WRONG, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_body_is_one_clear_error(served, body, status, says, stream):
    if stream and body.endswith(b"}") and b'"stream"' not in body and body != b"{}":
        body = body[:-1] + b', "stream": true}'
    response = served.post(content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert set(error) == {"message", "type", "param", "code"}


def test_unknown_fields_are_ignored(served):
    body = {"messages": MESSAGES, "user": "me", "store": True, "metadata": {"a": 1}, "whatever": [1], **GREEDY}
    assert served.post(json=body).status_code == 200


def test_paths_and_methods_that_are_not_there(served):
    assert served.post("/v1/embeddings", json={}).status_code == 404
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"] == "there is nothing at this path"
    assert httpx.get(f"{served.url}/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"}).status_code == 405


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer a secre", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"])
def test_without_the_key_there_is_nothing(served, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/v1/nothing"):
        response = httpx.get(served.url + path, headers=headers)
        assert response.status_code == 401
    assert httpx.post(f"{served.url}/v1/completions", headers=headers, json={"prompt": "a"}).status_code == 401


@pytest.mark.parametrize("key", ["sécret", "ключ", "a b"])
def test_a_key_may_have_any_letters(model, key):
    served = Served(model, CUPAGED_API_KEY=f"{key}\n")
    try:
        for header in (f"Bearer {key}", f"bearer   {key}"):
            assert httpx.get(f"{served.url}/v1/models", headers={"Authorization": header.encode()}).status_code == 200
        assert httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}s".encode()}).status_code == 401
    finally:
        assert served.end()[0] == 0


def test_a_long_text_holds_nobody_up(model):
    served = Served(model)
    try:
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(served.post, "/v1/completions", json={"prompt": "some words " * 300_000})
            slowest = 0.0
            while not long.done():
                started = time.monotonic()
                assert httpx.get(f"{served.url}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - started)
            assert long.result().status_code == 400
        assert slowest < 1.5
    finally:
        assert served.end()[0] == 0


def test_a_body_that_is_too_large_is_not_read(served):
    assert served.post(content=b'{"a": "' + b"x" * 300_000).status_code == 413

    def pieces():
        for _ in range(300):
            yield b"x" * 1000

    assert served.post(content=pieces()).status_code == 413  # of a length that nobody announced
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(raw("/v1/completions", {}, length=10**12))
        assert b" 413 " in connection.recv(1000)


def test_no_page_of_another_site_may_call_unless_allowed(served, model):
    origin = {"Origin": "https://example.org"}
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.post(json={"messages": MESSAGES, **GREEDY}, headers=origin).headers
    assert httpx.options(f"{served.url}/v1/completions", headers=asked).status_code in (401, 405)
    other = Served(model, "--allow-origin", "https://example.org", CUPAGED_API_KEY=KEY)
    try:
        response = httpx.options(f"{other.url}/v1/completions", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{other.url}/health", headers={"Origin": "https://evil.org"}).headers
        )
    finally:
        assert other.end()[0] == 0


# ---- structured answers


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """Of bounded texts, so that any model comes to an end."""
    kinds = ["string", "integer", "boolean", "enum", "null"] + (["object", "array"] if depth < 2 else [])
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "object":
        names = rng.sample(["name", "age", "città", "a b", "x", "items"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 8)}
    if kind == "integer":
        least = rng.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 1000)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 3, None, True, "blue"], rng.randint(1, 4))}
    return {"type": kind}


def fits(value: object, schema: dict) -> bool:
    """Whether a value is of one of the schemas above."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        inside = isinstance(value, dict) and set(value) == set(schema["properties"])
        return inside and all(fits(value[name], part) for name, part in schema["properties"].items())
    if kind == "array":
        inside = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return inside and all(fits(each, schema["items"]) for each in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


def test_answers_are_of_the_schema_that_was_asked_for(served):
    rng = random.Random(SEED)
    schemas = [random_schema(rng) for _ in range(50)]
    client = served.client()

    def ask(number: int) -> tuple[int, str, str]:
        shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schemas[number], "strict": True}}
        how = {"temperature": 1.5, "seed": number} if number % 2 else {"temperature": 0}
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=450, n=1 + number % 3, response_format=shape, **how
        )
        return [(choice.message.content, choice.finish_reason) for choice in answer.choices]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(50)))
    for schema, choices in zip(schemas, answers, strict=True):
        for text, reason in choices:
            assert reason == "stop", f"{text} (CUPAGED_TEST_SEED={SEED})"
            assert fits(json.loads(text), schema), f"{text} is not of {schema} (CUPAGED_TEST_SEED={SEED})"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "#"},
        {"enum": ["\ud800"]},
        json.loads('{"type":"object","properties":{"a":' * 100 + "{}" + "}}" * 100),
        {"type": "object", "required": ["a"], "properties": {"a": False}},
    ],
    ids=lambda schema: json.dumps(schema)[:30],
)
def test_a_schema_that_leads_nowhere_is_refused(served, schema):
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    response = served.post(content=json.dumps({"messages": MESSAGES, "response_format": shape, "max_tokens": 20}).encode())
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "schema" in message
    assert len(message) < 500


def test_a_grammar_that_becomes_too_much_is_an_error_and_no_answer(served):
    texts = ({"type": "string", "pattern": f".*{i}.*"} for i in range(500))
    parts = [{"type": "object", "properties": {"a": text}, "required": ["a"]} for text in texts]
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"anyOf": parts}}}
    response = served.post(json={"messages": MESSAGES, "response_format": shape, "max_tokens": 60})
    if response.status_code == 200:
        [choice] = response.json()["choices"]
        assert choice["finish_reason"] == "length" or json.loads(choice["message"]["content"])
    else:
        assert response.status_code == 400
        assert "<state>" not in response.text


def test_what_comes_after_the_json_is_nothing(served):
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "boolean"}}}
    body = {"messages": MESSAGES, "response_format": shape, "max_tokens": 40, "ignore_eos": True, "n": 3, "temperature": 1}
    response = served.post(json=body)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert json.loads(choice["message"]["content"]) in (True, False)
    response = served.post(json={**body, "min_tokens": 10})
    assert response.status_code == 400
    assert "min_tokens" in response.json()["error"]["message"]


def test_any_json_object(served):
    shape = {"type": "json_object"}
    for seed in range(6):  # this model says anything, so an object may take longer than there is room
        answer = served.client().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=100, response_format=shape, temperature=1, seed=seed
        )
        text = answer.choices[0].message.content
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


# ---- many at once, and clients that leave


def check_64_streams_of_which_half_leave(served, model: str, most: int) -> None:
    rng = random.Random(SEED)

    async def one(client: openai.AsyncOpenAI, number: int) -> int:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{number} " + "x" * rng.randint(0, 60)}],
            max_tokens=rng.randint(most // 2, most),
            temperature=1,
            seed=number,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        count, leaves_after = 0, rng.randint(0, 2) if number % 2 else None
        async for _ in stream:
            count += 1
            if leaves_after is not None and count > leaves_after:
                await stream.close()
                return -1
        return count

    async def main() -> list[int]:
        async with served.async_client() as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    counts = asyncio.run(main())
    assert [count == -1 for count in counts] == [number % 2 == 1 for number in range(64)]
    assert min(counts[::2]) > 3
    served.wait_until_empty()


def test_64_streams_of_which_half_leave(served):
    check_64_streams_of_which_half_leave(served, "tiny", most=120)


def test_64_streams_of_which_half_leave_on_real_weights():
    served = Served(str(reference.smollm2_folder()), "--served-model-name", "smollm2", "--kv-memory", "300MB")
    try:
        check_64_streams_of_which_half_leave(served, "smollm2", most=16)
    finally:
        assert served.end() == (0, "")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_waiting_frees_its_place_at_once(served, stream):
    body = {"prompt": "abc", "max_tokens": 450, "ignore_eos": True, "n": 8, "temperature": 1, "stream": stream}
    text = raw("/v1/completions", body)
    for _ in range(6):
        connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(6)]
        for connection in connections:
            connection.sendall(text)
        deadline = time.monotonic() + 20
        while served.metrics()["cupaged_requests"] < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        before = served.metrics()["cupaged_generated_tokens_total"]
        for connection in connections:
            connection.close()
        served.wait_until_empty()
        new = served.metrics()["cupaged_generated_tokens_total"] - before
        assert new < 6 * 8 * 100, "they were computed on"


def test_a_reader_that_does_not_read_holds_nobody_up(served):
    body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "n": 4, "temperature": 1, "stream": True, "logprobs": 5}
    text = raw("/v1/completions", body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(text)
        for _ in range(3):
            assert served.post(json={"messages": MESSAGES, **GREEDY}).status_code == 200
    served.wait_until_empty()


def test_ten_thousand_at_once(served):
    """Those over the limit are turned away at once; the server keeps its memory, and answers afterwards as before."""
    served.post(json={"messages": MESSAGES, **GREEDY})
    memory = served.resources.memory_info().rss
    text = raw("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 1})
    statuses: dict[int, int] = {}

    async def some(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        for _ in range(count):
            writer.write(text)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))
            status = int(answer.split()[1])
            statuses[status] = statuses.get(status, 0) + 1
        writer.close()

    async def main() -> None:
        await asyncio.gather(*(some(20) for _ in range(500)))

    asyncio.run(main())
    assert set(statuses) <= {200, 429}, statuses
    assert sum(statuses.values()) == 10_000
    assert statuses[429] > 0
    assert statuses[200] >= 80
    served.wait_until_empty()
    assert served.post(json={"messages": MESSAGES, **GREEDY}).status_code == 200
    assert served.resources.memory_info().rss < memory + (150 << 20)


# ---- the end


def test_sigterm_lets_running_requests_finish(model):
    served = Served(model)
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 300, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(9) as pool:
        whole = [pool.submit(served.client().completions.create, **asked) for _ in range(4)]
        streams = [pool.submit(lambda: list(served.client().completions.create(**asked, stream=True))) for _ in range(4)]
        deadline = time.monotonic() + 20
        while served.metrics()["cupaged_sequences_running"] < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        started = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            served.client().models.list()
        for future in whole:
            assert future.result(60).usage.completion_tokens == 300
        for future in streams:
            assert future.result(60)[-1].choices[0].finish_reason == "length"
    _, err = served.process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert (served.process.returncode, err) == (0, "")


def test_what_outlasts_the_grace_gets_a_clean_error(model):
    served = Served(model, "--grace", 0.3)
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 500, "temperature": 1, "n": 60, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(served.client().completions.create, **asked)
        stream = pool.submit(lambda: list(served.client().completions.create(**asked, stream=True)))
        deadline = time.monotonic() + 20
        while served.metrics()["cupaged_generated_tokens_total"] < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="the server ended"):
            whole.result(60)
        with pytest.raises(openai.APIError, match="the server ended"):
            stream.result(60)
    _, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, err) == (0, "")


def test_a_second_sigterm_ends_the_grace(model):
    served = Served(model)
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 500, "temperature": 1, "n": 60, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(served.client().completions.create, **asked)
        deadline = time.monotonic() + 20
        while served.metrics()["cupaged_generated_tokens_total"] < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        with pytest.raises(openai.InternalServerError, match="the server ended"):
            whole.result(60)
    _, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, err) == (0, "")


def test_a_body_that_never_comes_does_not_hold_up_the_end(model):
    served = Served(model, "--grace", 0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(raw("/v1/completions", {"prompt": "abc"}, length=1000))
        time.sleep(0.3)
        started = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")
    _, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, err) == (0, "")
    assert time.monotonic() - started < 5


def test_ctrl_c_ends_with_130(model):
    code, err = Served(model).end(signal.SIGINT)
    assert code == 130
    assert err.strip() == ""


# ---- starting


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cupaged: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_served_is_one_line(model, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", model, "--port", str(taken.getsockname()[1])]) == 2
        assert "in use" in one_line(capsys)
    for options, says in [
        (("--port", "70000"), "port"),
        (("--host", "no.such.host.invalid"), "cannot listen"),
        (("--max-requests", "0"), "max_requests"),
        (("--timeout", "0"), "timeout"),
        (("--grace", "-1"), "grace"),
        (("--max-body", "much"), "--max-body"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--api-key", ""), "api_key"),
    ]:
        assert main(["serve", model, "--port", "0", *options]) == 2
        assert says in one_line(capsys)
    assert main(["serve", "/nowhere", "--port", "0"]) in (1, 2)
    one_line(capsys)


def test_without_the_extra_it_says_what_to_install(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "cupaged.server.process", raising=False)
    assert main(["serve", model]) == 1
    assert "cupaged[serve]" in one_line(capsys)


def test_a_request_that_takes_too_long_is_told(model):
    served = Served(model, "--timeout", "0.3")
    try:
        asked = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "n": 40, "temperature": 1}
        response = served.post("/v1/completions", json=asked)
        assert response.status_code == 503
        assert "longer than 0.3 s" in response.json()["error"]["message"]
        text = served.post("/v1/completions", json={**asked, "stream": True}).text
        assert "longer than 0.3 s" in text
        assert "[DONE]" not in text
        served.wait_until_empty()
    finally:
        with contextlib.suppress(ProcessLookupError):
            assert served.end()[0] == 0
