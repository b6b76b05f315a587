"""Pictures of results: each kind gets its own, whole or not at all; and the bars of a decode step are the step."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import CONFIGS, write_model

from cupaged import LLM, CupagedError, InvalidArgument
from cupaged.bench import commands, plots, results
from cupaged.bench import step as bench_step
from cupaged.cli import main

RESULTS = Path(__file__).parents[1] / "scripts" / "results"
HEAD = {"limit_tbps": 0.02, "limit_tflops": 0.3, "date": "2026-11-24"}
STEP = {
    **HEAD,
    "machine": "Some CPU, 2 threads, Linux, Python 3.11.7",
    "rows": [
        {"case": "m float32 decode 8 after 40", "tok_s": 20.0, "share": 0.4},
        {"case": "m float32 decode step", "ms": 50.0, "share": 0.4},
        {"case": "m float32 decode step linear", "ms": 40.0, "share": 0.8},
        {"case": f"m float32 decode step {bench_step.OUTSIDE}", "ms": 10.0, "share": 0.2},
    ],
}
SERVED = {"tok_s": 100.0, "itl_ms": {"p50": 10.0, "p90": 12.0, "p99": 30.0}}
SERVING = {
    **HEAD,
    "machine": "NVIDIA H100 80GB HBM3",
    "rows": [
        {"case": "policy at 256 sequences", "us": 500.0},
        {"case": "m bfloat16 concurrency 1 256+128", **SERVED},
        {"case": "m bfloat16 concurrency 64 256+128", **SERVED, "tok_s": 2000.0},
        {"case": "m bfloat16 rate 2.5/s 256+128", **SERVED, "tok_s": 300.0},
        {"case": "m bfloat16 concurrency 8 20+5", "tok_s": 0.0, "itl_ms": {"p50": None, "p90": None, "p99": None}},
    ],
}
ATTENTION = {
    **HEAD,
    "machine": "NVIDIA H100 80GB HBM3",
    "limit_tbps": 3.1,
    "limit_tflops": 800.0,
    "rows": [
        {"case": "decode 32/8 1x8192 p16 bf16", "us": 18.0, "flop_per_byte": 4.0, "tb_s": 1.9, "peers": {"a": 19.0, "b": 80.0}},
        {"case": "prefill 32/8 1x8192 p16 bf16", "us": 900.0, "flop_per_byte": 16000.0, "tflop_s": 600.0, "peers": {}},
    ],
}
WRITTEN = [  # a result, the name of its file, the name of its picture
    (STEP, "cpu.json", "decode_step_cpu.png"),
    (STEP, "generate_h200.json", "decode_step_h200.png"),
    (SERVING, "serving_h100.json", "serving_h100.png"),
    (ATTENTION, "attention_h100.json", "attention_h100.png"),
    ({**ATTENTION, "limit_tflops": None}, "attention_a10.json", "attention_a10.png"),
]


def size_of(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def changed(result: dict, row: int, **values: object) -> dict:
    result = copy.deepcopy(result)
    result["rows"][row] |= values
    return result


@pytest.mark.parametrize(("result", "name", "picture"), WRITTEN)
def test_a_result_gets_its_picture_beside_it(tmp_path, capsys, result, name, picture):
    (tmp_path / name).write_text(json.dumps(result))
    assert main(["bench", "plot", str(tmp_path / name)]) == 0
    assert capsys.readouterr() == (f"{tmp_path / picture}\n", "")
    width, height = size_of(tmp_path / picture)
    assert width == 1400
    assert 500 < height < 1100
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, picture])


def test_pictures_in_the_repository_can_be_drawn_anew(tmp_path):
    for path in RESULTS.glob("*.json"):
        with contextlib.suppress(InvalidArgument):  # of an ablation nothing is drawn
            size_of(plots.draw(results.read_result(path), tmp_path / path.name))
    assert {path.name for path in RESULTS.glob("*.png")} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is no result file"),
        (b'{"rows": 3}', "is no result file"),
        (b'{"machine": "a", "date": "b", "rows": [{}]}', "is no result file"),
        (b'{"machine": "a", "date": "b", "rows": [{"case": "decode step"}]}', "holds no steps"),
        (changed(ATTENTION, 0, case="page size: decode", flop_per_byte=4.0) | {"rows": []}, "is no result file"),
        (changed(ATTENTION, 0, us=None), "us of 'decode 32/8 1x8192 p16 bf16' is None"),
        (changed(ATTENTION, 0, peers={"a": "x"}), "peers.a of"),
        (changed(SERVING, 1, itl_ms={"p50": 1.0}), "itl_ms.p99 of"),
        (changed(SERVING, 1, tok_s=float("nan")), "tok_s of"),
        ({**SERVING, "rows": SERVING["rows"][-1:]}, "no request of the result"),
        (changed(STEP, 2, ms=True), "ms of 'm float32 decode step linear' is True"),
        ({**STEP, "limit_tbps": None}, "limit_tbps is None"),
        ({**ATTENTION, "limit_tbps": 0}, "limit_tbps is 0"),
        ({**STEP, "rows": STEP["rows"][2:]}, "no row of the whole step"),
    ],
)
def test_a_file_that_is_no_result_is_one_line(tmp_path, capsys, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert main(["bench", "plot", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cupaged: ")
    assert says in err
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_missing_is_one_line_and_nothing_is_drawn(tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(STEP))
    assert main(["bench", "plot", str(tmp_path / "cpu.json"), str(tmp_path / "no.json")]) == 2
    assert capsys.readouterr().err.startswith(f"cupaged: cannot read {tmp_path / 'no.json'}: No such file")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(STEP))
    (tmp_path / "decode_step_cpu.png").mkdir()
    assert main(["bench", "plot", str(tmp_path / "cpu.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cupaged: cannot write {tmp_path / 'decode_step_cpu.png'}: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "decode_step_cpu.png"]


def test_what_would_fail_after_measuring_fails_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "bench_generate", None)
    assert main(["bench", "generate", "--plot", str(tmp_path / "no")]) == 2
    assert f"{tmp_path / 'no'} is no folder" in capsys.readouterr().err
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench", "serving", "--plot", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "cupaged: matplotlib, which draws, is not installed; pip install 'cupaged[plot]'\n"


@pytest.mark.parametrize(("words", "folder"), [((), "."), (("--output", "a"), "a"), (("--output", "a/x.json"), "a")])
def test_without_a_folder_the_picture_is_where_the_figures_are(tmp_path, monkeypatch, words, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(commands, "bench_generate", lambda **options: STEP)
    assert main(["bench", "generate", *words, "--plot"]) == 0
    size_of(tmp_path / folder / "decode_step_cpu.png")


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path, link = tmp_path / "x", tmp_path / "link"
    results.write_whole(path, b"old", "")
    link.symlink_to(path)
    results.write_whole(link, b"new", "")
    assert (path.read_bytes(), link.is_symlink()) == (b"new", True)

    def full(self: Path, data: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CupagedError, match=r"cannot write .*: No space left on device; delete something"):
        results.write_whole(path, b"newer", "delete something")
    monkeypatch.undo()
    assert path.read_bytes() == b"new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "x"]


# ---- the step that is drawn

COST = {
    **{"norm_linear": 3.0, "linear_add": 2.5, "norm_swiglu": 7.0},
    **{"rope_append": 0.5, "paged_attention": 2.0, "sample": 4.0},
}


class Machine:
    """A model's operations in a time of their own, in milliseconds; with `outside` in every step that no operation takes."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, outside: float, slower_when_timed: float = 1.0) -> None:
        self.llm, self.now, self.ops, self.slower = llm, 0.0, llm.engine.model.ops, slower_when_timed
        self.step = llm.step
        monkeypatch.setattr(bench_step, "time", SimpleNamespace(perf_counter=lambda: self.now / 1e3))
        monkeypatch.setattr(llm.engine.model, "ops", self)
        monkeypatch.setattr(llm, "step", lambda: self.pass_time(outside) or self.step())

    def pass_time(self, ms: float) -> None:
        self.now += ms

    def __getattr__(self, name: str) -> object:
        operation = getattr(self.ops, name)
        if name not in COST:
            return operation

        def call(*args: object, **kwargs: object) -> object:
            self.pass_time(COST[name] * (1 if self.llm.engine.model.ops is self else self.slower))
            return operation(*args, **kwargs)

        return call


