"""What a model is, and how long a context fits on the devices of this machine; no weight is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType, SimpleNamespace

from cupaged.checkpoint.config import ModelConfig, load_config
from cupaged.checkpoint.fetch import resolve
from cupaged.checkpoint.weights import expected_tensors, open_weights
from cupaged.engine.dtypes import choose_dtype, choose_kv_dtype, kv_bytes_per_token
from cupaged.engine.kv_pool import activation_bytes, blocks_that_fit
from cupaged.errors import DeviceError, InvalidArgument, OutOfMemory
from cupaged.llm import GPU_STEP_TOKENS
from cupaged.model.parameters import check_quantization, device_bytes, unquantised_bytes
from cupaged.ops.quantized import check_kind

_BLOCK_SIZE = 16


def describe(model: str, dtype: str = "auto", kv_cache_dtype: str = "auto", quantization: str | None = None) -> dict:
    """Geometry (the fields of ModelConfig), parameters, weights_bytes and weights_dtype on disk, and `devices`.

    A device that can run the model has the keys device, dtype, kv_cache_dtype, quantization, free_bytes, weights_bytes (there),
    kv_bytes_per_token, and context: the tokens that its KV pool would hold by default beside the weights, at most what the
    model was made for. Another has device and error. Types as for LLM: "auto" gives each device its own; one that does not
    know them is left out.
    """
    if quantization is not None:
        check_kind(quantization)
    folder = resolve(model)
    config = load_config(folder)
    check_quantization(config, quantization)
    weights = open_weights(folder, config)
    parameters = sum(math.prod(shape) for shape in expected_tensors(config).values())
    devices, refusals = [], []
    for device, ops in _devices():
        if isinstance(ops, str):
            devices.append({"device": device, "error": ops})
            continue
        try:
            chosen = choose_dtype(dtype, weights.dtype, ops)
            kv_dtype = choose_kv_dtype(kv_cache_dtype, chosen, ops)
        except InvalidArgument as error:
            refusals.append(InvalidArgument(f"{device}: {error}"))
            continue
        types = {"dtype": chosen, "kv_cache_dtype": kv_dtype, "quantization": quantization}
        devices.append({"device": device, **types, **_fit(config, chosen, kv_dtype, quantization, ops)})
    if refusals and all("error" in device for device in devices):
        raise refusals[-1]
    geometry = {key: value for key, value in asdict(config).items() if key != "dtype"}
    sizes = {"parameters": parameters, "weights_bytes": weights.num_bytes, "weights_dtype": weights.dtype}
    return {"model": str(folder), **geometry, **sizes, "devices": devices}


def _devices() -> Iterator[tuple[str, ModuleType | str]]:
    """The operations of the CPU and of each GPU (entered while it is looked at), or why the first GPU cannot be used."""
    from cupaged.ops import numpy as cpu

    yield "cpu", cpu
    from cupaged.cuda import jit

    if not jit.has_driver():
        return
    for index in itertools.count():
        try:
            jit.check_device(index)
        except DeviceError as error:
            if index == 0:
                yield "cuda", str(error)
            return
        from cupaged.ops import cuda

        with cuda.device(index):
            yield f"cuda:{index}", cuda


def _fit(config: ModelConfig, dtype: str, kv_dtype: str, quantization: str | None, ops: ModuleType) -> dict:
    free, total = ops.free_memory()
    weights_bytes = device_bytes(config, dtype, quantization)
    loaded = SimpleNamespace(DTYPES=ops.DTYPES, free_memory=lambda: (free - weights_bytes, total))
    longest = config.max_position_embeddings
    try:
        reserved = activation_bytes(config, GPU_STEP_TOKENS, 1) + unquantised_bytes(config, dtype, quantization)
        blocks = blocks_that_fit(loaded, config, kv_dtype, _BLOCK_SIZE, longest, None, 0.9, reserved)
    except OutOfMemory:
        blocks = 1  # the one that the pool keeps for itself
    return {
        "free_bytes": free,
        "weights_bytes": weights_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(config, kv_dtype),
        "context": min((blocks - 1) * _BLOCK_SIZE, longest),
    }


def as_text(facts: dict) -> str:
    """What `describe` returns, as a table to read."""
    windows = sorted({window for window in facts["sliding_windows"] if window is not None})
    rope = facts["rope"]
    scaled = "" if rope["type"] == "default" else f", scaled: {rope['type']} by {rope['factor']:g}"
    rows = [
        ("model", f"{facts['architecture']} in {facts['model']}"),
        ("layers", f"{facts['num_layers']}, {facts['hidden_size']} wide, FFN {facts['intermediate_size']}"),
        ("attention", f"{facts['num_heads']} heads of {facts['head_dim']}, {facts['num_kv_heads']} of them for K and V"),
        ("sliding window", " and ".join(map(str, windows)) + " tokens" if windows else "none"),
        ("context", f"{facts['max_position_embeddings']} tokens (RoPE theta {rope['theta']:g}{scaled})"),
        ("vocabulary", f"{facts['vocab_size']}{', output tied to input' if facts['tie_word_embeddings'] else ''}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", f"{format_bytes(facts['weights_bytes'])} in {facts['weights_dtype']}"),
    ]
    table = [("device", "dtype", "weights as", "KV dtype", "free", "weights", "KV a token", "context that fits")]
    for device in facts["devices"]:
        if "error" not in device:
            sizes = [format_bytes(device[key]) for key in ("free_bytes", "weights_bytes", "kv_bytes_per_token")]
            whole = " (whole)" if device["context"] == facts["max_position_embeddings"] else ""
            types = (device["dtype"], device["quantization"] or device["dtype"], device["kv_cache_dtype"])
            table.append((device["device"], *types, *sizes, f"{device['context']} tokens{whole}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{name:16}{value}" for name, value in rows]
    lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)]
    return "\n".join(lines + [f"{d['device']:{widths[0]}}  {d['error']}" for d in facts["devices"] if "error" in d])


def format_bytes(count: float) -> str:
    """Bytes in decimal units with three digits: 538 MB, 1.24 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
