"""safetensors files: what is read, what it costs, and that no file, however broken, does more than raise CheckpointError."""

import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import CONFIGS, shapes

from cupaged.checkpoint.config import ModelConfig, RopeConfig, load_config
from cupaged.checkpoint.weights import expected_tensors, open_weights
from cupaged.errors import CheckpointError

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=6,
    hidden_size=8,
    intermediate_size=5,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_windows=(None,),
    dtype=None,
    bos_token_id=None,
    eos_token_ids=(),
)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tensors(dtype="float32"):
    random_ = np.random.default_rng(0)
    return {name: random_.normal(size=shape).astype(dtype) for name, shape in expected_tensors(CONFIG).items()}


def save(folder, arrays, name="model.safetensors"):
    save_file(arrays, folder / name)


def save_shards(folder, arrays):
    """Two files and their index; returns the weight map."""
    names = sorted(arrays)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save(folder, {name: arrays[name] for name in held}, shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def file_bytes(header, body=b"", size=None):
    """A safetensors file by hand; `size`: what it claims as the length of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + body


def refused(folder, *words, config=CONFIG):
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_arrays_are_those_written(tmp_path, dtype, sharded):
    written = tensors(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    (save_shards if sharded else save)(tmp_path, written)
    weights = open_weights(tmp_path, CONFIG)
    read = dict(weights)
    assert (weights.dtype, weights.num_bytes, len(weights)) == (dtype, sum(a.nbytes for a in written.values()), len(written))
    assert read.keys() == written.keys()
    for name, array in read.items():
        assert array.dtype == written[name].dtype
        np.testing.assert_array_equal(array, written[name])
        np.testing.assert_array_equal(weights[name], array)


def test_arrays_are_views_of_the_file_in_file_order(tmp_path):
    save(tmp_path, tensors())
    arrays = [array for _, array in open_weights(tmp_path, CONFIG)]
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays)
    addresses = [array.__array_interface__["data"][0] for array in arrays]
    assert addresses == sorted(addresses)
    assert addresses[-1] - addresses[0] == sum(array.nbytes for array in arrays[:-1])  # one mapping, no copies


def test_dtype_is_that_of_most_bytes(tmp_path):
    mixed = {name: array.astype(ml_dtypes.bfloat16) if array.ndim == 2 else array for name, array in tensors().items()}
    save(tmp_path, mixed)
    weights = open_weights(tmp_path, CONFIG)
    assert weights.dtype == "bfloat16"
    assert weights["model.norm.weight"].dtype == np.float32


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_misaligned_tensors_become_aligned_arrays(tmp_path, padding):
    written, begin, header, body = tensors(), 0, {}, b""
    for name, array in written.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, begin + array.nbytes]}
        body += array.tobytes()
        begin += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    (tmp_path / "model.safetensors").write_bytes(file_bytes(text, body))
    for name, array in open_weights(tmp_path, CONFIG):
        assert array.flags.aligned
        np.testing.assert_array_equal(array, written[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_tensors_of_every_family(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert expected_tensors(load_config(tmp_path)) == shapes(CONFIGS[name])


def test_harmless_extras_are_ignored(tmp_path):
    extra = {
        "lm_head.weight": np.zeros((6, 8), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(32, np.float64),
    }
    save(tmp_path, {**tensors(), **extra})
    (tmp_path / "consolidated.safetensors").write_bytes(b"junk")
    assert dict(open_weights(tmp_path, CONFIG)).keys() == tensors().keys()


def test_unknown_extras_are_named(tmp_path):
    extra = {f"model.layers.0.self_attn.{name}_proj.bias": np.zeros(64, np.float32) for name in "qkvo"}
    save(tmp_path, {**tensors(), **extra})
    refused(tmp_path, "self_attn.k_proj.bias", "and 1 more", "LlamaForCausalLM")


def test_missing_tensors_are_named_and_counted(tmp_path):
    written = tensors()
    del written[Q_PROJ]
    save(tmp_path, written)
    refused(tmp_path, "lacks", Q_PROJ)
    save(tmp_path, {"model.norm.weight": written["model.norm.weight"]})
    refused(tmp_path, "lacks", "model.embed_tokens.weight", f"and {len(tensors()) - 4} more")


def test_wrong_shape_is_named(tmp_path):
    save(tmp_path, {**tensors(), Q_PROJ: np.zeros((8, 64), np.float32)})
    refused(tmp_path, Q_PROJ, "[8, 64]", "[64, 8]")


@pytest.mark.parametrize(("dtype", "spelling"), [(np.float64, "F64"), (np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_other_dtypes_are_named(tmp_path, dtype, spelling):
    save(tmp_path, {**tensors(), Q_PROJ: np.zeros((64, 8), dtype)})
    refused(tmp_path, Q_PROJ, f" {spelling},", "F32, F16, BF16", "transformers")


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "three bytes": b"abc",
    "header longer than the file": file_bytes({}, size=1000),
    "header of 2^62 bytes": file_bytes({}, size=1 << 62),
    "header of 2^64 - 1 bytes": file_bytes({}, size=(1 << 64) - 1),
    "not JSON": file_bytes(b"{nonsense}"),
    "not UTF-8": file_bytes(b'{"\xff": 1}'),
    "nested": file_bytes(b"[" * 100_000),
    "lone surrogate": file_bytes(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "a list": file_bytes([1, 2]),
    "an entry without a shape": file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "overlap": file_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "same bytes twice": file_bytes({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "hole": file_bytes({"a": entry([2], 4, 12)}, bytes(12)),
    "beyond the file": file_bytes({"a": entry([200], 0, 800)}, bytes(8)),
    "end before begin": file_bytes({"a": entry([2], 8, 0)}, bytes(8)),
    "negative": file_bytes({"a": entry([2], -8, 0)}, bytes(8)),
    "product overflows": file_bytes({"a": entry([1 << 62, 1 << 62], 0, 8)}, bytes(8)),
    "size and shape differ": file_bytes({"a": entry([3], 0, 8)}, bytes(8)),
    "unknown dtype": file_bytes({"a": entry([2], 0, 8, "F31")}, bytes(8)),
    "bytes after the end": file_bytes({"a": entry([2], 0, 8)}, bytes(9)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(BROKEN[name])
    refused(tmp_path, str(tmp_path / "model.safetensors"), "truncated or not a safetensors file", "Download")


def test_file_truncated_after_the_header(tmp_path):
    save(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, str(path), "truncated")


def test_shards_missing_or_at_odds_with_the_index(tmp_path):
    weight_map = save_shards(tmp_path, tensors())
    second = "model-00002-of-00002.safetensors"
    wrong = next(name for name, shard in weight_map.items() if shard != second)
    write_index(tmp_path, {**weight_map, wrong: second})
    refused(tmp_path, second, "lacks", wrong)
    write_index(tmp_path, weight_map)
    (tmp_path / second).unlink()
    refused(tmp_path, "lacks", second)
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "model-00001-of-00002.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a\\model.safetensors", "c:m.safetensors", "m.bin", "..", "", "a\0"],
)
def test_shard_outside_the_folder_is_refused(tmp_path, shard):
    inside = tmp_path / "inside"
    inside.mkdir()
    save(tmp_path, tensors())
    write_index(inside, dict.fromkeys(tensors(), shard))
    refused(inside, json.dumps(shard), "model.safetensors.index.json")


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}']
)
def test_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, str(tmp_path / "model.safetensors.index.json"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "consolidated.safetensors"])
def test_other_formats_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, name, "no model.safetensors", "transformers")


def test_no_weights_or_no_folder(tmp_path):
    refused(tmp_path, "holds no model.safetensors")
    refused(tmp_path / "nowhere", "not a folder")


def mutate(data, random_):
    """One of: flipped bits, a cut, a piece copied elsewhere, a number or a name of the header exchanged."""
    data = bytearray(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    kind = random_.randrange(5)
    if kind == 0:
        for _ in range(random_.randint(1, 4)):
            data[random_.randrange(header_end)] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del data[random_.randrange(len(data)) :]
    elif kind == 2:
        begin, to = random_.randrange(header_end), random_.randrange(header_end)
        data[to : to + random_.randrange(64)] = data[begin : begin + random_.randrange(64)]
    elif kind == 3:
        header = json.loads(bytes(data[8:header_end]))
        one = header[random_.choice(list(header))]
        values = [0, 1, -1, 8, 2**31, 2**32, 2**63, 2**64 - 1, 1.5, None, "F32", "F64", "BF16", [], [8], [2**40, 2**40]]
        if random_.random() < 0.5:
            one[random_.choice(list(one))] = random_.choice(values)
        else:
            numbers = one[random_.choice(["shape", "data_offsets"])]
            numbers[random_.randrange(len(numbers))] = random_.choice(values)
        return file_bytes(header, bytes(data[header_end:]))
    else:
        data[:8] = struct.pack(
            "<Q", random_.choice([0, 1, 8, header_end, len(data), 10**8, 2**31, 2**63, random_.randrange(len(data))])
        )
    return bytes(data)


def test_ten_thousand_mutations_raise_or_load(tmp_path):
    save(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    original, random_ = path.read_bytes(), random.Random(0)
    loaded, messages = 0, set()
    for _ in range(10_000):
        path.unlink()  # never written in place: arrays of an earlier round may still be mapped
        path.write_bytes(mutate(original, random_))
        try:
            weights = open_weights(tmp_path, CONFIG)
        except CheckpointError as error:
            messages.add(str(error))
            continue
        loaded += 1
        with np.errstate(all="ignore"):
            assert sum(math.prod(array.shape) for _, array in weights if array.sum() is not None) * 4 == weights.num_bytes
    assert not [message for message in messages if "\n" in message]
    assert loaded > 0
    assert len(messages) > 20


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_a_file_that_is_gone_is_called_that(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path, "a link to one that is missing")


MEASURE = """
import sys
import numpy as np
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.model.llama import Llama

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

class Device:  # stands in for ops.cuda: what is uploaded is staged in a copy, and then not in the host's memory any more
    largest = 0

    def empty(self, shape, dtype):
        return np.broadcast_to(np.int8(0), shape)  # takes no memory here

    def upload(self, array, dtype=None):
        self.largest = max(self.largest, array.nbytes)
        array.copy()

    def write(self, target, array):
        assert target.shape == array.shape
        self.upload(array)

config, device = load_config(sys.argv[1]), Device()
weights = open_weights(sys.argv[1], config)
before = memory("VmRSS:")
Llama(config, weights, device, "bfloat16", max_positions=16)
print(weights.num_bytes, device.largest, memory("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of /proc/self/status")
def test_loading_a_model_peaks_at_the_largest_tensor_and_its_copy(tmp_path):
    hidden = 1024
    given = {
        **{"architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": hidden, "intermediate_size": 2 * hidden},
        **{"num_hidden_layers": 3, "num_attention_heads": 8, "tie_word_embeddings": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    save(tmp_path, {name: np.ones(shape, np.float32) for name, shape in expected_tensors(load_config(tmp_path)).items()})
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parent.parent
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    num_bytes, largest, peak = map(int, output.split())
    assert num_bytes > 100e6
    assert peak < 2 * largest + 8e6 < num_bytes / 4
