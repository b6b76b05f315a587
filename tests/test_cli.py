"""The command line on a tiny model: what it prints where, its exit codes, and every bad input that is its own to refuse."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import CONFIGS, write_model

from cupaged import LLM, SamplingParams, __version__
from cupaged.arguments import QUANTIZATIONS
from cupaged.checkpoint.fetch import models_folder
from cupaged.cli import main
from cupaged.ops.quantized import KINDS

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
COMMANDS = ("generate", "chat", "batch", "serve", "fetch", "info", "bench")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and devices of POSIX")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model without a chat template: its tokens are bytes, its context 128 of them."""
    return str(write_model(tmp_path_factory.mktemp("base"), CONFIGS["llama-gqa"]))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory) -> str:
    """A model with a chat template and a long context, which it fills: no token ends its answers."""
    folder = write_model(tmp_path_factory.mktemp("instruct"), {**CONFIGS["llama-gqa"], "max_position_embeddings": 4096})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture
def run(capsys):
    """Call `main` with these words; (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


def process(*words: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.Popen:
    """`python -m cupaged` with these words, its streams piped unless told otherwise."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "", **(env or {})}
    return subprocess.Popen([sys.executable, "-m", "cupaged", *map(str, words)], env=env, **{**pipes, **kwargs})


def expected(folder: str, prompt: str | dict, max_tokens: int = 8) -> str:
    """What the library says to a prompt."""
    return LLM(folder, device="cpu").generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))[0].outputs[0].text


def is_one_line(err: str) -> bool:
    return err.startswith("cupaged: ") and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err


# ---- what comes out


@pytest.mark.parametrize("form", ["--no-stream", "--stream"])
def test_stdout_is_the_text_and_a_newline(run, base, form):
    code, out, err = run("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 8, form)
    assert (code, out, err) == (0, expected(base, "Hello") + "\n", "")


def test_a_prompt_comes_from_an_option_a_file_or_stdin(run, base, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\ntext\n")  # a byte order mark and line ends as Windows writes them
    common = ("generate", "--model", base, "--device", "cpu", "--max-tokens", 8)
    answers = [run(*common, "--prompt", "naïve\ntext"), run(*common, "--prompt-file", file)]
    for words in ((), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="latin-1"))
        answers.append(run(*common, *words))
    assert answers == [(0, expected(base, "naïve\ntext") + "\n", "")] * 4


def test_a_chat_template_is_used_where_there_is_one(run, instruct):
    def prompt_tokens(*words: str) -> int:
        out = run("generate", "--model", instruct, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 1, "--json", *words)[
            1
        ]
        return json.loads(out)["prompt_tokens"]

    user = 1 + len("user Hello") + 1 + 1
    assert prompt_tokens() == prompt_tokens("--chat") == user
    assert prompt_tokens("--system", "Be") == 1 + len("system Be") + 1 + user
    assert prompt_tokens("--raw") == len("Hello")


def test_json_is_one_object_with_the_documented_keys(run, base):
    code, out, err = run("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 1, "--json")
    answer = json.loads(out)
    keys = [
        "text",
        "token_ids",
        "prompt_tokens",
        "finish_reason",
        "seed",
        "model",
        "device",
        "dtype",
        "kv_cache_dtype",
        "quantization",
        "stats",
    ]
    stats = ["load_s", "weights_bytes", "weights_s", "weights_gb_s"]
    stats += ["time_to_first_token_s", "prefill_tok_s", "decode_tok_s", "cached_tokens", "generated_tokens"]
    assert (code, err, out.count("\n"), list(answer)) == (0, "", 1, keys)
    assert list(answer["stats"]) == [*stats, "kv_blocks", "kv_blocks_peak", "kv_block_size", "kv_bytes"]
    assert answer["text"] == expected(base, "Hello", 1)
    assert (answer["finish_reason"], answer["device"], answer["dtype"]) == ("length", "cpu", "float32")
    assert len(answer["token_ids"]) == answer["stats"]["generated_tokens"] == 1
    assert answer["stats"]["decode_tok_s"] is None  # one token has no speed, and NaN would not be JSON
    assert all(key in run("generate", "--help")[1] for key in keys + list(answer["stats"]))


def test_stats_and_messages_go_to_stderr(run, base):
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 8)
    code, out, err = run(*words, "--stats", "-v")
    assert (code, out) == (0, expected(base, "Hello") + "\n")
    assert [line.split("  ")[0] for line in err.splitlines()[-7:]] == [
        "model",
        "load",
        "weights",
        "first token",
        "prefill",
        "decode",
        "KV pool",
    ]
    assert err.startswith("cupaged: ")  # the library's log


def test_sampling_options_that_cannot_act_are_named(run, base):
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 1, "--top-p", 0.5)
    assert "--top-p" in run(*words)[2]
    assert run(*words, "-q")[2] == run(*words, "--temperature", 1)[2] == ""


