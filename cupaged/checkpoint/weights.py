"""safetensors files -> (name, array) pairs, memory-mapped, each checked against the configuration beforehand."""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from cupaged.checkpoint.config import ModelConfig, read_json
from cupaged.errors import CheckpointError

# in the spelling of safetensors
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CONVERT = 'Save the model with transformers: from_pretrained(folder, dtype="bfloat16").save_pretrained(new_folder).'
_AGAIN = "Download the file again."


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight of the model; a linear layer is [out_features, in_features]."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_width, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_width, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_width, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_width, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, (width_out, width_in, has_bias) in linears.items():
        layer[f"{name}.weight"] = (width_out, width_in)
        if has_bias:
            layer[f"{name}.bias"] = (width_out,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)

    tensors = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        tensors.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    return tensors


def open_weights(folder: str | Path, config: ModelConfig) -> Weights:
    """Map the weights of `folder`: model.safetensors, or the shards that model.safetensors.index.json lists.

    No weight is read, but every tensor's name, shape and dtype (F32, F16 or BF16) is checked against `config`. Ignored are
    tensors that hold nothing of their own (rotary_emb.inv_freq; lm_head.weight when it is tied) and other files of the folder
    (consolidated*.safetensors repeats the weights in another layout). Any other tensor that `config` does not account for is
    an error: it belongs to a variant of the architecture that would be computed wrongly without it.

    Raises:
        CheckpointError: a file or tensor is missing, corrupt, or does not fit the configuration.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        stored = _read_header(single)
        source = single
    elif index.is_file():
        stored = _read_shards(index)
        source = index
    else:
        raise _no_safetensors(folder)

    expected = expected_tensors(config)
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected and name not in ignored]
    if missing:
        raise CheckpointError(
            f"{source} lacks {_some(missing)}, which config.json calls for. Use the config.json that belongs to these weights."
        )
    if unknown:
        raise CheckpointError(
            f"{source} holds {_some(unknown)}, unknown to {config.architecture}. Choose a model without such additions."
        )
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}. "
                "Use the config.json that belongs to these weights."
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {name} is {tensor.dtype}, but only {', '.join(DTYPES)} can be read. {_CONVERT}"
            )
    return Weights({name: stored[name] for name in expected})


class Weights:
    """The tensors of a model: iterating yields (name, array) in the order in which they lie in the files.

    An array is a read-only view of the mapped file, float32, float16 or ml_dtypes.bfloat16 as stored; one that lies misaligned
    in the file is copied, because arithmetic on misaligned arrays is slow.

    Memory: the host holds no copy, only the pages that were touched. The iterator keeps no reference to earlier arrays and, on
    systems with madvise, gives back the pages of each tensor when the next one is asked for (they stay in the system's file
    cache, and an array still in use reads them from there again): streaming a model to a device peaks at its largest tensor
    plus what the receiver makes of it.

    Attributes:
        dtype: "float32", "float16" or "bfloat16": the dtype of most of the bytes.
        num_bytes: bytes of all tensors together.
    """

    dtype: str
    num_bytes: int

    def __init__(self, tensors: dict[str, _StoredTensor]) -> None:
        self._tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].path, item[1].begin)))
        self._maps = {path: _map(path) for path in {tensor.path for tensor in tensors.values()}}
        num_bytes = Counter()
        for tensor in tensors.values():
            num_bytes[tensor.dtype] += tensor.end - tensor.begin
        self.dtype = DTYPES[num_bytes.most_common(1)[0][0]].name
        self.num_bytes = num_bytes.total()

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = DTYPES[tensor.dtype]
        array = np.frombuffer(self._maps[tensor.path], dtype, math.prod(tensor.shape), tensor.begin).reshape(tensor.shape)
        return array if array.flags.aligned else array.copy()

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in self._tensors.items():
            yield name, self[name]
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                start = tensor.begin // mmap.PAGESIZE * mmap.PAGESIZE
                self._maps[tensor.path].madvise(mmap.MADV_DONTNEED, start, tensor.end - start)


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies: bytes `begin` .. `end` of the file `path`; `dtype` in the spelling of safetensors."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(path: Path) -> dict[str, _StoredTensor]:
    """The tensors of one safetensors file.

    The safetensors library judges the file: header length, JSON, offsets (gapless, in order, within the file), sizes. It does
    not tell the offsets, and its NumPy face copies every tensor (0.8: each get_tensor("a") has an address of its own), so
    they are read once more here and the bytes are mapped by `Weights`.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        data = 8 + header_size
        tensors = {
            name: _StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *(data + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Check the file and its permissions.") from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {reason}. {_AGAIN}") from error
    return tensors


def _read_shards(index: Path) -> dict[str, _StoredTensor]:
    """The tensors that model.safetensors.index.json names, looked up in its shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names. {_AGAIN}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Nothing outside the folder is opened, on any system: backslash and colon are separators on Windows.
        if not shard.endswith(".safetensors") or any(character in shard for character in "/\\:\0"):
            raise CheckpointError(f"{index} names the shard {json.dumps(shard)}, not a safetensors file beside it. {_AGAIN}")
    absent = [shard for shard in shards if not (index.parent / shard).exists()]
    if absent:
        raise CheckpointError(f"{index.parent} lacks {_some(absent)}, named by {index.name}. Download the rest of the model.")
    headers = {shard: _read_header(index.parent / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index.parent / shard} lacks {name}, which {index.name} places there. {_AGAIN}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _no_safetensors(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is not a folder. Give the folder of a model in Hugging Face format.")
    names = sorted(path.name for path in folder.iterdir())
    if "model.safetensors" in names:
        return CheckpointError(f"{folder / 'model.safetensors'} is no file, or a link to one that is missing. {_AGAIN}")
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if shards:
        return CheckpointError(f"{folder} holds {_some(shards)}, but no model.safetensors.index.json. Download it as well.")
    other = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors"))]
    if other:
        return CheckpointError(f"{folder} holds {_some(other)}, but no model.safetensors. {_CONVERT}")
    return CheckpointError(f"{folder} holds no model.safetensors. Download the weights of the model into it.")


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped into memory: {error}. Check the file system it lies on.") from error


def _some(names: list[str]) -> str:
    """Up to three names and the count of the rest."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(ascii, names[:3])) + rest
