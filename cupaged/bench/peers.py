"""What others take for the same decode step: transformers, with its eager attention and the cache that grows by copies.

It runs in a process of its own, because it needs the GPU's memory for itself, and is no dependency: it is measured where torch
and transformers can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cupaged.bench import child
from cupaged.errors import InvalidArgument


def check() -> None:
    """InvalidArgument unless there is what to measure."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise InvalidArgument("--peers measures transformers, which is not installed; pip install torch transformers")


def transformers_steps(
    model: Path, cases: Sequence[tuple[int, int]], device: str, dtype: str, tokens: int, threads: int | None = None
) -> list[dict[str, float]]:
    """Of each case (sequences, tokens of each) the median milliseconds of a step, by the peer's name; {} where it has no room.

    Args:
        model: a config.json, or the folder that it is in.
        device, dtype: "cpu" or "cuda:N", and what to compute in.
        tokens: steps that are measured of each case.
        threads: of the CPU; default: what torch takes.
    """
    path = model / "config.json" if model.is_dir() else model
    question = {"path": str(path), "cases": list(cases), "device": device, "dtype": dtype, "tokens": tokens}
    question["threads"] = threads
    return child.ask("cupaged.bench.peers", question)[1]


def measure(
    path: str, cases: list[list[int]], device: str, dtype: str, tokens: int, threads: int | None
) -> list[dict[str, float]]:
    """Random weights and a random cache of the geometry, then one token of every sequence at a time."""
    import torch
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device), torch.inference_mode():
        model = (
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(getattr(torch, dtype))
        )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        results = []
        for batch, context in cases:
            try:
                cache = transformers.DynamicCache()
                for layer in range(config.num_hidden_layers):
                    shape = (batch, config.num_key_value_heads, context, head_dim)
                    cache.update(torch.randn(shape), torch.randn(shape), layer)
                ids, times = torch.zeros((batch, 1), dtype=torch.long), []
                for _ in range(3 + tokens):
                    start = time.perf_counter()
                    ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                    ids.cpu()  # waits for it, as a loop that looks for the end has to
                    times.append(1e3 * (time.perf_counter() - start))
                results.append({f"transformers {transformers.__version__} eager": statistics.median(times[3:])})
            except torch.OutOfMemoryError:
                results.append({})
            cache = None
            if device != "cpu":
                torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    sys.exit(child.answer(measure))
