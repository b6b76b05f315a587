"""What `cupaged bench` does with its arguments; `write` puts text on stdout."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cupaged.bench.capacity import bench_capacity
from cupaged.bench.decode import bench_decode
from cupaged.bench.generate import bench_generate
from cupaged.bench.limits import machine
from cupaged.bench.load import bench_load
from cupaged.bench.plots import check, draw
from cupaged.bench.results import earlier, format_row, read_result, save, usual_name
from cupaged.bench.serving import HEADER, Lengths, bench_policy, bench_serving
from cupaged.bench.serving import format_row as format_requests
from cupaged.bench.start import bench_start
from cupaged.errors import InvalidArgument
from cupaged.llm import LLM, select_device

Write = Callable[[str], None]


def generate(args: argparse.Namespace, write: Write) -> None:
    """`bench generate`: one request; with --batch and --context steps of many sequences; of random weights the start alone."""
    _check_outputs(args)
    given = {name: getattr(args, name) for name in ("runs", "prompt_tokens") if getattr(args, name) is not None}
    if args.batch is not None or args.context is not None:
        if given:
            raise InvalidArgument("--runs and --prompt-tokens have no place beside --batch and --context; leave them out")
        _decode(args, write)
        return
    if args.peers or args.serve or args.cache != "paged":
        raise InvalidArgument("--cache, --peers and --serve are for many sequences; give --batch and --context too")
    if args.load_format == "dummy":
        _start(args, given, write)
        return
    result = bench_generate(
        model=args.model,
        **_arguments(args),
        **given,
        tokens=args.tokens,
        report=lambda row: write(format_row(row) + "\n"),
    )
    _keep(args, result, "generate")


def _decode(args: argparse.Namespace, write: Write) -> None:
    if args.plot is not None:
        raise InvalidArgument("--plot has no picture of --batch and --context; leave it out")
    _check_earlier(args)
    result = bench_decode(
        args.model,
        args.batch or [1],
        args.context or [512],
        **_arguments(args),
        load_format=args.load_format,
        tokens=args.tokens,
        cache=args.cache,
        peers=args.peers,
        serve=args.serve,
        report=lambda row: write(format_row(row) + "\n"),
    )
    _keep(args, result, "decode")


def _start(args: argparse.Namespace, given: dict[str, int], write: Write) -> None:
    if args.plot is not None or "prompt_tokens" in given:
        cause = "of random weights without --batch and --context only the start is measured"
        raise InvalidArgument(f"{cause}; leave --plot and --prompt-tokens out, or give those")
    _check_earlier(args)
    result = bench_start(args.model, **_arguments(args), **given, report=lambda row: write(format_row(row) + "\n"))
    _keep(args, result, "decode")


def capacity(args: argparse.Namespace, write: Write) -> None:
    """`bench capacity`: the same requests over reserved slots and over pages."""
    _check_outputs(args)
    _check_earlier(args)
    result = bench_capacity(
        args.model,
        **_arguments(args),
        load_format=args.load_format,
        kv_memory=args.kv_memory,
        max_model_len=args.max_model_len,
        num_requests=args.requests,
        tokens=args.tokens,
        report=lambda row: write(format_row(row) + "\n"),
    )
    _keep(args, result, "decode")


_WAITING = 0, 64  # sequences that a full pool keeps out, in the measurements of policy alone


def serving(args: argparse.Namespace, write: Write) -> None:
    """`bench serving`: many requests at once."""
    _check_outputs(args)
    lengths = Lengths(args.prompt_tokens, args.tokens, args.spread)
    if args.policy_only:
        for num_waiting in _WAITING:
            write(format_requests(bench_policy(num_waiting=num_waiting)) + "\n")
        return
    llm = LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        kv_memory=args.kv_memory,
        threads=args.threads,
        block_size=args.block_size,
        max_model_len=lengths.longest,
        max_num_seqs=args.max_num_seqs or max([*args.concurrency, *([256] if args.rate else [])], default=1),
        max_num_batched_tokens=args.max_num_batched_tokens,
        load_format=args.load_format,
    )
    policy = [bench_policy(num_waiting=num_waiting) for num_waiting in _WAITING]
    write("".join(f"{format_requests(row)}\n" for row in policy) + f"{HEADER}\n")
    result = bench_serving(
        llm,
        args.concurrency,
        args.rate,
        args.requests,
        lengths,
        args.threads,
        report=lambda row: write(format_requests(row) + "\n"),
    )
    result["rows"][:0] = policy
    _keep(args, result, "serving")


def load(args: argparse.Namespace, write: Write) -> None:
    """`bench load`: a checkpoint from the page cache to the device."""
    _check_outputs(args)
    model = args.model
    if model is None:
        model = str(Path(__file__).resolve().parents[2] / "scripts" / "configs" / "llama-2-7b.json")
        if not os.path.isfile(model):
            raise InvalidArgument("the geometry of Llama 2 7B is in no checkout here; give a config.json as --model")
    result = bench_load(
        model, device=args.device, dtype=args.dtype, runs=args.runs, report=lambda row: write(format_row(row) + "\n")
    )
    _keep(args, result, "load")


def plot(args: argparse.Namespace, write: Write) -> None:
    """`bench plot`: pictures of result files."""
    for path, result in [(path, read_result(path)) for path in args.results]:  # all are read before one is drawn
        write(f"{draw(result, path)}\n")


def _check_outputs(args: argparse.Namespace) -> None:
    """What could not be written after minutes of measuring is refused now."""
    if args.output is not None and not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
        raise InvalidArgument(f"--output is {args.output}, in no folder that exists; create it first")
    if getattr(args, "plot", None) is not None:
        check(_plot_folder(args))


def _check_earlier(args: argparse.Namespace) -> None:
    """Settle which device --device means, and refuse a file that rows of this machine cannot be added to."""
    _, index = select_device(args.device)
    args.device = "cpu" if index is None else f"cuda:{index}"
    if args.output is not None:
        earlier(args.output, machine(args.device, args.threads), "decode")


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `LLM` takes of the options that all measurements have."""
    names = ("device", "dtype", "kv_cache_dtype", "threads", "quantization")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _plot_folder(args: argparse.Namespace) -> str:
    if args.plot or args.output is None:
        return args.plot or "."
    return args.output if os.path.isdir(args.output) else os.path.dirname(args.output) or "."


def _keep(args: argparse.Namespace, result: dict, what: str) -> None:
    """Write what a bench found to where --output and --plot say."""
    if args.output is not None:
        print(f"cupaged: wrote {save(result, args.output, what)}", file=sys.stderr)
    if getattr(args, "plot", None) is not None:
        picture = draw(result, os.path.join(_plot_folder(args), usual_name(result["machine"], what)))
        print(f"cupaged: wrote {picture}", file=sys.stderr)
