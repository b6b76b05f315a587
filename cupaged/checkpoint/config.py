"""config.json and generation_config.json -> what the model and the sampler need to know, checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cupaged.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency `theta` and how it is scaled; fields a type does not use keep their defaults."""

    theta: float
    type: str = "default"  # "default" | "linear" | "llama3" | "yarn"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor (and mscale, mscale_all_dim)
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of a Llama-family model; every number is checked to be one that the forward pass can run."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool  # Qwen2, and attention_bias
    o_bias: bool  # attention_bias
    mlp_bias: bool
    qk_norm: bool  # Qwen3
    sliding_windows: tuple[int | None, ...]  # a layer's window in tokens, None: full attention
    dtype: str | None  # what config.json says the weights are
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HEAD_DIMS = (64, 128)
_REMEDY = "Download the file again or correct it."

# What an absent key means, as in the configuration classes of transformers 4.56 and 5.23 (a null key is not absent).
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": None,  # as many as there are heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_FAMILY_DEFAULTS = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "MistralForCausalLM": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}


def load_config(folder: str | Path) -> ModelConfig:
    """Read `folder`/config.json, or a file that holds the like.

    Raises:
        CheckpointError: there is no such file, it is not a JSON object, a key is missing or holds nonsense, or the model
            is of a kind that cannot be run here.
    """
    path = Path(folder)
    path = path if path.is_file() else path / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give the folder of a model in Hugging Face format.")
    raw = read_json(path)
    architecture = _architecture(path, raw)
    fields = _Fields(path, {**_DEFAULTS, **_FAMILY_DEFAULTS[architecture], **raw})
    _refuse_variants(fields)

    hidden_size = fields.integer("hidden_size", 1, 2**20)
    num_layers = fields.integer("num_hidden_layers", 1, 2**12)
    num_heads = fields.integer("num_attention_heads", 1, 2**12)
    num_kv_heads = num_heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads", 1, 2**12)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads, {num_heads}")
    max_position_embeddings = fields.integer("max_position_embeddings", 1, 2**31 - 1)
    llama, qwen2, qwen3 = (architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3"))
    attention_bias = (llama or qwen3) and fields.boolean("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", 1, 2**24),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, 2**24),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.number("rms_norm_eps", above=0, most=1),
        rope=_rope(fields, max_position_embeddings),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=llama and fields.boolean("mlp_bias"),
        qk_norm=qwen3,
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        dtype=_dtype(fields),
        bos_token_id=None if fields.get("bos_token_id") is None else fields.integer("bos_token_id", 0, 2**31 - 1),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def load_generation_config(folder: str | Path) -> dict[str, bool | int | float | tuple[int, ...]]:
    """The sampling defaults of `folder`/generation_config.json; {} if there is none.

    Keys, each only if the file gives it: `do_sample` (bool), `temperature`, `top_p`, `min_p`, `repetition_penalty` (float),
    `top_k` (int, 0: off), `max_new_tokens` (int), `bos_token_id` (int), `eos_token_id` (tuple of int). Others are ignored.

    Raises:
        CheckpointError: the file is not a JSON object, or one of these keys holds nonsense.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return {}
    fields = _Fields(path, read_json(path))
    read = {
        "do_sample": fields.boolean,
        "temperature": lambda key: fields.number(key, least=0),
        "top_k": lambda key: max(0, fields.integer(key, -1, 2**31 - 1)),  # some files say -1 for off
        "top_p": lambda key: fields.number(key, above=0, most=1),
        "min_p": lambda key: fields.number(key, least=0, most=1),
        "repetition_penalty": lambda key: fields.number(key, above=0),
        "max_new_tokens": lambda key: fields.integer(key, 1, 2**31 - 1),
        "bos_token_id": lambda key: fields.integer(key, 0, 2**31 - 1),
        "eos_token_id": fields.token_ids,
    }
    return {key: reader(key) for key, reader in read.items() if fields.get(key) is not None}


def read_json(path: Path) -> dict:
    """The JSON object in a file; CheckpointError naming the file if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. {_REMEDY}") from error
    except (ValueError, RecursionError) as error:  # also integers of more digits than Python converts
        raise CheckpointError(f"{path} is not valid JSON: {error}. {_REMEDY}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {_show(value)}, but a JSON object is expected. {_REMEDY}")
    return value