@pytest.fixture
def llm(tmp_path) -> LLM:
    folder = write_model(tmp_path / "tiny", CONFIGS["llama-gqa"])
    return LLM(folder, device="cpu", kv_memory="1MB", enable_prefix_caching=False)


def test_the_kinds_of_a_step_and_what_is_outside_are_the_step(llm, monkeypatch):
    machine = Machine(llm, monkeypatch, outside=10.0)
    step, kinds = bench_step.decode_step(llm, [1, 2, 3], tokens=6)
    layers = 3
    expected = {
        "linear": layers * (3.0 + 2 * 2.5 + 7.0),
        "logits": 3.0,
        "attention": layers * 2.0,
        "rope and append": layers * 0.5,
        "embedding and copies": 0.0,
        "sampling": 4.0,
        bench_step.OUTSIDE: 10.0,
    }
    assert kinds == pytest.approx(expected)
    assert list(kinds) == list(expected)
    assert step == pytest.approx(sum(expected.values()))
    assert llm.engine.model.ops is machine
    assert llm.pool_stats().used_blocks == 0


def test_on_a_gpu_the_times_are_those_between_events(monkeypatch):
    now, waited = [0.0], []

    class Event:
        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            waited.append(self)

    def elapsed(before: Event, after: Event) -> float:
        assert waited  # else the device is not there yet
        return after.at - before.at

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Event=Event, get_elapsed_time=elapsed)))

    def operation(ms: float, **options: object) -> float:
        now[0] += ms
        return ms

    recorder = bench_step._Recorder(SimpleNamespace(other=5, **dict.fromkeys(bench_step.KINDS, operation)), "cuda:0")
    assert (recorder.other, recorder.sample(2.0), recorder.linear_add(3.0)) == (5, 2, 3)
    assert recorder.norm_linear(4.0, dtype="float32") == 4
    found = recorder.milliseconds()
    assert {kind: ms for kind, ms in found.items() if ms} == {"sampling": 2, "linear": 3, bench_step.LOGITS: 4}
    assert len(waited) == 1


def test_kinds_that_came_out_as_more_than_the_step_are_scaled_down_to_it(llm, monkeypatch):
    Machine(llm, monkeypatch, outside=1.0, slower_when_timed=2.0)
    step, kinds = bench_step.decode_step(llm, [1, 2, 3], tokens=3)
    assert sum(kinds.values()) == pytest.approx(step)
    assert kinds[bench_step.OUTSIDE] == pytest.approx(0.0)
    assert kinds["linear"] / kinds["attention"] == pytest.approx((3 + 2 * 2.5 + 7) / 2)


def test_a_step_that_fails_leaves_the_model_its_operations(llm, monkeypatch):
    ops = llm.engine.model.ops
    monkeypatch.setattr(bench_step._Recorder, "milliseconds", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench_step.decode_step(llm, [1, 2, 3], tokens=3)
    assert llm.engine.model.ops is ops


def test_every_operation_of_a_decode_step_is_of_some_kind(llm):
    asked = set()

    class Noting:
        def __getattr__(self, name: str) -> object:
            asked.add(name)
            return getattr(ops, name)

    ops = llm.engine.model.ops
    llm.engine.model.ops = Noting()
    llm.generate("x")
    assert asked <= set(bench_step.KINDS)
