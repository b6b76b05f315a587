"""Steps of many sequences measured, and models that are no more than a config.json."""

import json
import math
from pathlib import Path

import pytest
import tiny_models

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.bench import limits
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import expected_tensors
from cupaged.cli import main

CONFIGS = Path(__file__).parent.parent / "scripts" / "configs"


@pytest.fixture
def bare(tmp_path) -> Path:
    path = tmp_path / "some-1b.json"
    folder = tiny_models.write_model(tmp_path / "whole", tiny_models.CONFIGS["llama-gqa"])
    path.write_text((folder / "config.json").read_text())
    return path


def test_a_bare_config_generates_from_token_ids(bare):
    llm = LLM(bare, device="cpu", load_format="dummy", kv_memory="1MB")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2, stop=["a"])
    [request] = llm.generate([1, 2, 3], params)
    assert (request.error, request.outputs[0].text, len(request.outputs[0].token_ids)) == (None, "", 5)
    for ask in (lambda: llm.generate("Hello"), lambda: llm.perplexity("Hello")):
        with pytest.raises(InvalidArgument, match="no tokenizer"):
            ask()
    with pytest.raises(InvalidArgument, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


def test_a_bare_config_may_borrow_a_tokenizer(bare):
    llm = LLM(bare, tokenizer=bare.parent / "whole", device="cpu", load_format="dummy", kv_memory="1MB")
    [request] = llm.generate("Hello", SamplingParams(max_tokens=2))
    assert request.prompt_token_ids == llm.tokenizer.encode("Hello")


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-3-8b", 8.030)])
def test_the_configs_are_of_the_models_they_name(name, billions):
    shapes = expected_tensors(load_config(CONFIGS / f"{name}.json")).values()
    assert sum(map(math.prod, shapes)) / 1e9 == pytest.approx(billions, abs=0.001)


def test_rows_are_named_and_counted(bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**25)
    options = ["--load-format", "dummy", "--device", "cpu", "--tokens", "20", "--output", str(tmp_path), "--threads", "1"]
    code = main(["bench", "--model", str(bare), "--batch", "1", "3", "--context", "20", "9", *options])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads((tmp_path / "decode_cpu.json").read_text())
    cases = ["1B prefill 1x20", "1B 1x20 w=f32 kv=f32", "1B prefill 3x9", "1B 3x9 w=f32 kv=f32"]
    assert [row["case"] for row in result["rows"]] == cases
    assert all(case in out for case in cases)
    for row in result["rows"]:
        assert 0 < row["share"] < 1
    for row, batch in zip(result["rows"][1::2], (1, 3), strict=True):
        assert row["tok_s"] == pytest.approx(1e3 * batch / row["ms"])
    assert {"machine", "limit_tbps", "limit_tflops", "date"} <= set(result)


def test_quantised_weights_are_counted_as_the_bytes_that_they_are(bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**25)
    options = ["--load-format", "dummy", "--device", "cpu", "--tokens", "8", "--output", str(tmp_path), "--threads", "1"]
    words = ["bench", "--model", str(bare), "--batch", "2", "--context", "20", "--quantization", "int4", *options]
    assert main(words) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "decode_cpu.json").read_text())
    prefill, decode = result["rows"]
    assert decode["case"] == "1B 2x20 w=int4 kv=f32"
    # half a byte a weight, and 4 bytes for a group: of 64 in rows of 192, of 32 in those of 160; norms are of float32
    weights = 3 * (2 * 192 * 192 + 2 * 64 * 192 + 2 * 160 * 192) + 260 * 192
    down = 3 * 192 * 160
    read = weights // 2 + 4 * weights // 64 + down // 2 + 4 * down // 32 + 4 * (3 * 2 * 192 + 192)
    moved = decode["share"] * (decode["ms"] / 1e3) * result["limit_tbps"] * 1e12
    kv = 2 * 3 * 64 * 4
    cached = (moved - read) / kv
    assert 2 * 20 < cached < 2 * 20 + 2 * 12  # whole sequences, and nothing else
    multiplied = weights + down + 3 * 2 * 192 + 192
    assert prefill["share"] * prefill["s"] * result["limit_tflops"] * 1e12 == pytest.approx(2 * multiplied * 2 * 20)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch", "0"), "batch is 0"),
        (("--context", "0"), "context is 0"),
        (("--batch", "1", "2", "3", "--context", "4", "5"), "3 batches and 2 contexts"),
        (("--batch", "1", "--plot"), "--plot"),
        (("--batch", "1", "--runs", "3"), "--runs"),
        (("--context", "9", "--prompt-tokens", "5"), "--prompt-tokens"),
        (("--batch", "1", "--tokens", "0"), "tokens is 0"),
        ((), "--batch"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bare, capsys, options, says):
    assert main(["bench", "generate", "--model", str(bare), "--load-format", "dummy", "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
