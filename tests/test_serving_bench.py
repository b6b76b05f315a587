"""The serving benchmark: figures follow from when tokens came, arrivals are what they are called, the file is as all are."""

from __future__ import annotations

import json
import math
import random
import runpy
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, InvalidArgument
from cupaged.bench import limits, serving
from cupaged.bench.serving import Lengths, bench_policy, percentile

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "bench_serving.py")
STEP, POLICY = 0.1, 0.001  # seconds that the machine below takes


class Machine:
    """An LLM in a time of its own: a step takes STEP and gives a token to each of the first `max_num_seqs` requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int = 1000, fails: int | None = None) -> None:
        self.now, self.requests, self.most = 0.0, [], 0
        self.max_num_seqs, self.fails, self.added_at = max_num_seqs, fails, []
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=self.pass_time)
        monkeypatch.setattr(serving, "time", clock)
        for limit in ("read_limit", "product_limit"):
            monkeypatch.setattr(serving, limit, lambda *args: 1e12)
        monkeypatch.setattr(serving, "weight_and_kv_bytes", lambda llm: (1, 1))
        self.path, self.dtype, self.kv_cache_dtype, self.device = Path("machine"), "float32", "float32", "cpu"
        self.precision = self.dtype
        self.config = SimpleNamespace(vocab_size=100)
        self.num_steps = 0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def add(self, prompt: dict, params: object) -> SimpleNamespace:
        output = SimpleNamespace(
            metrics=SimpleNamespace(num_generated_tokens=0),
            finished=False,
            error=None,
            limit=params.max_tokens,
            number=len(self.requests),
        )
        self.requests.append(output)
        self.added_at.append(self.now)
        return output

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(num_steps=self.num_steps, step_s=self.num_steps * STEP, policy_s=self.num_steps * POLICY)

    def step(self) -> None:
        self.pass_time(STEP)
        self.num_steps += 1
        live = [output for output in self.requests if not output.finished]
        assert live  # nothing else is worth a step
        self.most = max(self.most, len(live))
        for output in live[: self.max_num_seqs]:
            output.metrics.num_generated_tokens += 1
            output.finished = output.metrics.num_generated_tokens == output.limit
            if output.number == self.fails:
                output.finished, output.error = True, "it was not to be"


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


def test_a_closed_loop_keeps_its_number_running(monkeypatch):
    machine = Machine(monkeypatch)
    lengths = Lengths(prompt_tokens=5, tokens=3, spread=0)
    result = serving.bench_serving(machine, concurrencies=[2], num_requests=6, lengths=lengths)
    [row] = result["rows"]
    assert row["case"] == "machine float32 concurrency 2 5+3"
    assert (row["tok_s"], row["requests_s"]) == (near(2 / STEP), near(2 / (3 * STEP)))
    assert row["ttft_ms"] == row["itl_ms"] == {name: near(1e3 * STEP) for name in ("p50", "p90", "p99")}
    assert (row["step_ms"], row["policy_us"], row["policy_share"]) == (
        near(1e3 * STEP),
        near(1e6 * POLICY),
        near(POLICY / STEP),
    )
    assert (row["failed"], row["itl_worst"]) == (0, None)
    assert len(machine.requests) == 1 + 4 + 6
    measured = [round((at - machine.added_at[5]) / STEP) for at in machine.added_at[5:]]
    assert measured == [0, 0, 3, 3, 6, 6]


def test_a_poisson_process_waits_for_nobody_and_counts_from_when_a_request_is_due(monkeypatch):
    machine = Machine(monkeypatch, max_num_seqs=1)
    lengths = Lengths(prompt_tokens=5, tokens=2, spread=0)  # 0.2 s each, one at a time: 5 a second can be served
    result = serving.bench_serving(machine, concurrencies=[], rates=[50], num_requests=40, lengths=lengths)
    [row] = result["rows"]
    assert row["case"] == "machine float32 rate 50/s 5+2"
    assert row["tok_s"] == pytest.approx(1 / STEP, rel=0.1)
    # The last of 40 waits for almost all that were there before it: 40 x 0.2 s less the 0.8 s in which they came.
    assert row["ttft_ms"]["p99"] == pytest.approx(7000, rel=0.15)
    assert machine.most > 30


def test_a_request_that_comes_within_a_step_has_waited_for_its_end(monkeypatch):
    machine = Machine(monkeypatch)
    lengths = Lengths(prompt_tokens=5, tokens=400, spread=0)
    [row] = serving.bench_serving(machine, concurrencies=[], rates=[10], num_requests=100, lengths=lengths)["rows"]
    # Due anywhere within a step, its first token comes with the end of the next: after one to two steps, evenly.
    assert 1e3 * STEP * 1.2 < row["ttft_ms"]["p50"] < 1e3 * STEP * 1.8
    assert row["ttft_ms"]["p99"] <= 1e3 * STEP * 2 * (1 + 1e-9)


def test_poisson_arrivals_have_the_rate_and_the_gaps_of_one(monkeypatch):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "STEP", 1e-6)
    serving.bench_serving(machine, concurrencies=[], rates=[20.0], num_requests=4000, lengths=Lengths(5, 2, 0))
    gaps = np.diff(machine.added_at[5:])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.08)  # five standard errors
    assert gaps.std() == pytest.approx(1 / 20, rel=0.12)


def test_a_request_that_fails_is_counted_and_left_out(monkeypatch):
    machine = Machine(monkeypatch, fails=7)
    lengths = Lengths(prompt_tokens=5, tokens=30, spread=0)
    [row] = serving.bench_serving(machine, concurrencies=[4], num_requests=4, lengths=lengths)["rows"]
    assert row["failed"] == 1
    assert row["tok_s"] == near(3 / STEP)
    assert row["itl_worst"] == near(1)
    assert "1 failed" in serving.format_row(row)


def test_percentiles_are_of_nearest_rank():
    values = np.random.default_rng(SEED).random(random.Random(SEED).randint(1, 300))
    for share in (50, 90, 99, 100):
        assert percentile(list(values), share) == np.percentile(values, share, method="inverted_cdf"), (
            f"CUPAGED_TEST_SEED={SEED}"
        )


def test_lengths_have_their_means_and_stay_below_the_longest():
    lengths, rng = Lengths(300, 100, 0.7), random.Random(SEED)
    drawn = [lengths.draw(rng) for _ in range(4000)]
    assert max(sum(pair) for pair in drawn) <= lengths.longest
    assert statistics.mean(prompt for prompt, _ in drawn) == pytest.approx(300, rel=0.07), f"CUPAGED_TEST_SEED={SEED}"
    assert statistics.mean(tokens for _, tokens in drawn) == pytest.approx(100, rel=0.07), f"CUPAGED_TEST_SEED={SEED}"
    assert len(set(drawn)) > 3000
    assert {Lengths(300, 100, 0).draw(rng) for _ in range(10)} == {(300, 100)}
    assert Lengths(300, 100, 0).longest == 400


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"concurrencies": [4, 0]}, "concurrency"),
        ({"rates": [-1.0]}, "rate"),
        ({"rates": [math.nan]}, "rate"),
        ({"num_requests": 0}, "requests"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, arguments, says):
    with pytest.raises(InvalidArgument, match=says):
        serving.bench_serving(Machine(monkeypatch), **arguments)
    for wrong in ({"tokens": 1}, {"prompt_tokens": 0}, {"spread": -1}, {"spread": math.inf}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            Lengths(**wrong)


# ---- on real engines


def test_every_request_gets_its_tokens_from_a_real_model(tmp_path):
    folder = tiny_models.write_model(tmp_path / "tiny", tiny_models.CONFIGS["llama-gqa"])
    llm = LLM(folder, device="cpu", kv_memory="1MB", max_num_seqs=4)
    requests = [serving._Request([n] * 9, max_tokens=n + 2) for n in range(6)]
    steps = serving._serve(llm, requests, concurrency=3)
    assert [len(request.arrivals) for request in requests] == [n + 2 for n in range(6)]
    assert all(request.arrivals == sorted(request.arrivals) for request in requests)
    assert len(steps) >= 7
    assert llm.pool_stats().used_blocks == 0


def test_policy_alone_keeps_all_sequences_running(monkeypatch):
    seen = []
    schedule = serving.Scheduler.schedule

    def spied(self: object) -> list:
        scheduled = schedule(self)
        seen.append((len(self.running), len(scheduled)))
        return scheduled

    monkeypatch.setattr(serving.Scheduler, "schedule", spied)
    row = bench_policy(num_seqs=32, steps=200, lengths=Lengths(40, 20))
    assert row["case"] == "policy at 32 sequences"
    assert seen[-200:] == [(32, 32)] * 200
    assert 0 < row["schedule_us"] < row["us"] <= row["p99_us"] < 1e5
    assert row["schedule_us"] * 0.5 < row["decode_us"] <= row["us"]


def test_policy_with_a_full_pool_keeps_people_waiting(monkeypatch):
    seen = []
    schedule = serving.Scheduler.schedule

    def spied(self: object) -> list:
        scheduled = schedule(self)
        seen.append((len(self.running), len(self.waiting)))
        return scheduled

    monkeypatch.setattr(serving.Scheduler, "schedule", spied)
    row = bench_policy(num_seqs=64, steps=400, lengths=Lengths(40, 20), num_waiting=64)
    assert row["case"] == "policy at 64 sequences, 64 more than the pool holds"
    assert {sum(pair) for pair in seen} == {128}
    assert 40 < statistics.mean(num_running for num_running, _ in seen[-400:]) < 90
    assert 0 < row["schedule_us"] < row["us"] <= row["p99_us"] < 1e5


def test_the_script_prints_a_table_and_writes_the_common_format(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "SWEEP_BYTES", 2**25)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(SCRIPT, run_name="__main__")
        out, err = capsys.readouterr()
        assert ended.value.code == (2 if err.startswith("cupaged: max_num_seqs is 0") else 0), err
        return out

    assert run("--policy-only").startswith("policy at 256 sequences")
    config = tiny_models.write_model(tmp_path / "whole", tiny_models.CONFIGS["llama-gqa"]) / "config.json"
    config = config.rename(tmp_path / "tiny.json")
    options = (
        "--model",
        config,
        "--load-format",
        "dummy",
        "--device",
        "cpu",
        "--threads",
        1,
        "--prompt-tokens",
        20,
        "--tokens",
        5,
    )
    out = run(*options, "--concurrency", 1, 3, "--rate", 50, "--requests", 4, "--output", tmp_path, "--plot")
    assert (tmp_path / "serving_cpu.png").stat().st_size > 10000
    result = json.loads((tmp_path / "serving_cpu.json").read_text())
    assert set(result) == {"machine", "limit_tbps", "limit_tflops", "date", "rows"}
    cases = ["concurrency 1 20+5", "concurrency 3 20+5", "rate 50/s 20+5"]
    alone = ["policy at 256 sequences", "policy at 256 sequences, 64 more than the pool holds"]
    assert [row["case"] for row in result["rows"]] == [*alone, *(f"tiny float32 {case}" for case in cases)]
    assert all(row["tok_s"] > 0 and row["failed"] == 0 for row in result["rows"][2:])
    assert all(0 < row["policy_share"] < 1 and row["policy_us"] > 0 for row in result["rows"][2:])
    assert all(row["case"] in out for row in result["rows"])
    assert run(*options, "--concurrency", 0) == ""
