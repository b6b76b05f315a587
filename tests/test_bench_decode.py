"""Steps of many sequences measured, and models that are no more than a config.json."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.bench import decode, limits, peers, results, start
from cupaged.bench.contiguous import Contiguous
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import expected_tensors
from cupaged.cli import main
from cupaged.model import llama

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
    prefill = result["rows"][2]
    assert prefill["scores_gb"] == 3 * 3 * 9 * 9 * 4 / 1e9 < prefill["step_gb"]  # sequences, heads, scores of 4 bytes
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


def run(bare, what, *options):
    words = [what, "--model", bare, "--load-format", "dummy", "--device", "cpu", "--threads", "1", *options]
    return main(["bench", *map(str, words)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**20)


def test_a_file_keeps_the_rows_of_other_cases(bare, tmp_path, capsys, monkeypatch, quick):
    path = tmp_path / "decode_cpu.json"
    steps = ["generate", "--batch", "1", "--tokens", "3", "--output", tmp_path]
    assert run(bare, *steps, "--context", "9", "12") == 0
    first = json.loads(path.read_text())
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**22)  # another limit
    assert run(bare, *steps, "--context", "12", "15") == 0
    last = json.loads(path.read_text())
    shapes = ["prefill 1x9", "1x9 w=f32 kv=f32", "prefill 1x12", "1x12 w=f32 kv=f32", "prefill 1x15", "1x15 w=f32 kv=f32"]
    assert [row["case"] for row in last["rows"]] == [f"1B {shape}" for shape in shapes]
    assert last["rows"][:2] == first["rows"][:2]
    assert last["rows"][3] != first["rows"][3]
    assert first["limit_tbps"] != last["limit_tbps"]
    for row, result in zip(last["rows"], [first] * 2 + [last] * 4, strict=True):
        assert {name: row[name] for name in ("limit_tbps", "limit_tflops", "date")} == {
            name: result[name] for name in ("limit_tbps", "limit_tflops", "date")
        }
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("what", [["generate", "--batch", "1"], ["generate"], ["capacity"]])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"machine": "NVIDIA H100 80GB HBM3"}, "another machine (NVIDIA H100 80GB HBM3)"),
        ({"rows": [{"case": "decode 32/8", "us": 1}]}, "other rows"),
        ({"rows": []}, "no result file"),
        (None, "not JSON"),
    ],
)
def test_a_file_that_rows_cannot_be_added_to_is_refused_first(bare, tmp_path, capsys, monkeypatch, what, changes, says):
    row = {"case": "1B 1x9 w=f32 kv=f32", "ms": 1.0, "limit_tbps": 1.0, "date": "2026-01-01"}
    result = {"machine": limits.machine("cpu", 1), "limit_tbps": 1.0, "limit_tflops": 1.0, "date": "2026-01-01", "rows": [row]}
    path = tmp_path / "other.json"
    path.write_text("" if changes is None else json.dumps({**result, **changes}))
    before = path.read_text()
    monkeypatch.setattr("cupaged.llm.LLM.__init__", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    assert run(bare, *what, "--output", path) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), path.read_text()) == ("", 1, before)
    assert says in err


@pytest.mark.parametrize(
    ("machine", "end", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "", "decode_h100.json"),
        ("NVIDIA H200", " H200", "decode_h200.json"),
        ("EPYC, 2 threads, Linux, Python 3.11", "", "decode_cpu.json"),
    ],
)
def test_cases_name_the_card_where_it_is_another(machine, end, file):
    assert (results.card(machine), results.usual_name(machine, "decode")) == (end, file)


def test_names_of_models():
    names = {path.stem: results.model_name(path) for path in CONFIGS.glob("*.json")}
    assert names == {"llama-2-7b": "7B", "llama-2-13b": "13B", "llama-3-8b": "8B"}
    assert results.model_name(Path("some/smollm2-135m-instruct")) == "smollm2-135m-instruct"


def test_types_of_weights_are_in_the_case(bare, tmp_path, quick):
    options = ["--context", "9", "--tokens", "2", "--quantization", "int4", "--output", tmp_path]
    assert run(bare, "generate", "--batch", "1", *options, "--kv-cache-dtype", "fp8") == 0
    assert run(bare, "generate", "--batch", "2", *options, "--cache", "contiguous") == 0
    assert run(bare, "generate", "--batch", "3", *options, "--serve") == 0
    cases = [row["case"] for row in json.loads((tmp_path / "decode_cpu.json").read_text())["rows"]]
    first = ["1B prefill 1x9 w=int4 kv=fp8", "1B 1x9 w=int4 kv=fp8", "1B prefill 2x9 w=int4 kv=f32"]
    assert cases == [*first, "1B 2x9 w=int4 kv=f32", "1B 2x9 w=int4 kv=f32 contiguous", "1B serve 3x9+2 w=int4 kv=f32"]


def test_whole_requests_are_served_at_once(bare, tmp_path, capsys, quick):
    assert run(bare, "generate", "--batch", "70", "--context", "5", "--tokens", "3", "--serve", "--output", tmp_path) == 0
    [row] = json.loads((tmp_path / "decode_cpu.json").read_text())["rows"]
    assert row["case"] == "1B serve 70x5+3"
    assert f"{row['tok_s']:.2f} tok/s" in capsys.readouterr().out


# ---- peers and the other cache


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "llama-tied", "qwen3-window", "mistral-window"])
def test_a_contiguous_cache_gives_the_logits_of_the_pages(tmp_path, name, quantization):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name])
    llm = LLM(folder, device="cpu", kv_memory="4MB", quantization=quantization)
    ids = np.random.default_rng([SEED, 90]).integers(0, 256, (3, 60)).astype(np.int32)
    model = Contiguous(llm.engine.model, batch=3, max_len=60)
    for begin, stop in ((0, 33), (33, 34), (34, 60)):
        logits = model.forward(ids[:, begin:stop])
        for sequence, row in zip(ids, logits, strict=True):
            expected = llm.logits(sequence[:stop].tolist())[-1]
            assert np.linalg.norm(row - expected) < 1e-5 * np.linalg.norm(expected), f"CUPAGED_TEST_SEED={SEED}"


def test_others_stand_beside_the_pages(bare, tmp_path, capsys, monkeypatch, quick):
    asked = []

    def steps(path, cases, *rest):
        asked.extend([path, cases, *rest])
        return [{"transformers 5 eager": 100.0}, {}]

    monkeypatch.setattr(decode, "transformers_steps", steps)
    monkeypatch.setattr(decode, "check_peers", lambda: None)
    options = ["--batch", "1", "2", "--context", "9", "--tokens", "3", "--output", tmp_path]
    assert run(bare, "generate", *options, "--peers", "--cache", "contiguous") == 0
    assert asked == [bare, [(1, 9), (2, 9)], "cpu", "float32", 3, 1]
    rows = {row["case"]: row for row in json.loads((tmp_path / "decode_cpu.json").read_text())["rows"]}
    for batch, others in ((1, {"transformers 5 eager": 100.0}), (2, {})):
        pages, other = (rows[f"1B {batch}x9 w=f32 kv=f32{end}"] for end in ("", " contiguous"))
        assert pages["peers"] == {**others, "contiguous": other["ms"]}
        assert other["ratio"] == {"time over pages": other["ms"] / pages["ms"]}
        assert other["share"] / pages["share"] == pytest.approx(pages["ms"] / other["ms"])
    assert "transformers 5 eager 100.00 ms" in capsys.readouterr().out


@pytest.mark.parametrize("other", [["--quantization", "int8"], ["--kv-cache-dtype", "fp8"]])
def test_peers_of_other_types_are_refused(bare, capsys, other):
    assert run(bare, "generate", "--batch", "1", "--peers", *other) == 2
    assert "leave quantization and kv_cache_dtype out" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_refused(bare, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(bare, "generate", "--batch", "1", "--peers") == 2
    assert "transformers, which is not installed" in capsys.readouterr().err


def test_transformers_is_measured_where_it_is_installed(bare):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    steps = peers.transformers_steps(bare, [(1, 9), (3, 20)], "cpu", "float32", tokens=3, threads=1)
    assert [len(each) for each in steps] == [1, 1]
    for each in steps:
        [(name, ms)] = each.items()
        assert name.startswith("transformers ")
        assert ms > 0


# ---- start


def test_a_start_is_measured_in_fresh_processes(bare, tmp_path, capsys, quick):
    options = ["--runs", "1", "--output", tmp_path]
    assert run(bare, "generate", *options) == 0
    assert run(bare, "generate", *options, "--kv-cache-dtype", "fp8", "--quantization", "int8") == 0
    result = json.loads((tmp_path / "decode_cpu.json").read_text())
    kinds = " kv_cache_dtype=fp8 quantization=int8"
    cases = [f"1B start {state}{types}" for types in ("", kinds) for state in ("cold", "warm")]
    assert [row["case"] for row in result["rows"]] == cases
    for row in result["rows"]:
        assert 0.05 < row["s"] < 30
        assert 0 < row["weights_s"] < 30
        assert row["date"] == result["date"]
    assert "to make weights" in capsys.readouterr().out


def test_a_start_that_fails_is_one_line(bare, capsys):
    assert run(bare, "generate", "--dtype", "int9") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "cupaged: dtype is 'int9'; on this device give 'auto' or 'float32'\n"


def test_weights_made_while_kernels_compile_are_not_taken_off(bare, tmp_path, monkeypatch):
    make = llama.Llama

    def slow(*args):
        made = make(*args)
        time.sleep(0.4)
        (tmp_path / "kernel.cubin").touch()
        time.sleep(0.2)
        return made

    monkeypatch.setattr("cupaged.llm.Llama", slow)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert 0.19 < start.first_token(str(bare), device="cpu") < 0.55


# ---- capacity


def test_pages_hold_more_requests_than_slots(bare, tmp_path, capsys, quick):
    sizes = ["--max-model-len", "128", "--kv-memory", "400KB", "--requests", "60", "--tokens", "8", "--output", tmp_path]
    assert run(bare, "capacity", *sizes) == 0
    rows = json.loads((tmp_path / "decode_cpu.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["1B capacity contiguous", "1B capacity paged"]
    slots, pages = rows
    # 3 layers, K and V of one head of 64 in float32: 1536 bytes a token, 130 blocks of 16 tokens, twice 128 and a half
    assert slots["kv_gb"] == pages["kv_gb"] == 16 * 16 * 1536 / 1e9
    assert slots["most"] == 2
    assert 1.5 < slots["concurrent"] <= 2
    assert pages["ratio"] == {name: pages[name] / slots[name] for name in ("concurrent", "most", "tok_s")}
    assert 2 < pages["ratio"]["concurrent"] < 6
    assert pages["most"] > slots["most"]
    assert "requests at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-model-len", "32"), "max_model_len is 32"),
        (("--requests", "0"), "requests is 0"),
        (("--tokens", "0"), "tokens is 0"),
        (("--max-model-len", "128", "--kv-memory", "100MB"), "all 128 requests at once"),
        (("--max-model-len", "128", "--kv-memory", "60KB"), "the KV pool holds"),
        (("--kv-memory", "much"), "kv_memory"),
    ],
)
def test_a_capacity_that_cannot_be_measured_is_one_line(bare, capsys, options, says):
    assert run(bare, "capacity", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


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
        (("--batch", "1", "--cache", "contiguous", "--kv-cache-dtype", "float16"), "contiguous"),
        (("--batch", "1", "--serve", "--cache", "contiguous"), "serve"),
        (("--cache", "contiguous"), "--batch"),
        (("--serve",), "--batch"),
        (("--prompt-tokens", "5"), "--prompt-tokens"),
        (("--plot",), "--plot"),
        (("--runs", "0"), "runs is 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bare, capsys, options, says):
    assert main(["bench", "generate", "--model", str(bare), "--load-format", "dummy", "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
