"""How fast weights come from the page cache to where a model computes: a checkpoint is written, loaded, and removed.

The limit is the way that every byte takes at least: a copy from pinned memory to the GPU, on the CPU a copy in memory.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import math
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import psutil

from cupaged.bench.limits import host_copy_limit, machine
from cupaged.checkpoint.config import ModelConfig, load_config
from cupaged.checkpoint.convert import write_safetensors
from cupaged.checkpoint.fetch import progress_bar, resolve
from cupaged.checkpoint.loading import Loading
from cupaged.checkpoint.weights import expected_tensors, open_weights
from cupaged.cuda import jit
from cupaged.engine.dtypes import choose_dtype
from cupaged.errors import CupagedError, InvalidArgument
from cupaged.llm import select_device
from cupaged.model.parameters import load

logger = logging.getLogger("cupaged")

SHARD_BYTES = 5 * 10**9  # at most, as the models of the hub have it
_RANDOM_VALUES = 1 << 25  # drawn once; every tensor is made of pieces of them


def bench_load(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    runs: int = 5,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Measure how fast a sharded bfloat16 checkpoint is loaded, and return a result file.

    Args:
        model: whose geometry is taken: a config.json, or a model as for `LLM`, of which nothing else is read.
        device, dtype: as for `LLM`; "auto" is bfloat16 on a GPU.
        runs: of which the median counts, after one that warms up.
        shard_bytes: of a file, at most, unless a single tensor is larger.
        report: gets each row once it is known.

    Returns:
        A result file whose limit is `limit_gb_s`. Rows: the load (s: from opening the files until the last array is where the
        model takes it from; gb_s: 10^9 bytes of the files a second; share of the limit), and the host's memory at its peak (gb:
        beyond what was there before and the mapped files; pinned memory counts in full; on the CPU the model itself is in it).

    A run finds no memory in CuPy's pools, as in a fresh process. The files lie in the system's folder for temporary files
    ($TMPDIR) and are removed whatever happens.

    Raises:
        InvalidArgument: a wrong argument, or too little room for the files.
        OutOfMemory: the device does not hold the model.
    """
    if runs < 1:
        raise InvalidArgument(f"runs is {runs}; give a number of at least 1")
    path = Path(model) if os.path.isfile(model) else resolve(model)
    config = load_config(path)
    ops, index = select_device(device)
    dtype = choose_dtype(dtype, "bfloat16", ops)
    device = "cpu" if index is None else f"cuda:{index}"
    size = re.search(r"(\d+)b$", path.stem)
    name = f"{size[1]}B" if size else path.stem
    seconds, memory = [], []
    with tempfile.TemporaryDirectory(prefix="cupaged-load-") as folder, ops.device(index or 0):
        num_bytes = _write_checkpoint(Path(folder), config, shard_bytes)
        for _ in range(runs + 1):
            each, peak = _measure(Path(folder), config, ops, dtype)
            seconds.append(each)
            memory.append(peak)
        limit = host_copy_limit(device)
    median = statistics.median(seconds[1:])
    speed = num_bytes / median
    rows = [
        {"case": f"{name} load", "s": median, "gb_s": speed / 1e9, "share": speed / limit},
        {"case": f"{name} load, host memory over the map", "gb": max(memory) / 1e9},
    ]
    for row in rows:
        report(row)
    return {
        "machine": machine(device, None),
        "limit_gb_s": limit / 1e9,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def _measure(folder: Path, config: ModelConfig, ops: ModuleType, dtype: str) -> tuple[float, int]:
    """Seconds of one load, and bytes of host memory that it took at its peak."""
    with _host_memory() as grown:
        started = time.perf_counter()
        parameters = load(config, Loading(open_weights(folder, config)), ops, dtype)
        ops.download(parameters.norm)  # waits for all that was queued before
        seconds = time.perf_counter() - started
    del parameters
    peak = max(grown)
    if ops.__name__ == "cupaged.ops.cuda":
        from cupaged.ops import staging

        peak += staging.most_pinned_bytes()  # which the system may or may not count as the process's
        cupy = jit.import_cupy()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
    return seconds, peak


@contextlib.contextmanager
def _host_memory() -> Iterator[list[int]]:
    """Bytes by which this process has grown, but for mapped files where the system tells them apart; looked at every 10 ms."""
    process, grown, stop = psutil.Process(), [0], threading.Event()

    def used() -> int:
        with contextlib.suppress(OSError, KeyError):  # Linux
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
        return process.memory_info().rss

    before = used()

    def watch() -> None:
        while not stop.wait(0.01):
            grown.append(used() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        stop.set()
        watcher.join()


def _write_checkpoint(folder: Path, config: ModelConfig, shard_bytes: int) -> int:
    """Write random bfloat16 weights for a geometry, in shards with their index; the bytes of all tensors."""
    shapes = expected_tensors(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    num_bytes = sum(sizes.values())
    free = shutil.disk_usage(folder).free
    needed = num_bytes + (64 << 20)
    if free < needed:
        lack = f"{folder.parent} has {free / 1e9:.1f} GB free and the checkpoint takes {needed / 1e9:.1f} GB"
        remedy = "set TMPDIR to a folder with room, or give a smaller --model"
        raise InvalidArgument(f"{lack}, {(needed - free) / 1e9:.1f} GB more; {remedy}")
    if psutil.virtual_memory().available < num_bytes:
        logger.warning("the free memory does not hold the checkpoint's %.1f GB: this measures the disk too", num_bytes / 1e9)
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        if not shards or sizes[name] > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= sizes[name]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    values = np.random.default_rng().standard_normal(_RANDOM_VALUES, np.float32) * np.float32(0.02)
    values = values.astype(ml_dtypes.bfloat16)
    try:
        with progress_bar("write", num_bytes) as bar:
            for file, held in zip(files, shards, strict=True):
                pieces = _pieces(values, held.values(), bar.update)
                write_safetensors(folder / file, held, pieces, "BF16", sync=False)
        weight_map = {name: file for file, held in zip(files, shards, strict=True) for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CupagedError(f"{folder.parent} is full; set TMPDIR to a folder with room, or give a smaller --model") from error
    return num_bytes


def _pieces(values: np.ndarray, shapes: Iterable[tuple[int, ...]], progress: Callable[[int], object]) -> Iterator[np.ndarray]:
    """The values of tensors of these shapes: pieces of those given, each from another place on."""
    rng = np.random.default_rng()
    for shape in shapes:
        left = math.prod(shape)
        while left:
            piece = values[rng.integers(values.size // 2) :][:left]
            yield piece
            progress(piece.nbytes)
            left -= piece.size
