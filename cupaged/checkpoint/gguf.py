"""A GGUF file (llama.cpp's format) -> metadata and tensors, memory-mapped and dequantised one at a time.

Layout, all little-endian: magic, version, number of tensors, number of metadata pairs; the pairs; a description of each
tensor; padding to `general.alignment`; the tensors' bytes. Source: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.errors import CheckpointError

# Metadata value types by number; 8 is a string and 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9

# Supported tensor types by number: name, weights a block, bytes a block.
_TENSOR_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
_OTHER_TENSOR_TYPES = (
    {2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
    | {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
    | {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file: `shape` in NumPy order, `type` its GGUF name, `data` its bytes in the mapped file."""

    shape: tuple[int, ...]
    type: str
    data: np.ndarray = field(repr=False)

    def dequantise(self) -> np.ndarray:
        """The weights as a new float32 array of `shape`."""
        if self.type in ("F32", "F16"):
            return self.data.view("<f4" if self.type == "F32" else "<f2").astype(np.float32).reshape(self.shape)
        if self.type == "Q8_0":  # a block: float16 d, int8 q[32]; w = q d
            blocks = self.data.reshape(-1, 34)
            weights = blocks[:, 2:].view("i1").astype(np.float32)
            weights *= blocks[:, :2].view("<f2").astype(np.float32)
        else:  # Q4_1, a block: float16 d, m, then 16 bytes with q[:16] in the low nibbles, q[16:] in the high; w = q d + m
            blocks = self.data.reshape(-1, 20)
            weights = np.empty((len(blocks), 32), np.float32)
            weights[:, :16] = blocks[:, 4:] & 15
            weights[:, 16:] = blocks[:, 4:] >> 4
            weights *= blocks[:, 0:2].view("<f2").astype(np.float32)
            weights += blocks[:, 2:4].view("<f2").astype(np.float32)
        return weights.reshape(self.shape)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of a GGUF file (version 2 or 3), both in file order; no tensor byte is read yet.

    Metadata values are bool, int, float, str, a list of str, or a NumPy array of numbers. Everything is checked against the
    file's size before anything is allocated. Raises CheckpointError where the file cannot be opened, is corrupt, or holds a
    tensor of a type other than F32, F16, Q4_1 and Q8_0.
    """
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"cannot open GGUF file {path} ({error}); check the path or fetch the file again") from error
    try:
        return _Parser(data).parse()
    except _Corrupt as error:
        raise CheckpointError(f"{path} is not a usable GGUF file: {error}; fetch it again") from error


class _Corrupt(Exception):
    pass


class _Parser:
    """A cursor over the file's bytes; every read is checked against their number."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self.take(4).tobytes() != b"GGUF":
            raise _Corrupt("it does not begin with the letters GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise _Corrupt(f"it is of version {version}, only 2 and 3 are supported")
        num_tensors, num_pairs = self.number("<Q"), self.number("<Q")
        self.expect_items(num_pairs, 13)  # the smallest pair: an empty key, a type, one byte
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        self.expect_items(num_tensors, 32)  # the smallest description: an empty name, one dimension
        descriptions = [self.description() for _ in range(num_tensors)]

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Corrupt(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset, num_bytes in descriptions:
            if offset % alignment or start + offset + num_bytes > len(self.data):
                raise _Corrupt(f"tensor {name!r} lies outside the file or is not aligned (a truncated download?)")
            if name in tensors:
                raise _Corrupt(f"tensor {name!r} is there twice")
            tensors[name] = GGUFTensor(shape, kind, self.data[start + offset : start + offset + num_bytes])
        return metadata, tensors

    def description(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self.string()
        num_dimensions = self.number("<I")
        if not 1 <= num_dimensions <= 4:
            raise _Corrupt(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(num_dimensions))[::-1]  # the file has the innermost first
        number = self.number("<I")
        if number not in _TENSOR_TYPES:
            kind = _OTHER_TENSOR_TYPES.get(number, f"number {number}")
            raise _Corrupt(f"tensor {name!r} is of type {kind}, only F32, F16, Q4_1 and Q8_0 are supported")
        kind, block, block_bytes = _TENSOR_TYPES[number]
        if 0 in shape or shape[-1] % block:
            raise _Corrupt(f"tensor {name!r} of type {kind} has the shape {shape}, not whole blocks of {block}")
        return name, shape, kind, self.number("<Q"), math.prod(shape) // block * block_bytes

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(np.dtype(_SCALARS[kind]).itemsize).view(_SCALARS[kind])[0].item()
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Corrupt(f"a metadata value is of the unknown type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            return self.take(count * np.dtype(_SCALARS[kind]).itemsize).view(_SCALARS[kind])
        if kind != _STRING:
            raise _Corrupt(f"a metadata array holds values of the unsupported type {kind}")
        self.expect_items(count, 8)
        return [self.string() for _ in range(count)]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).tobytes().decode()
        except UnicodeDecodeError as error:
            raise _Corrupt(f"a string is not UTF-8 at byte {self.position}") from error

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def expect_items(self, count: int, min_bytes: int) -> None:
        if count * min_bytes > len(self.data) - self.position:
            raise _Corrupt(f"{count} items are announced at byte {self.position} of {len(self.data)}")

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes, uncopied."""
        if count > len(self.data) - self.position:
            raise _Corrupt(f"{count} bytes are announced at byte {self.position} of {len(self.data)} (a truncated download?)")
        self.position += count
        return self.data[self.position - count : self.position]
