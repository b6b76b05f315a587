"""What a user sees of loading: a bar on a terminal, and figures afterwards."""

import io
import logging
import sys

import pytest
import tiny_models

from cupaged import LLM
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.loading import Loading
from cupaged.checkpoint.weights import open_weights
from cupaged.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("model"), tiny_models.CONFIGS["llama-gqa"])


def test_pairs_are_passed_on_and_measured(folder):
    weights = open_weights(folder, load_config(folder))
    loading = Loading(weights)
    pairs = iter(loading)
    names = [next(pairs)[0]]
    assert loading.stats is None
    names += [name for name, array in pairs if (array == weights[name]).all()]
    assert names == [name for name, _ in weights]
    assert loading.stats.num_bytes == weights.num_bytes
    assert loading.stats.gb_s == pytest.approx(weights.num_bytes / 1e9 / loading.stats.seconds)


def test_a_model_knows_how_fast_it_was_loaded(folder):
    llm = LLM(folder, device="cpu")
    assert llm.load_stats.num_bytes == open_weights(folder, llm.config).num_bytes
    assert 0 < llm.load_stats.seconds < llm.load_seconds
    assert LLM(folder, device="cpu", load_format="dummy").load_stats is None


@pytest.mark.parametrize(("terminal", "level"), [(True, logging.WARNING), (True, logging.ERROR), (False, logging.WARNING)])
def test_a_bar_is_shown_on_a_terminal_only(folder, monkeypatch, caplog, terminal, level):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(level, "cupaged"):
        LLM(folder, device="cpu")
    assert ("load" in stream.getvalue()) == (terminal and level == logging.WARNING)
    assert "\n" not in stream.getvalue()


def test_no_stderr_is_no_terminal(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert LLM(folder, device="cpu").load_stats.num_bytes > 0


def test_stats_show_gigabytes_a_second(folder, capsys):
    words = ["generate", "--model", str(folder), "--device", "cpu", "--prompt", "Hello", "--max-tokens", "1", "--stats"]
    assert main(words) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weights")]
    name, speed, unit, size, size_unit, *rest = line.split()
    num_bytes = open_weights(folder, load_config(folder)).num_bytes
    assert (name, unit, size_unit, rest[0], rest[2]) == ("weights", "GB/s", "MB", "in", "s")
    assert float(size) == pytest.approx(num_bytes / 1e6, rel=1e-2)
    assert float(speed) > 0
    assert 0 <= float(rest[1]) < 10
