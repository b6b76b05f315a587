"""Checkpoints on a GPU: every bit of a file arrives, and what it takes of the host's memory."""

import pytest
import tiny_models
from reference import assert_loaded_exactly

from cupaged import LLM
from cupaged.bench.load import bench_load

GEOMETRY = {  # matrices of many slices, the last of each not whole; 3001 rows of the gate: groups of 8 and one more
    **{"hidden_size": 1024, "intermediate_size": 3001, "vocab_size": 20011, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_arrives_bit_for_bit(ops, tmp_path, stored, dtype):
    folder = tiny_models.write_model(tmp_path, {**tiny_models.CONFIGS["llama-gqa"], **GEOMETRY, "torch_dtype": stored})
    assert_loaded_exactly(ops, folder, dtype)


def test_a_model_knows_how_fast_it_was_loaded(tmp_path):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    stats = LLM(folder, device="cuda", kv_memory="64MiB").load_stats
    assert stats.num_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors")) - 8 - header_bytes(folder)
    assert stats.seconds > 0


def header_bytes(folder):
    with open(folder / "model.safetensors", "rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_loading_is_measured_beside_the_limit_of_the_bus(tmp_path):
    path = tmp_path / "some-1b.json"
    (tiny_models.write_model(tmp_path / "whole", {**tiny_models.CONFIGS["llama-gqa"], **GEOMETRY}) / "config.json").rename(path)
    result = bench_load(str(path), device="cuda", runs=2, shard_bytes=20_000_000)
    loaded, memory = result["rows"]
    assert 1 < result["limit_gb_s"] < 1000
    assert 0 < loaded["share"] < 1.05
    assert memory["gb"] < 1
