"""The GGUF reader: what it returns, and that no file makes it crash or allocate without measure."""

import struct
import tracemalloc

import numpy as np
import pytest
from tiny_gguf import string, write_gguf

from cupaged.checkpoint.gguf import read_gguf
from cupaged.errors import CheckpointError

METADATA = {"general.architecture": "llama", "count": 7, "eps": 0.5, "flag": True, "tokens": ["a", "é", ""], "types": [1, -3]}
PREFIX = b"GGUF" + struct.pack("<I", 3)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


def weights(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_metadata_values(file):
    write_gguf(file, METADATA, {"w": ("F32", weights(2))})
    metadata, _ = read_gguf(file)
    assert list(metadata) == list(METADATA)
    assert metadata["types"].tolist() == [1, -3]
    assert {key: value for key, value in metadata.items() if key != "types"} == {
        k: v for k, v in METADATA.items() if k != "types"
    }
    assert metadata["flag"] is True


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 3, 32)])
def test_dequantised_weights(file, kind, shape):
    original = weights(*shape)
    meant = write_gguf(file, METADATA, {"first": ("F16", weights(5)), "w": (kind, original)})
    _, tensors = read_gguf(file)
    assert list(tensors) == ["first", "w"]
    found = tensors["w"].dequantise()
    assert (tensors["w"].type, tensors["w"].shape, found.shape, found.dtype) == (kind, shape, shape, np.float32)
    np.testing.assert_array_equal(found, meant["w"])
    assert np.abs(found - original).max() <= {"F32": 0, "F16": 1e-2, "Q4_1": 0.3, "Q8_0": 0.03}[kind]


def test_tensors_are_read_when_asked_for(file):
    write_gguf(file, METADATA, {"w": ("F32", weights(1 << 20))})
    tracemalloc.start()
    _, tensors = read_gguf(file)
    opened = tracemalloc.get_traced_memory()[1]
    tensors["w"].dequantise()
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 1 << 17
    assert used >= 4 << 20


def descriptor(*dimensions, kind=0, offset=0, name="w"):
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot open"),
        (b"GG", "truncated"),
        (b"NOPE" + bytes(100), "letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (PREFIX + struct.pack("<QQ", 0, 1 << 62), "items are announced"),
        (PREFIX + struct.pack("<QQ", 1 << 62, 0), "items are announced"),
        (PREFIX + struct.pack("<QQQ", 0, 1, 1 << 63) + bytes(99), "bytes are announced"),
        (PREFIX + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 61), "bytes are announced"),
        (PREFIX + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 61), "items are announced"),
        (PREFIX + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQI", 9, 9, 1, 9), "unsupported type 9"),
        (PREFIX + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IQ", 99, 0), "unknown type 99"),
        (PREFIX + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IQ", 4, 0), "UTF-8"),
        (PREFIX + struct.pack("<QQ", 0, 1) + string("general.alignment") + struct.pack("<II", 4, 24), "power of two"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(8), "outside the file"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(1 << 62, 1 << 62, 1 << 62), "outside the file"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(1, offset=1 << 63) + bytes(99), "outside the file"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(1, offset=1) + bytes(99), "not aligned"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(0, 4), "shape"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(*[1] * 9), "9 dimensions"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(33, kind=8) + bytes(99), "blocks of 32"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(256, kind=12) + bytes(999), "Q4_K"),
        (PREFIX + struct.pack("<QQ", 1, 0) + descriptor(256, kind=77) + bytes(999), "number 77"),
        (PREFIX + struct.pack("<QQ", 2, 0) + descriptor(1) + descriptor(1) + bytes(99), "twice"),
    ],
)
def test_corrupt_files_are_refused(file, content, words):
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot open"):
        read_gguf(tmp_path / "none.gguf")


def test_every_truncation_is_refused(file):
    write_gguf(file, METADATA, {"w": ("Q8_0", weights(2, 32))})
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(file)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutated scale may be infinite
def test_mutations_are_read_or_refused(file):
    write_gguf(file, METADATA, {"w": ("Q8_0", weights(2, 32)), "v": ("Q4_1", weights(64))})
    content = file.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1000):
        mutated = bytearray(content)
        for position in rng.integers(len(content), size=rng.integers(1, 4)):
            mutated[position] = rng.integers(256)
        file.write_bytes(mutated)
        try:
            for tensor in read_gguf(file)[1].values():
                assert tensor.dequantise().shape == tensor.shape
        except CheckpointError:
            refused += 1
    assert 0 < refused < 1000
