"""How the weights of a checkpoint become those of the forward pass: merged where they multiply the same rows."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.model.parameters import load
from cupaged.ops import numpy as ops


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "qwen3-window"])
@pytest.mark.parametrize("ffn", [160, 13, 5])  # whole groups of 8; one and a part; a part
def test_every_row_is_where_the_operations_take_it_from(tmp_path, name, ffn):
    folder = tiny_models.write_model(tmp_path, {**tiny_models.CONFIGS[name], "intermediate_size": ffn})
    config = load_config(folder)
    stored = dict(open_weights(folder, config))
    pairs = list(stored.items())
    np.random.default_rng(SEED).shuffle(pairs)
    parameters = load(config, pairs, ops, "float32")

    def taken_apart(both):
        """The gate's rows and up's, as the docstring of `norm_swiglu` says."""
        first = [i // 8 * 16 + i % 8 for i in range(ffn)]
        return both[first], both[[i + min(8, ffn - j // 16 * 8) for i, j in zip(first, first, strict=True)]]

    found = {"model.embed_tokens.weight": parameters.embed, "model.norm.weight": parameters.norm}
    if config.tie_word_embeddings:
        assert parameters.head is parameters.embed
    else:
        found["lm_head.weight"] = parameters.head
    for number, layer in enumerate(parameters.layers):
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"input_layernorm.weight": layer.input_norm, "post_attention_layernorm.weight": layer.post_norm}
        parts |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
        for kind in ("weight", "bias"):
            qkv, o, gate_up, down = (
                getattr(layer, field + "_bias" * (kind == "bias")) for field in ("qkv", "o", "gate_up", "down")
            )
            parts |= {f"self_attn.o_proj.{kind}": o, f"mlp.down_proj.{kind}": down}
            if qkv is not None:
                q, k, v = np.split(qkv, [q_rows, q_rows + kv_rows])
                parts |= {f"self_attn.q_proj.{kind}": q, f"self_attn.k_proj.{kind}": k, f"self_attn.v_proj.{kind}": v}
            if gate_up is not None:
                parts[f"mlp.gate_proj.{kind}"], parts[f"mlp.up_proj.{kind}"] = taken_apart(gate_up)
        found |= {f"model.layers.{number}.{name}": part for name, part in parts.items() if part is not None}
    assert set(found) == set(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)


def test_nothing_is_on_the_device_twice_and_what_needs_no_change_is_shared(tmp_path):
    """Each merged array is made once; on the CPU a whole tensor of the right type stays where the file is mapped."""
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    config = load_config(folder)
    made, stored = [], dict(open_weights(folder, config))
    device = SimpleNamespace(
        upload=ops.upload, write=ops.write, empty=lambda shape, dtype: made.append(shape) or ops.empty(shape, dtype)
    )
    parameters = load(config, stored.items(), device, "float32")
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = [(qkv_rows, config.hidden_size), (2 * config.intermediate_size, config.hidden_size)]
    assert sorted(made) == sorted(layer * config.num_layers)
    assert np.shares_memory(parameters.layers[1].down, stored["model.layers.1.mlp.down_proj.weight"])
    parameters = load(config, ((name, array.astype(ml_dtypes.bfloat16)) for name, array in stored.items()), ops, "float32")
    assert parameters.layers[1].down.dtype == parameters.layers[1].qkv.dtype == np.float32
