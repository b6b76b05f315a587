"""config.json and generation_config.json: what each family means, and what is refused."""

import json
import random
import subprocess
import sys

import pytest

from cupaged.checkpoint.config import RopeConfig, load_config, load_generation_config
from cupaged.errors import CheckpointError, CupagedError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def load(tmp_path):
    def load(base=LLAMA, without=(), **changes):
        values = {key: value for key, value in {**base, **changes}.items() if key not in without}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return load_config(tmp_path)

    return load


def refused(call, *words):
    """The call raises CheckpointError in one line holding the words."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_llama_defaults_are_those_of_transformers(load):
    config = load(without=("rms_norm_eps", "max_position_embeddings"))
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("LlamaForCausalLM", 256, 512)
    assert (config.intermediate_size, config.num_layers, config.num_heads) == (1024, 4, 8)
    assert (config.num_kv_heads, config.head_dim) == (8, 64)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.tie_word_embeddings, config.qk_norm) == (False, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert config.sliding_windows == (None,) * 4
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == (None, 1, (2,))


def test_llama_options(load):
    config = load(
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        head_dim=128,
        torch_dtype="bfloat16",
        eos_token_id=[128001, 128009],
        bos_token_id=None,
        sliding_window=77,  # of no meaning to Llama
    )
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert (config.tie_word_embeddings, config.head_dim, config.dtype) == (True, 128, "bfloat16")
    assert (config.eos_token_ids, config.bos_token_id) == ((128001, 128009), None)
    assert config.sliding_windows == (None,) * 4


def test_model_type_stands_in_for_missing_architectures(load):
    assert load(QWEN3, without=("architectures",), model_type="qwen3").architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(("given", "window"), [({"sliding_window": 24}, 24), ({"sliding_window": None}, None), ({}, 4096)])
def test_mistral_window(load, given, window):
    config = load(MISTRAL, **given)
    assert config.sliding_windows == (window,) * 4
    assert (config.qkv_bias, config.o_bias) == (False, False)


def test_mistral_has_8_kv_heads_unless_told(load):
    assert load(MISTRAL, without=("num_key_value_heads",)).num_kv_heads == 8
    assert load(MISTRAL, num_attention_heads=4, head_dim=128, num_key_value_heads=None).num_kv_heads == 4


def test_qwen2_has_bias_on_qkv_only(load):
    config = load(QWEN2, attention_bias=True, mlp_bias=True)  # neither key means anything to Qwen2
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_qwen3_has_norms_and_its_own_head_dim(load):
    config = load(QWEN3)
    assert (config.qk_norm, config.head_dim, config.qkv_bias, config.o_bias) == (True, 128, False, False)
    assert load(QWEN3, head_dim=64).head_dim == 64
    assert load(QWEN3, head_dim=None).head_dim == 64  # null: hidden_size / num_attention_heads
    config = load(QWEN3, attention_bias=True)
    assert (config.qkv_bias, config.o_bias) == (True, True)


@pytest.mark.parametrize("base", [QWEN2, QWEN3])
def test_qwen_windows(load, base):
    assert load(base, sliding_window=24, max_window_layers=2).sliding_windows == (None,) * 4
    used = {"use_sliding_window": True, "sliding_window": 24}
    assert load(base, **used, max_window_layers=3).sliding_windows == (None, None, None, 24)
    assert load(base, **used).sliding_windows == (None,) * 4  # max_window_layers is 28
    kinds = ["sliding_attention", "full_attention"] * 2
    assert load(base, **used, layer_types=kinds).sliding_windows == (24, None, 24, None)
    assert load(base, layer_types=["full_attention"] * 4).sliding_windows == (None,) * 4
    refused(lambda: load(base, sliding_window=24, layer_types=kinds), "layer_types", "use_sliding_window")
    refused(lambda: load(base, layer_types=["full_attention"]), "layer_types", "4 layers")
    refused(lambda: load(base, layer_types=["linear_attention"] * 4), "layer_types", "full_attention")


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
ROPES = {
    "null": (None, {}),
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
    "llama3": (
        LLAMA3,
        {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (YARN, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn by max_position_embeddings": (
        {"type": "yarn", "factor": 4.0, "beta_fast": None, "mscale": 0},  # null and 0: the default
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "yarn in full": (
        {
            **YARN,
            "beta_fast": 24,
            "beta_slow": 2,
            "attention_factor": 1.5,
            "mscale": 0.7,
            "mscale_all_dim": 1,
            "truncate": False,
        },
        {
            **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 24.0, "beta_slow": 2.0},
            **{"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_old_and_new_spelling(load, name):
    given, meant = ROPES[name]
    expected = RopeConfig(theta=500000.0, **meant)
    assert load(rope_theta=500000, rope_scaling=given).rope == expected
    assert load(rope_parameters={**(given or {}), "rope_theta": 500000.0}).rope == expected
    assert load(QWEN2, rope_parameters={**(given or {}), "rope_theta": 500000.0}).rope == expected


NONSENSE = [
    ({"architectures": ["MixtralForCausalLM"]}, ("architectures", "Mixtral", "LlamaForCausalLM", "Qwen3ForCausalLM")),
    ({"architectures": []}, ("architectures", "[]")),
    ({"architectures": "LlamaForCausalLM"}, ("architectures",)),
    ({"architectures": None, "model_type": "phi3"}, ("model_type", "phi3", "LlamaForCausalLM")),
    ({"architectures": None, "model_type": []}, ("model_type", "[]")),
    ({"num_attention_heads": 0}, ("num_attention_heads is 0", "integer")),
    ({"num_attention_heads": -8}, ("num_attention_heads", "-8")),
    ({"num_key_value_heads": 3}, ("num_key_value_heads is 3", "num_attention_heads, 8")),
    ({"num_key_value_heads": 16}, ("num_key_value_heads",)),
    ({"num_attention_heads": 7, "num_key_value_heads": 7}, ("hidden_size is 512", "7")),
    ({"hidden_size": "512"}, ("hidden_size", '"512"')),
    ({"hidden_size": 512.0}, ("hidden_size", "512.0")),
    ({"hidden_size": True}, ("hidden_size", "true")),
    ({"hidden_size": None}, ("hidden_size", "null")),
    ({"hidden_size": 10**30}, ("hidden_size", "1000000")),
    ({"vocab_size": -1}, ("vocab_size", "-1")),
    ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
    ({"intermediate_size": [1]}, ("intermediate_size", "[1]")),
    ({"max_position_embeddings": 0}, ("max_position_embeddings",)),
    ({"head_dim": 80}, ("head_dim is 80", "64 and 128")),
    ({"num_attention_heads": 16}, ("32", "64 and 128")),
    ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "NaN")),
    ({"rms_norm_eps": float("inf")}, ("rms_norm_eps", "Infinity")),
    ({"rms_norm_eps": 0}, ("rms_norm_eps",)),
    ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps", '"1e-5"')),
    ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
    ({"tie_word_embeddings": "no"}, ("tie_word_embeddings", "true or false")),
    ({"attention_bias": 1}, ("attention_bias",)),
    ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq", "bfloat16")),
    ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, ("partial_rotary_factor", "0.25")),
    ({"rope_theta": 0}, ("rope_theta is 0",)),
    ({"rope_theta": 1e300}, ("rope_theta",)),
    ({"rope_scaling": "linear"}, ("rope_scaling", '"linear"')),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling.type", "dynamic", "llama3", "yarn")),
    ({"rope_scaling": {"rope_type": "longrope"}}, ("rope_scaling.rope_type", "longrope", "yarn")),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, ("rope_parameters.rope_type",)),
    ({"rope_scaling": {"type": "linear"}}, ("lacks", "rope_scaling.factor")),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, ("rope_scaling.factor is -1",)),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ("high_freq_factor",)),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8192"}}, ("original_max_position_embeddings",)),
    ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, ("beta_fast",)),
    ({"rope_scaling": {**YARN, "attention_factor": 0}}, ("attention_factor",)),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("rope_parameters", "all layers")),
    ({"eos_token_id": "</s>"}, ("eos_token_id", "</s>")),
    ({"eos_token_id": [2, -1]}, ("eos_token_id",)),
    ({"bos_token_id": 1.5}, ("bos_token_id",)),
    ({"torch_dtype": 16}, ("torch_dtype",)),
]


@pytest.mark.parametrize(("changes", "words"), NONSENSE)
def test_nonsense_is_named(load, tmp_path, changes, words):
    refused(lambda: load(**changes), str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize("window", [0, -1, "24", 1.0])
def test_nonsense_window_is_named(load, window):
    refused(lambda: load(MISTRAL, sliding_window=window), "sliding_window")


@pytest.mark.parametrize(
    "key",
    ["architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_missing_key_is_named(load, key):
    refused(lambda: load(without=(key,)), "lacks", key)


NOT_CONFIGS = {
    "empty": (b"", "JSON"),
    "not JSON": (b"{vocab_size: 3}", "JSON"),
    "a list": (b"[1, 2]", "object"),
    "not UTF-8": (b'{"x": "\xff"}', "UTF-8"),
    "too deep": (b"[" * 200_000, "JSON"),
    "too many digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON"),
}


@pytest.mark.parametrize("name", NOT_CONFIGS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_file_that_is_no_json_object(tmp_path, name, file):
    content, word = NOT_CONFIGS[name]
    (tmp_path / file).write_bytes(content)
    read = load_config if file == "config.json" else load_generation_config
    refused(lambda: read(tmp_path), str(tmp_path / file), word)


def test_missing_file(tmp_path):
    refused(lambda: load_config(tmp_path), "config.json does not exist")
    refused(lambda: load_config(tmp_path / "nowhere"), "config.json does not exist")


def test_any_value_anywhere_gives_a_config_or_one_line(load):
    random_ = random.Random(0)
    values = [
        None,
        True,
        0,
        -1,
        1,
        64,
        2**63,
        1e308,
        float("nan"),
        "",
        "silu",
        "yarn",
        "x\ny",
        [],
        [2],
        [[]],
        {},
        {"type": "yarn"},
    ]
    values += [{"rope_type": "linear", "factor": 10**40}, json.loads("[" * 900 + "]" * 900)]
    keys = [
        *("num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "dtype", "quantization_config"),
        *("model_type", "original_max_position_embeddings", "partial_rotary_factor", "attention_bias", "mlp_bias", *LLAMA),
    ]
    outcomes, messages = set(), []
    for _ in range(3000):
        base = random_.choice([LLAMA, MISTRAL, QWEN2, QWEN3])
        changes = {random_.choice(keys): random_.choice(values) for _ in range(random_.randint(1, 3))}
        try:
            outcomes.add(type(load(base, **changes)))
        except CupagedError as error:
            outcomes.add(type(error))
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message]
    assert {kind.__name__ for kind in outcomes} == {"ModelConfig", "CheckpointError"}


def test_generation_config(tmp_path):
    assert load_generation_config(tmp_path) == {}
    given = {
        **{"do_sample": True, "temperature": 0, "top_k": -1, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1},
        **{"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": "ignored", "transformers_version": "5.0"},
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert load_generation_config(tmp_path) == {
        **{"do_sample": True, "temperature": 0.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1},
        **{"bos_token_id": 0, "eos_token_id": (7,)},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        *({"do_sample": "yes"}, {"temperature": -0.5}, {"temperature": float("nan")}, {"top_k": 1.5}, {"top_p": 0}),
        *({"top_p": 1.5}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"eos_token_id": ["a"]}),
    ],
)
def test_generation_config_nonsense_is_named(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    refused(lambda: load_generation_config(tmp_path), "generation_config.json", *wrong)


def test_reading_a_config_needs_no_numpy():
    code = "import sys, cupaged.checkpoint.config; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
