"""Writes GGUF files, by the format's specification and one weight at a time: what the reader is held to."""

import struct

import numpy as np

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}


def quantise(kind: str, weights: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The bytes of `weights` in a GGUF type, and the float32 weights that these bytes mean."""
    if kind in ("F32", "F16"):
        stored = weights.astype("<f4" if kind == "F32" else "<f2")
        return stored.tobytes(), stored.astype(np.float32)
    data, meant = b"", []
    for block in weights.reshape(-1, 32):
        low, high = float(block.min()), float(block.max())
        if kind == "Q8_0":
            scale = np.float16(max(abs(low), abs(high)) / 127)
            levels = [round(float(w / np.float32(scale))) for w in block]
            levels = [max(-127, min(127, level)) for level in levels]
            data += struct.pack("<e32b", scale, *levels)
            meant += [np.float32(scale) * np.float32(level) for level in levels]
        else:
            scale, minimum = np.float16((high - low) / 15), np.float16(low)
            levels = [max(0, min(15, round(float((w - minimum) / scale)))) for w in block]
            data += struct.pack("<ee16B", scale, minimum, *(levels[i] | levels[i + 16] << 4 for i in range(16)))
            meant += [np.float32(scale) * np.float32(level) + np.float32(minimum) for level in levels]
    return data, np.array(meant, np.float32).reshape(weights.shape)


def write_gguf(path, metadata: dict, tensors: dict) -> dict[str, np.ndarray]:
    """Write metadata and `tensors` {name: (type, float32 weights)}; returns the weights as the file means them."""
    head, body, meant = b"", b"", {}
    for key, value in metadata.items():
        head += string(key) + typed(value)
    for name, (kind, weights) in tensors.items():
        data, meant[name] = quantise(kind, weights)
        body += b"\0" * (-len(body) % 32)
        head += string(name) + struct.pack("<I", weights.ndim) + struct.pack(f"<{weights.ndim}Q", *weights.shape[::-1])
        head += struct.pack("<IQ", TYPE_NUMBERS[kind], len(body))
        body += data
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + head
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return meant


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value) -> bytes:
    """A metadata value behind the number of its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
