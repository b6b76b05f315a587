"""A GGUF file of a Llama -> a Hugging Face folder: float32 safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.checkpoint.gguf import GGUFTensor, read_gguf
from cupaged.checkpoint.weights import DTYPES
from cupaged.errors import CheckpointError

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types


def convert_gguf(gguf: str | Path, folder: str | Path, progress: Callable[[int], Any] = lambda num_bytes: None) -> None:
    """Write the Hugging Face folder of a GGUF file into the existing `folder`, telling `progress` of bytes written.

    The file must hold a Llama without rope scaling and a byte-level BPE vocabulary of SmolLM's kind; any other raises
    CheckpointError. One tensor is in memory at a time, dequantised to float32.
    """
    folder = Path(folder)
    metadata, tensors = read_gguf(gguf)
    try:
        config = _config(metadata, tensors)
        generation_config = {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": _stop_ids(metadata),
            "pad_token_id": config["pad_token_id"],
        }
        tokenizer_config = _tokenizer_config(metadata)
        tokenizer = _tokenizer(metadata)
        names = {name: _hugging_face_name(name) for name in tensors}
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{gguf} lacks the metadata {error}; fetch it again") from error
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def arrays() -> Iterable[np.ndarray]:
        for name, tensor in tensors.items():
            weights = tensor.dequantise()
            projection = names[name].split(".")[-2]
            yield _unpermute(weights, heads[projection]) if projection in heads else weights
            progress(weights.nbytes)

    write_safetensors(folder / "model.safetensors", {names[name]: tensor.shape for name, tensor in tensors.items()}, arrays())
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    if metadata["general.architecture"] != "llama" or "llama.rope.scaling.type" in metadata or "rope_freqs.weight" in tensors:
        raise CheckpointError("only GGUF files of a Llama without rope scaling can be converted; use a safetensors model")
    hidden_size, num_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
        "torch_dtype": "float32",  # what transformers before version 5 reads
    }


def _stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The end of a turn, and the end of a text where that is another token."""
    stop = [metadata["tokenizer.ggml.eos_token_id"]]
    tokens = metadata["tokenizer.ggml.tokens"]
    end_of_text = tokens.index("<|endoftext|>") if "<|endoftext|>" in tokens else stop[0]
    return stop if end_of_text in stop else [*stop, end_of_text]


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizers.Tokenizer of the metadata: byte-level BPE, digits one by one, no BOS added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm") or metadata.get("tokenizer.ggml.add_bos_token", False):
        raise CheckpointError(f"the GGUF file's tokenizer is of the kind {kind}, only SmolLM's can be converted")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # what the library raises for a merge of unknown tokens has no class of its own
        raise CheckpointError(f"the GGUF file's merges do not fit its vocabulary ({error}); fetch it again") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=bool(kind == _CONTROL), normalized=False)])
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{ggml}_token_id") for name, ggml in named.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _hugging_face_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight" if layer else _GLOBAL_NAMES[name]


def _unpermute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's two halves, weights [num_heads * head_dim, in]: rows 0, 2, 4.. of a head are
    its first half in Hugging Face's order."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(weights.shape)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray], dtype: str = "F32", *, sync: bool = True
) -> None:
    """Write `arrays` of `dtype`, whole or in pieces, in the order of `shapes`, and with `sync` see them onto the disk.

    (`safetensors.numpy.save_file` wants all of them in memory at once.)
    """
    stored = DTYPES[dtype].newbyteorder("<")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + stored.itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that tensors begin on a cache line
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array, stored).view(np.uint8).data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shortest(value: float) -> float:
    """A float32 of the file as its author wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
