"""`bench load` on a tiny geometry: what is written is a checkpoint, what is measured adds up, and nothing is left behind."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_models

from cupaged import InvalidArgument
from cupaged.bench import limits, load
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import expected_tensors, open_weights
from cupaged.cli import main

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def geometry(tmp_path) -> Path:
    """A bare config.json, and a folder for temporary files beside it."""
    path = tmp_path / "tiny-3b.json"
    path.write_text(json.dumps(tiny_models.CONFIGS["llama-gqa"]))
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(load.tempfile, "tempdir", str(folder))
    return folder


def test_rows_add_up_and_the_files_are_gone(geometry, temporary, tmp_path, capsys):
    code = main(["bench", "load", "--model", str(geometry), "--device", "cpu", "--runs", "3", "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, f"cupaged: wrote {tmp_path / 'load_cpu.json'}\n")
    result = json.loads((tmp_path / "load_cpu.json").read_text())
    assert set(result) == {"machine", "limit_gb_s", "date", "rows"}
    loaded, memory = result["rows"]
    assert [row["case"] for row in result["rows"]] == ["3B load", "3B load, host memory over the map"]
    assert [line.split("  ")[0] for line in out.splitlines()] == [row["case"] for row in result["rows"]]
    num_bytes = 2 * sum(np.prod(shape) for shape in expected_tensors(load_config(geometry)).values())
    assert loaded["gb_s"] * loaded["s"] == pytest.approx(num_bytes / 1e9)
    assert loaded["share"] == pytest.approx(loaded["gb_s"] / result["limit_gb_s"])
    assert 0 <= memory["gb"] < 1
    assert list(temporary.iterdir()) == []


def test_what_is_loaded_is_a_sharded_checkpoint_in_bfloat16(geometry, monkeypatch):
    seen = []
    loaded = load.load

    def look(config, weights, ops, dtype):
        [folder] = Path(load.tempfile.tempdir).iterdir()
        read = open_weights(folder, config)
        sizes = [path.stat().st_size for path in sorted(folder.glob("model-*-of-*.safetensors"))]
        arrays = dict(read)
        assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
        spread = {float(array.astype(np.float32).std()) for array in arrays.values()}
        seen.append((len(sizes), max(sizes), max(spread), len(spread), dtype))
        return loaded(config, weights, ops, dtype)

    monkeypatch.setattr(load, "load", look)
    load.bench_load(str(geometry), device="cpu", runs=1, shard_bytes=200_000)
    assert len(seen) == 2
    shards, largest, spread, different, dtype = seen[0]
    assert shards > 3
    assert largest < 200_000 + 10_000  # and its header
    assert 0.01 < spread < 0.04
    assert different > 20
    assert dtype == "float32"


def test_too_little_room_is_said_before_anything_is_written(geometry, temporary, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(load.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InvalidArgument, match=r"0\.0 GB free and the checkpoint takes 0\.1 GB, 0\.1 GB more; set TMPDIR"):
        load.bench_load(str(geometry), device="cpu")
    assert list(temporary.iterdir()) == []


def test_runs_are_counted_from_one(geometry, capsys):
    assert main(["bench", "load", "--model", str(geometry), "--device", "cpu", "--runs", "0"]) == 2
    assert "runs is 0" in capsys.readouterr().err


def test_the_limit_is_what_a_copy_takes(monkeypatch):
    monkeypatch.setattr(limits, "_best_seconds", lambda action: (action(), 0.25)[1])
    assert limits.host_copy_limit("cpu") == 2**29 / 0.25


@posix
def test_ctrl_c_leaves_no_files(geometry, temporary):
    """Interrupted while a large checkpoint is being written."""
    geometry.write_text(json.dumps({**json.loads(geometry.read_text()), "num_hidden_layers": 2000}))
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "cupaged", "bench", "load", "--model", str(geometry), "--device", "cpu"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(temporary.rglob("*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(temporary.iterdir()) == []
