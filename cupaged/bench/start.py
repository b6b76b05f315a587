"""From the start of a process to the first token of a model with random weights: with no compiled kernel, and with all.

Making the weights, and quantising them if asked for, is no part of that, for a real start loads them instead; but what else is
done meanwhile is. So a process notes when it made them, and what is taken off is the time in which no kernel was being compiled
beside.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cupaged.bench import child
from cupaged.bench.limits import machine, read_limit
from cupaged.bench.results import card, model_name
from cupaged.errors import InvalidArgument


def bench_start(
    model: str, *, device: str, runs: int = 3, report: Callable[[dict], None] = lambda row: None, **arguments: Any
) -> dict:
    """Start fresh processes with an empty kernel cache each, then with the cache that the last of those left.

    Args:
        model: a config.json, or what else LLM takes.
        device: "cpu" or "cuda:N".
        runs: processes of both kinds, of which the one of median time is reported.
        arguments: further ones of `LLM`.
        report: gets each row once it is known.

    Returns:
        A result file of two rows: s, from process start to first token without making the weights; weights_s, what that took.
        The caches are temporary folders: nothing of the user's is emptied.
    """
    if runs < 1:
        raise InvalidArgument(f"runs is {runs}; give at least 1")
    threads = arguments.get("threads")
    given = {name: arguments.get(name) or "auto" for name in ("dtype", "kv_cache_dtype", "quantization")}
    end = "".join(f" {name}={value}" for name, value in given.items() if value != "auto")
    question, machine_name, rows = {"model": model, "device": device, **arguments}, machine(device, threads), []

    def measured(folder: str) -> dict:
        # Also the driver, where it compiles, keeps what it made.
        environment = {**os.environ, "CUPY_CACHE_DIR": folder, "CUDA_CACHE_PATH": folder}
        seconds, weights_s = child.ask("cupaged.bench.start", question, environment)
        return {"s": seconds - weights_s, "weights_s": weights_s}

    def add(case: str, starts: list[dict]) -> None:
        median = sorted(starts, key=lambda start: start["s"])[len(starts) // 2]
        rows.append({"case": f"{model_name(Path(model))} start {case}{end}{card(machine_name)}", **median})
        report(rows[-1])

    folders = [tempfile.TemporaryDirectory(prefix="cupaged-") for _ in range(runs)]
    try:
        add("cold", [measured(folder.name) for folder in folders])
        add("warm", [measured(folders[-1].name) for _ in range(runs)])
    finally:
        for folder in folders:
            folder.cleanup()
    return {
        "machine": machine_name,
        "limit_tbps": read_limit(device, 2**28, threads) / 1e12,
        "limit_tflops": None,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def first_token(model: str, **arguments: Any) -> float:
    """Generate one token; returns the seconds in which weights were made and no kernel was compiled."""
    from cupaged import SamplingParams
    from cupaged import llm as front

    make, times = front.Llama, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        llama = make(*args, **kwargs)
        llama.ops.download(llama.rope_table[:1])  # waits until the device has made them
        times.extend([began, time.time()])
        return llama

    front.Llama = timed
    llm = front.LLM(model, load_format="dummy", max_num_seqs=1, **arguments)
    began, ended = times
    made = time.time()
    llm.generate({"prompt_token_ids": list(range(32))}, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    kernels = [path.stat().st_mtime for path in Path(os.environ["CUPY_CACHE_DIR"]).glob("*.cubin")]
    compiling = max([moment for moment in kernels if moment <= made], default=began)
    return max(0.0, ended - max(began, compiling))


if __name__ == "__main__":
    sys.exit(child.answer(first_token))
