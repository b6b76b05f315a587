"""The weights of a model as its forward pass takes them: what multiplies the same rows is merged while it is streamed in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cupaged.checkpoint.config import ModelConfig

Array = Any  # of the device of `ops`

_GROUP = 8  # rows of gate and up that take turns, as `norm_swiglu` wants them


@dataclass
class Layer:
    """The weights of one layer, None where the model has no such; matrices are [out, in]."""

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
    """The weights of a model; `head` is `embed` where they are tied."""

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


def load(config: ModelConfig, weights: Iterable[tuple[str, np.ndarray]], ops: ModuleType, dtype: str) -> Parameters:
    """The weights on the device of `ops`, from (Hugging Face name, host array) pairs in any order.

    One by one: the host holds one tensor at a time, and a merged array is made on the device when the first of its parts comes,
    so that nothing is there twice.
    """
    parameters = Parameters([Layer() for _ in range(config.num_layers)])
    for name, array in weights:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            setattr(parameters, _OF_MODEL[name], ops.upload(array, dtype))
            continue
        layer, module = parameters.layers[int(match[1])], match[2]
        field = _OF_LAYER[module] + ("_bias" if match[3] == "bias" else "")
        if _OF_LAYER[module] not in ("qkv", "gate_up"):
            setattr(layer, field, ops.upload(array, dtype))
            continue
        if getattr(layer, field) is None:
            setattr(layer, field, ops.empty((_merged_rows(config, module), *array.shape[1:]), dtype))
        for target, part in _places(config, module, getattr(layer, field), array):
            ops.write(target, part)
    if config.tie_word_embeddings:
        parameters.head = parameters.embed
    return parameters


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
