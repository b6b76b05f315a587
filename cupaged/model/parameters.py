"""The weights of a model as its forward pass takes them: merged, where they multiply the same rows, and quantised if asked for.

Both happen while they are streamed in.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cupaged.checkpoint.config import ModelConfig
from cupaged.checkpoint.weights import expected_tensors
from cupaged.ops.quantized import bytes_of_matrix, group_of

Array = Any  # of the device of `ops`

_GROUP = 8  # rows of gate and up that take turns, as `norm_swiglu` wants them
_PARTS = {"qkv": 3, "gate_up": 2}  # matrices that are merged into one
_HEAD = {"fp8": "int8"}  # where the head is of another kind: the 3 bits of an fp8 mantissa move logits more than all of int8


@dataclass
class Layer:
    """The weights of one layer, None where the model has no such; matrices are [out, in], of numbers or quantised."""

    input_norm: Array = None  # [hidden]
    qkv: Array = None  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: the rows of q, then k's, then v's
    qkv_bias: Array = None
    q_norm: Array = None  # [head_dim], and so is k_norm
    k_norm: Array = None
    o: Array = None  # [hidden, num_heads * head_dim]
    o_bias: Array = None
    post_norm: Array = None  # [hidden]
    gate_up: Array = None  # [2 * ffn, hidden]: 8 rows of the gate, then 8 of up, by turns, as `norm_swiglu` says
    gate_up_bias: Array = None
    down: Array = None  # [hidden, ffn]
    down_bias: Array = None


@dataclass
class Parameters:
    """The weights of a model; `head` is `embed` where they are tied, or a quantised copy of it."""

    layers: list[Layer]
    embed: Array = None  # [vocab, hidden]
    norm: Array = None  # [hidden]
    head: Array = None  # [vocab, hidden]


# Hugging Face names -> fields
_OF_MODEL = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}
_OF_LAYER = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "post_norm",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}


def load(
    config: ModelConfig, weights: Iterable[tuple[str, np.ndarray]], ops: ModuleType, dtype: str, quantization: str | None = None
) -> Parameters:
    """The weights on the device of `ops`, from (Hugging Face name, host array) pairs in any order.

    One by one: the host holds one tensor at a time, and a merged array is made on the device when the first of its parts comes,
    so that nothing is there twice. With `quantization`, a kind of `ops.quantized`, every matrix is quantised as soon as all its
    parts are there: with a file's tensors in the order of their names `unquantised_bytes` are there as they came, at most.
    """
    parameters, parts = Parameters([Layer() for _ in range(config.num_layers)]), Counter()
    quantised = () if quantization is None else _shapes(config)

    def came(owner: Parameters | Layer, field: str) -> None:
        parts[id(owner), field] += 1
        if field in quantised and parts[id(owner), field] == _PARTS.get(field, 1):
            setattr(owner, field, ops.quantize(getattr(owner, field), _kind_of(field, quantization)))

    for name, array in weights:
        owner, field = _put(parameters, config, name, array, ops, dtype)
        del array  # which may be of the device
        came(owner, field)
    if config.tie_word_embeddings:
        parameters.head = parameters.embed
        came(parameters, "head")
    return parameters


def _put(
    parameters: Parameters, config: ModelConfig, name: str, array: np.ndarray, ops: ModuleType, dtype: str
) -> tuple[Parameters | Layer, str]:
    """Bring a weight to the device; returns what it belongs to, and the field that it is or is a part of."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        setattr(parameters, _OF_MODEL[name], ops.upload(array, dtype))
        return parameters, _OF_MODEL[name]
    layer, module = parameters.layers[int(match[1])], match[2]
    field = _OF_LAYER[module] + ("_bias" if match[3] == "bias" else "")
    if _OF_LAYER[module] not in _PARTS:
        setattr(layer, field, ops.upload(array, dtype))
        return layer, field
    if getattr(layer, field) is None:
        setattr(layer, field, ops.empty((_merged_rows(config, module), *array.shape[1:]), dtype))
    for target, part in _places(config, module, getattr(layer, field), array):
        ops.write(target, part)
    return layer, field


# ---- what is quantised, and how many bytes that is


def kinds(quantization: str | None) -> set[str | None]:
    """The kinds of `ops.quantized` that the matrices of a model become; None: they stay as they are."""
    return {_kind_of(field, quantization) for field in ("qkv", "head")}


def _kind_of(field: str, quantization: str | None) -> str | None:
    return _HEAD.get(quantization, quantization) if field == "head" else quantization


def check_quantization(config: ModelConfig, quantization: str | None) -> None:
    """InvalidArgument, naming the matrix, where one of the model's cannot be quantised like that."""
    if quantization is not None:
        for field, (_, inner) in _shapes(config).items():
            group_of(_kind_of(field, quantization), inner, f"the model's {field} matrix")


def device_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all weights on the device."""
    total = np.dtype(dtype).itemsize * sum(math.prod(shape) for shape in expected_tensors(config).values())
    if quantization is not None:
        for field, (rows, inner) in _shapes(config).items():
            count = 1 if field == "head" else config.num_layers
            instead = 0 if field == "head" and config.tie_word_embeddings else rows * inner * np.dtype(dtype).itemsize
            total += count * (bytes_of_matrix(_kind_of(field, quantization), rows, inner) - instead)
    return total


def bytes_of_a_step(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of weights that every step reads: of an embedding that is not the head as well it takes only a few rows."""
    unread = 0 if config.tie_word_embeddings and quantization is None else config.vocab_size * config.hidden_size
    return device_bytes(config, dtype, quantization) - unread * np.dtype(dtype).itemsize


def unquantised_bytes(config: ModelConfig, dtype: str, quantization: str | None) -> int:
    """The most bytes of matrices that are there as they came: the head, or a merged one and another like its last part."""
    if quantization is None:
        return 0
    count = {field: rows * inner for field, (rows, inner) in _shapes(config).items()}
    return np.dtype(dtype).itemsize * max(count["head"], count["qkv"] + count["o"], count["gate_up"] + count["down"])


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices that are quantised, by their fields: of a layer, and of the head."""
    hidden, ffn, q_rows = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return {
        "qkv": (_merged_rows(config, "self_attn."), hidden),
        "o": (hidden, q_rows),
        "gate_up": (_merged_rows(config, "mlp."), hidden),
        "down": (hidden, ffn),
        "head": (config.vocab_size, hidden),
    }


def _merged_rows(config: ModelConfig, module: str) -> int:
    if module.startswith("mlp."):
        return 2 * config.intermediate_size
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def _places(config: ModelConfig, module: str, merged: Array, array: np.ndarray) -> Iterator[tuple[Array, np.ndarray]]:
    """(where in the merged array, what) of the pieces of an array that is a part of it."""
    rows, *inner = array.shape
    if module.startswith("self_attn."):
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        first = {"self_attn.q_proj": 0, "self_attn.k_proj": q_rows, "self_attn.v_proj": q_rows + kv_rows}[module]
        yield merged[first : first + rows], array
        return
    second = int(module == "mlp.up_proj")  # of the two that take turns
    whole = rows // _GROUP * _GROUP
    groups = merged[: 2 * whole].reshape(whole // _GROUP, 2, _GROUP, *inner)
    yield groups[:, second], array[:whole].reshape(whole // _GROUP, _GROUP, *inner)
    last = merged[2 * whole :].reshape(2, rows - whole, *inner)
    yield last[second], array[whole:]
