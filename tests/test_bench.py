"""The benchmark on a tiny model: its figures are consistent and its file is of the common format."""

from __future__ import annotations

import json
import math

import pytest
from tiny_models import CONFIGS, write_model

from cupaged import CupagedError
from cupaged.bench import generate, limits
from cupaged.bench.step import KINDS, LOGITS, OUTSIDE
from cupaged.cli import main


@pytest.fixture(autouse=True)
def small_sweep(monkeypatch):
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**25)


def test_bench_prints_a_table_and_writes_the_common_format(tmp_path, capsys):
    folder = write_model(tmp_path / "tiny", CONFIGS["llama-gqa"])
    words = ["bench", "generate", "--model", str(folder), "--device", "cpu", "--threads", "1", "--runs", "1"]
    assert main([*words, "--prompt-tokens", "40", "--tokens", "8", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == f"cupaged: wrote {tmp_path / 'cpu.json'}\n"
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert set(result) == {"machine", "limit_tbps", "limit_tflops", "date", "rows"}
    assert 0 < result["limit_tbps"] < 10
    assert 0 < result["limit_tflops"] < 100
    cases = ["process start to first token", "peak memory", "prefill 40", "decode 8 after 40", "decode step"]
    kinds = dict.fromkeys(["linear", LOGITS, *KINDS.values(), OUTSIDE])
    cases += [f"decode step {kind}" for kind in kinds]
    assert [row["case"] for row in result["rows"]] == [f"tiny float32 {case}" for case in cases]
    assert [line.split("  ")[0] for line in out.splitlines()] == [row["case"] for row in result["rows"]]
    start, memory, prefill, decode, step, *parts = result["rows"]
    assert 0.05 < start["s"] < 30
    assert 0.02 < memory["gb"] < 2
    # what a token reads: all weights but the embedding (not tied), and the K/V of 40 + 8 / 2 tokens on average
    weights = 3 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 160 * 192 + 2 * 192) + 260 * 192 + 192
    moved = 4 * weights + 2 * 3 * 64 * 4 * 44
    assert math.isclose(decode["share"], moved * decode["tok_s"] / (result["limit_tbps"] * 1e12))
    assert math.isclose(step["share"], moved / (result["limit_tbps"] * 1e12) / (step["ms"] / 1e3))
    assert math.isclose(sum(row["ms"] for row in parts), step["ms"])
    assert all(math.isclose(row["share"], row["ms"] / step["ms"]) for row in parts)
    assert math.isclose(prefill["share"], 2 * weights * prefill["tok_s"] / (result["limit_tflops"] * 1e12))


@pytest.mark.parametrize(("fastest", "size"), [(0, 2**24), (1, 2**24), (2, 2**22), (3, 2**22)])
def test_the_limit_of_reading_is_the_best_of_all_ways_and_sizes(monkeypatch, fastest, size):
    seconds = [0.01 if way == fastest else 8.0 for way in range(4)]  # two ways over SWEEP_BYTES, two over the model's bytes
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**24)
    monkeypatch.setattr(limits, "_best_seconds", lambda action: (action(), seconds.pop(0))[1])
    assert limits.read_limit("cpu", 2**22, threads=2) == size / 0.01
    assert seconds == []


def test_a_process_that_fails_is_reported_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PROMPT", "")
    with pytest.raises(CupagedError, match="the prompt is empty"):
        generate.bench_generate(str(write_model(tmp_path, CONFIGS["llama-gqa"])), device="cpu", runs=1)