def test_every_option_that_generate_lists_works(run, base, tmp_path):
    (tmp_path / "prompt").write_text("Hello")
    options = {
        **{"--model": base, "--device": "cpu", "--dtype": "float32", "--threads": 1, "--max-model-len": 64},
        **{"--kv-cache-dtype": "int8", "--quantization": "int4"},
        **{"--kv-memory": "2MiB", "--block-size": 8, "--max-tokens": 4, "--temperature": 1, "--top-k": 9, "--top-p": 0.9},
        **{"--min-p": 0.01, "--repetition-penalty": 1.1, "--presence-penalty": 0.1, "--frequency-penalty": 0.1},
        **{"--seed": 5, "--stop": "\n\n", "--prompt-file": tmp_path / "prompt"},
    }
    words = [str(word) for pair in options.items() for word in pair] + ["--raw", "--stats", "--no-stream", "--verbose"]
    code, first, _ = run("generate", *words)
    assert (code, run("generate", *words)[:2]) == (0, (0, first))  # a seed makes draws repeatable
    elsewhere = {"--help", "--prompt", "--chat", "--system", "--stream", "--json", "--quiet"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run("generate", "--help")[1])) == {*options, *words[-4:], *elsewhere}


@pytest.mark.parametrize(
    "command",
    [
        *(("generate", "--prompt", "Hello"), ("chat",), ("batch", "in", "out"), ("serve",), ("info",)),
        *(("bench", "generate"), ("bench", "serving")),
    ],
)
def test_a_quantization_that_nobody_knows_is_one_line(run, base, command):
    model = [base] if command in (("info",), ("serve",)) else ["--model", base, "--device", "cpu"]
    code, out, err = run(*command, *model, "--quantization", "int5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"--quantization: invalid choice: 'int5' \(choose from '?int8'?, '?fp8'?, '?int4'?\)", err)


def test_quantised_weights_are_told(run, base):
    assert QUANTIZATIONS == KINDS
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 2, "--quantization", "fp8")
    assert json.loads(run(*words, "--json")[1])["quantization"] == "fp8"
    assert "float32 with fp8 weights on cpu" in run(*words, "--stats")[2]


def test_a_stop_text_ends_the_answer_before_it(run, base):
    text = expected(base, "Hello", 24)
    stop = text[3]
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 24, "--json")
    answer = json.loads(run(*words, "--stop", "never in it", "--stop", stop)[1])
    assert (answer["text"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_fetch_prints_the_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_HOME", str(tmp_path))
    folder = write_model(tmp_path / "smollm2-135m-instruct", CONFIGS["llama-gqa"])
    assert run("fetch", "smollm2-135m-instruct") == (0, f"{folder}\n", "")


def test_info_tells_sizes_without_reading_weights(run, base):
    code, out, err = run("info", base, "--json")
    facts = json.loads(out)
    # by hand: 3 layers of q, o 192x192, k, v 64x192, three FFN 160x192 and two norms; embedding and head 260x192; a norm
    count = 3 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 160 * 192 + 2 * 192) + 2 * 260 * 192 + 192
    assert (code, err, facts["parameters"], facts["weights_bytes"], facts["weights_dtype"]) == (
        0,
        "",
        count,
        4 * count,
        "float32",
    )
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["dtype"], cpu["kv_bytes_per_token"], cpu["context"]) == ("cpu", "float32", 2 * 3 * 64 * 4, 128)
    types = ("--kv-cache-dtype", "int8", "--dtype", "float32")
    quantised = json.loads(run("info", base, "--json", *types)[1])["devices"][0]
    head_dim, kv_heads = facts["head_dim"], facts["num_kv_heads"]
    assert (quantised["kv_cache_dtype"], quantised["kv_bytes_per_token"]) == ("int8", 2 * 3 * kv_heads * (head_dim + 2))
    assert run("info", base, "--kv-cache-dtype", "int5")[0] == 2
    quantised = json.loads(run("info", base, "--json", "--quantization", "int8", "--dtype", "float32")[1])["devices"][0]
    # of the matrices a byte a weight and two a row; the head is one, the embedding is not, nor are norms
    matrices = 3 * (2 * 192 * 194 + 2 * 64 * 194 + 2 * 160 * 194 + 192 * 162) + 260 * 194
    assert (quantised["quantization"], quantised["weights_bytes"]) == ("int8", matrices + 4 * (3 * 2 * 192 + 260 * 192 + 192))
    assert "int8" in run("info", base, "--quantization", "int8")[1]
    text = run("info", base)[1]
    assert f"{count:,}" in text
    assert "128 tokens (whole)" in text


