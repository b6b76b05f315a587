"""Tiny models with random weights, one for each family, rope scaling and option, as Hugging Face folders.

`write_model(folder, CONFIGS[name])` makes the same bytes on every machine and NumPy version: the weights come from the raw
stream of PCG64, which NumPy guarantees (NEP 19). They are small integers times a power of two, exact in float32, bfloat16
and float16 alike, so that a comparison across dtypes measures the arithmetic and not the rounding of the weights. Scales are
such that logits are O(1) and attention is far from uniform. `scripts/make_goldens.py` runs the same folders through
transformers; so this file imports nothing of cupaged.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 256 .. 259; ids below are bytes
PROMPT_LENGTH = 96  # three times the context that the scaled models say they were trained on, four times a sliding window
WINDOW = 24


def _llama(**changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
        **changes,
    }


def _mistral(**changes) -> dict:
    return _llama(architectures=["MistralForCausalLM"], model_type="mistral", torch_dtype="bfloat16", head_dim=64, **changes)


def _qwen(version: int, **changes) -> dict:
    family = {"architectures": [f"Qwen{version}ForCausalLM"], "model_type": f"qwen{version}", "rms_norm_eps": 1e-6}
    window = {"use_sliding_window": False, "sliding_window": WINDOW, "max_window_layers": 1}
    padded = {"vocab_size": 272, "rope_theta": 1000000.0}  # more rows than the tokenizer has tokens, as Qwen's have
    return _llama(**{**family, **window, **padded, **changes})


def _without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


# config.json by name, in the forms that people have: with keys left out, the old rope_scaling, the new rope_parameters
CONFIGS = {
    # Llama 1: no key says that there is anything but multi-head attention with theta 10000
    "llama-mha": _without(_llama(torch_dtype="float16"), "num_key_value_heads", "rope_theta", "tie_word_embeddings"),
    "llama-gqa": _llama(hidden_size=192, num_attention_heads=3, num_hidden_layers=3, rope_theta=100000, rope_scaling=None),
    "llama-bias": _llama(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True, rms_norm_eps=0.1
    ),
    "llama-tied": _llama(hidden_size=64, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True),
    "llama-llama3": _llama(
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
    ),
    "llama-linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-yarn": _without(
        _llama(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
                "attention_factor": 1.25,
            },
            dtype="float32",
        ),
        "rope_theta",
        "torch_dtype",
    ),
    "llama-yarn-mscale": _llama(
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 8,
            "beta_slow": 1,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        },
    ),
    "mistral-window": _mistral(num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW),
    "mistral": _mistral(hidden_size=192, num_attention_heads=4, num_key_value_heads=1, sliding_window=None, rope_theta=1e6),
    "qwen2": _qwen(2, tie_word_embeddings=True, torch_dtype="bfloat16"),
    "qwen2-window": _qwen(2, hidden_size=448, num_attention_heads=7, num_hidden_layers=3, use_sliding_window=True),
    "qwen2-yarn": _qwen(2, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "qwen3": _qwen(3, head_dim=128, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    # as transformers 5 writes it: rope_parameters, layer_types, dtype
    "qwen3-window": _without(
        _qwen(
            3,
            head_dim=64,
            num_hidden_layers=3,
            attention_bias=True,
            use_sliding_window=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            dtype="bfloat16",
        ),
        "rope_theta",
        "torch_dtype",
    ),
}

# The same, with widths that are multiples of 64, as `cupaged.ops.products.takes` wants them. The tied model has three times as
# many elements: its logits are the largest, and roundings of bfloat16 average out.
EVEN_CONFIGS = {name: {**config, "intermediate_size": 128} for name, config in CONFIGS.items()}
EVEN_CONFIGS["llama-tied"]["hidden_size"] = 192


def prompt(name: str) -> list[int]:
    """The token ids whose logits are compared for the model `name`: PROMPT_LENGTH random bytes."""
    return _random_bytes(zlib.crc32(name.encode()), PROMPT_LENGTH).tolist()


def write_model(folder: Path, config: dict) -> Path:
    """Write config.json, model.safetensors and a tokenizer whose ids are bytes into `folder`, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    stored = config.get("dtype") or config["torch_dtype"]
    dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    tensors = {name: weight(name, shape, config).astype(dtype) for name, shape in shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config.json holds."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_width, kv_width = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    family, attention_bias = config["model_type"], config.get("attention_bias", False)
    linear = {  # name: (out, in, has a bias)
        "self_attn.q_proj": (q_width, hidden, attention_bias or family == "qwen2"),
        "self_attn.k_proj": (kv_width, hidden, attention_bias or family == "qwen2"),
        "self_attn.v_proj": (kv_width, hidden, attention_bias or family == "qwen2"),
        "self_attn.o_proj": (hidden, q_width, attention_bias),
        "mlp.gate_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.up_proj": (inner, hidden, config.get("mlp_bias", False)),
        "mlp.down_proj": (hidden, inner, config.get("mlp_bias", False)),
    }
    norm = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family == "qwen3":
        norm |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    result = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        result["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result |= {f"{prefix}{name}.weight": (width,) for name, width in norm.items()}
        result |= {f"{prefix}{name}.weight": (rows, columns) for name, (rows, columns, _) in linear.items()}
        result |= {f"{prefix}{name}.bias": (rows,) for name, (rows, _, biased) in linear.items() if biased}
    return result


def weight(name: str, shape: tuple[int, ...], config: dict) -> np.ndarray:
    """The tensor `name`, float32; it depends on the config only through its shape and scale."""
    odd = 2.0 * (_random_bytes(zlib.crc32(name.encode()), math.prod(shape)) & 127).reshape(shape) - 127  # of deviation 74
    if "norm" in name:
        return np.float32((128 + odd // 4) / 128)
    if name.endswith("bias"):
        deviation = 0.5
    elif "embed" in name:
        deviation = 0.25 if config.get("tie_word_embeddings") else 1.0
    else:
        deviation = (1.25 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(shape[1])
    return np.float32(odd * 2.0 ** round(math.log2(deviation / 74)))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json that takes text apart into UTF-8 bytes, the id being the byte, and knows SPECIAL_TOKENS."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet shows as themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte if byte in shown else 256 + hidden.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def _random_bytes(seed: int, count: int) -> np.ndarray:
    """`count` uniform bytes, uint8, the same on every machine."""
    return np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