class _Fields:
    """Checked access to a JSON object; every refusal names the file, the key, the value and what is accepted."""

    def __init__(self, path: Path, values: dict, prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def get(self, key: str) -> object:
        """The value; None if it is null or absent."""
        return self.values.get(key)

    def error(self, key: str, expected: str, remedy: str = _REMEDY) -> CheckpointError:
        if key not in self.values:
            return CheckpointError(f"{self.path} lacks the key {self.prefix}{key}. {remedy}")
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {_show(self.values[key])}, but {expected}. {remedy}")

    def integer(self, key: str, least: int, most: int) -> int:
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:  # True is an int to isinstance
            raise self.error(key, f"must be an integer from {least} to {most}")
        return value

    def number(self, key: str, above: float = -math.inf, least: float = -math.inf, most: float = 1e30) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not (value > above and least <= value <= most):  # NaN compares false
            low = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
            raise self.error(key, f"must be a number {low} and at most {most:g}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; null is none."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(id_) is not int or not 0 <= id_ < 2**31 for id_ in ids):
            raise self.error(key, "must be a token id or a list of them")
        return tuple(ids)


def _show(value: object) -> str:
    """The value as JSON, short enough for one line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "deeply nested"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _architecture(path: Path, raw: dict) -> str:
    """The class that config.json names; older tools wrote only `model_type`."""
    fields = _Fields(path, raw)
    key = "architectures" if fields.get("architectures") is not None or "model_type" not in raw else "model_type"
    value = fields.get(key)
    if key == "model_type":
        name = _ARCHITECTURES.get(value) if isinstance(value, str) else None
    else:
        name = value[0] if isinstance(value, list) and len(value) == 1 else None
    if name not in _ARCHITECTURES.values():
        known = ", ".join(_ARCHITECTURES.values())
        raise fields.error(key, f"the architectures supported are {known}", "Choose a model of one of these.")
    return name


def _refuse_variants(fields: _Fields) -> None:
    """Variants of a supported architecture that change what is computed."""
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "only float32, float16 and bfloat16 weights are read", "Choose the unquantised model."
        )
    if fields.get("hidden_act") != "silu":
        raise fields.error("hidden_act", 'only "silu" is supported', "Choose another model.")


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim, source = fields.integer("head_dim", 1, 2**20), "head_dim"
    elif hidden_size % num_heads:
        raise fields.error("hidden_size", f"without head_dim it must be a multiple of num_attention_heads, {num_heads}")
    else:
        head_dim, source = hidden_size // num_heads, "hidden_size / num_attention_heads"
    if head_dim not in _HEAD_DIMS:
        supported = " and ".join(map(str, _HEAD_DIMS))
        raise CheckpointError(
            f"{fields.path}: {source} is {head_dim}, but the head dimensions supported are {supported}. Choose another model."
        )
    return head_dim


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    """From `rope_scaling` and `rope_theta`, or from `rope_parameters`, which holds both since transformers 5."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = {} if fields.get(key) is None else fields.get(key)
    if not isinstance(values, dict):
        raise fields.error(key, "must be an object or null")
    rope = _Fields(fields.path, values, prefix=f"{key}.")

    def at(name: str) -> _Fields:
        """Where a key is that is inside since transformers 5 and was beside before."""
        return rope if name in values else fields

    type_key = "rope_type" if "rope_type" in values else "type"
    rope_type = values.get(type_key, "default")
    if rope_type not in _ROPE_TYPES:
        raise rope.error(type_key, f"the types supported are {', '.join(_ROPE_TYPES)}", "Choose another model.")
    if any(isinstance(value, dict) for value in values.values()):
        raise fields.error(key, "must be one object for all layers", "Choose a model whose layers share one rotary embedding.")
    partial = at("partial_rotary_factor")
    if partial.get("partial_rotary_factor") not in (None, 1):
        raise partial.error("partial_rotary_factor", "only full rotation, 1.0, is supported", "Choose another model.")

    theta = at("rope_theta").number("rope_theta", above=1)
    if rope_type == "default":
        return RopeConfig(theta)
    factor = rope.number("factor", above=0)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", factor)
    original, source = max_position_embeddings, at("original_max_position_embeddings")
    if source.get("original_max_position_embeddings") is not None:
        original = source.integer("original_max_position_embeddings", 1, 2**31 - 1)
    if rope_type == "llama3":
        low = rope.number("low_freq_factor", above=0)
        return RopeConfig(
            theta,
            "llama3",
            factor,
            original,
            low_freq_factor=low,
            high_freq_factor=rope.number("high_freq_factor", above=low),
        )

    def optional(name: str, default: float | None = None) -> float | None:
        """As transformers: null and 0 mean the default."""
        return rope.number(name, least=0) or default if rope.get(name) is not None else default

    beta_slow = optional("beta_slow", 1.0)
    beta_fast = optional("beta_fast", 32.0)
    if beta_fast <= beta_slow:
        raise rope.error("beta_fast", f"must be above beta_slow, {beta_slow:g}")
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=None if rope.get("attention_factor") is None else rope.number("attention_factor", above=0),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=rope.boolean("truncate") if "truncate" in values else True,
    )


def _sliding_windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: by `layer_types`, else from layer `max_window_layers` on, if used at all."""
    full = (None,) * num_layers
    if architecture == "LlamaForCausalLM":
        return full
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window", 1, 2**31 - 1)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not fields.boolean("use_sliding_window"):
        window = None
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", 0, 2**31 - 1)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"must be a list of one type for each of the {num_layers} layers")
    if any(kind not in ("full_attention", "sliding_attention") for kind in layer_types):
        raise fields.error(
            "layer_types", 'only "full_attention" and "sliding_attention" are supported', "Choose another model."
        )
    if "sliding_attention" in layer_types and window is None:
        raise fields.error("layer_types", "sliding_attention needs use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _dtype(fields: _Fields) -> str | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise fields.error(key, "must be the name of a type or null")
    return value