@pytest.mark.parametrize(("blocks", "context"), [(0, 0), (5, 64), (1000, 128)])
def test_info_tells_what_fits(run, base, monkeypatch, blocks, context):
    weights, block = json.loads(run("info", base, "--json")[1])["weights_bytes"], 16 * 2 * 3 * 64 * 4
    # A quarter of what is free beside the weights may be the pool's, and one of its blocks is reserved.
    monkeypatch.setattr("cupaged.ops.numpy.free_memory", lambda: (weights + 4 * blocks * block, 2**40))
    assert json.loads(run("info", base, "--json")[1])["devices"][0]["context"] == context
    assert re.search(rf"^cpu .* {context} tokens( \(whole\))?$", run("info", base)[1], re.MULTILINE)


def test_version_and_help(run):
    assert run("--version") == (0, f"cupaged {__version__}\n", "")
    out = run("--help")[1]
    assert re.findall(r"^    (\w+)", out, re.MULTILINE) == list(COMMANDS)
    for command in COMMANDS:
        code, text, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert text.startswith(f"usage: cupaged {command}")


def test_help_does_not_load_numpy():
    code = "import sys; from cupaged.cli import main; main(['generate', '--help']); sys.exit('numpy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1]).returncode == 0
    )


def test_smollm2_knows_the_capital_of_france(run):
    if not (models_folder() / "smollm2-135m-instruct").is_dir():
        pytest.skip("smollm2-135m-instruct is not fetched: `python -m cupaged fetch smollm2-135m-instruct`")
    code, out, _ = run("generate", "--prompt", "What is the capital of France?", "--device", "cpu", "--json")
    answer = json.loads(out)
    assert (code, answer["finish_reason"]) == (0, "stop")
    assert "Paris" in answer["text"]


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["serv"], "serv"),
        (["generate", "--prompt", "x", "--prompt-file", "y"], "--prompt"),
        (["generate", "--prompt", "x", "--frobnicate"], "--frobnicate"),
        (
            ["generate", "--prompt", "x", "--max-tok", "3"],
            "--max-tok",
        ),  # no abbreviations: a later option would change what they mean
        (["generate", "--prompt", ""], "empty"),
        (["generate", "--prompt", " \n"], "empty"),
        (["generate", "--prompt", "\udcff"], "--prompt"),
        (["generate", "--prompt", "x", "--stop", "\udcff"], "--stop"),
        (["generate", "--prompt-file", "no/such/file"], "no/such/file"),
        (["generate", "--prompt-file", "."], "cannot read"),
        (["generate", "--prompt", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "--prompt", "x", "--chat"], "no chat template"),
        (["generate", "--prompt", "x", "--system", "y"], "no chat template"),
        (["generate", "--prompt", "x" * 129], "129 tokens"),
        (["generate", "--prompt", "x" * 100, "--max-model-len", "64"], "64"),
        (["generate", "--prompt", "x" * 100, "--kv-memory", "100kB"], "kv_memory"),
        (["generate", "--prompt", "x", "--kv-memory", "100"], "kv_memory"),
        (["generate", "--prompt", "x", "--kv-memory", "much"], "kv_memory"),
        (["generate", "--prompt", "x", "--block-size", "3"], "block_size"),
        (["generate", "--prompt", "x", "--max-model-len", "0"], "max_model_len"),
        (["generate", "--prompt", "x", "--device", "tpu"], "tpu"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "int3"),
        (["generate", "--prompt", "x", "--threads", "0"], "threads"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "--prompt", "x", "--max-tokens", "some"], "--max-tokens"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "temperature"),
        (["generate", "--prompt", "x", "--top-k", "-2"], "top_k"),
        (["generate", "--prompt", "x", "--top-k", "1.5"], "--top-k"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["generate", "--prompt", "x", "--min-p", "2"], "min_p"),
        (["generate", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["generate", "--prompt", "x", "--presence-penalty", "inf"], "presence_penalty"),
        (["generate", "--prompt", "x", "--frequency-penalty", "nan"], "frequency_penalty"),
        (["generate", "--prompt", "x", "--seed", str(2**70)], "seed"),
        (["generate", "--prompt", "x", "--stop", ""], "stop"),
        (["chat"], "no chat template"),
        (["info", "--dtype", "int3"], "int3"),
        (["bench", "everything"], "everything"),
        (["bench", "generate", "--runs", "0"], "runs"),
        (["bench", "generate", "--output", "no/such/folder/x.json"], "no/such"),
        (["bench", "generate", "--plot", "no/such/folder"], "no/such"),
        (["bench", "serving", "--concurrency", "0"], "max_num_seqs is 0"),
        (["bench", "serving", "--tokens", "1"], "tokens is 1"),
        (["bench", "--runs", "0"], "runs"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(run, base, words, says):
    if words[:1] == ["info"]:
        words = [*words, base]
    elif words and "serv" not in words:
        words = [*words, "--model", base]
        words += [] if "--device" in words else ["--device", "cpu"]
    code, out, err = run(*words)
    assert (code, out, is_one_line(err)) == (2, "", True), err
    assert says in err


def test_options_are_checked_before_a_model_is_fetched(run):
    code, _, err = run("generate", "--model", "no/such-model", "--prompt", "x", "--top-p", "7")
    assert (code, "top_p" in err) == (2, True)


def test_bytes_that_are_not_utf8_are_refused(run, base, tmp_path, monkeypatch):
    (tmp_path / "latin1").write_bytes(b"na\xefve")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve"), encoding="latin-1"))
    for words in (["--prompt-file", tmp_path / "latin1"], []):
        code, out, err = run("generate", "--model", base, *words)
        assert (code, out, is_one_line(err)) == (2, "", True)
        assert "UTF-8" in err


def test_a_terminal_without_a_prompt_is_told_so(run, base, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, _, err = run("generate", "--model", base)
    assert (code, is_one_line(err)) == (2, True)
    assert "--prompt" in err


def test_a_model_that_is_not_there_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in (["generate", "--prompt", "x", "--model"], ["info"], ["fetch"]):
        code, out, err = run(*command, "smollm2-135m-instrct")
        assert (code, out, is_one_line(err)) == (1, "", True)
        assert "smollm2-135m-instruct" in err  # what was probably meant
    code, out, err = run("info", tmp_path)
    assert (code, out, is_one_line(err)) == (1, "", True)
    assert "config.json" in err


def test_no_gpu_with_device_cuda():
    child = process("generate", "--prompt", "x", "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    out, err = child.communicate()
    assert (child.returncode, out, is_one_line(err.decode())) == (1, b"", True), err


def test_a_gpu_without_cupy_is_a_hint_and_the_cpu_answers(run, base, monkeypatch):
    monkeypatch.setattr("cupaged.cuda.jit.has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    words = ("generate", "--model", base, "--prompt", "Hello", "--max-tokens", 8)
    code, out, err = run(*words)
    assert (code, out, is_one_line(err)) == (0, expected(base, "Hello") + "\n", True)
    assert "cuda12" in err
    assert run(*words, "-q")[2] == ""


@pytest.mark.parametrize(
    ("error", "says"), [(RuntimeError("two\nlines"), "RuntimeError: two lines"), (MemoryError(), "out of memory")]
)
def test_what_nobody_expected_is_one_line_too(run, base, monkeypatch, error, says):
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("cupaged.llm.LLM.stream", broken)
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "x")
    code, out, err = run(*words)
    assert (code, out, is_one_line(err)) == (1, "", True)
    assert says in err
    assert "Traceback" in run(*words, "-vv")[2]


# ---- how it ends


def test_a_closed_pipe_ends_quietly(instruct):
    child = process(
        "generate", "--model", instruct, "--device", "cpu", "--prompt", "x", "--raw", "--max-tokens", 3000, "--stream"
    )
    child.stdout.read(1)
    child.stdout.close()
    assert child.wait(timeout=20) == 0
    assert child.stderr.read() == b""


def test_help_into_a_pipe_that_is_closed_already():
    read, wrote = os.pipe()
    os.close(read)
    child = process("--help", stdout=wrote)
    os.close(wrote)
    assert (child.communicate()[1], child.returncode) == (b"", 0)


@posix
def test_ctrl_c_ends_with_130(instruct):
    child = process(
        "generate", "--model", instruct, "--device", "cpu", "--prompt", "x", "--raw", "--max-tokens", 3000, "--stream"
    )
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, b"\n")


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(base):
    with open("/dev/full", "wb") as full:
        child = process("generate", "--model", base, "--device", "cpu", "--prompt", "x", "--max-tokens", 3, stdout=full)
        _, err = child.communicate()
    assert (child.returncode, is_one_line(err.decode())) == (1, True), err


def test_a_terminal_that_cannot_show_a_character_gets_another(base):
    words = ("generate", "--model", base, "--device", "cpu", "--prompt", "Hello", "--max-tokens", 8)
    out, err = process(*words, env={"PYTHONIOENCODING": "ascii:strict"}).communicate()
    assert (out.decode("ascii").strip(os.linesep), err) == (expected(base, "Hello").encode("ascii", "replace").decode(), b"")
