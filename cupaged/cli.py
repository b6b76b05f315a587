"""The command line: arguments in, text out. Answers go to stdout and everything else to stderr.

Exit codes: 0 done, 1 failed, 2 an option, a file or a prompt that cannot be used as given, 130 interrupted (Ctrl-C).
An error is one line on stderr, "cupaged: " and what is wrong; -vv adds the traceback. A reader that closes the
pipe (`| head`) ends the program quietly, with 0. Whatever costs time is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cupaged.arguments import SAMPLING, build_parser, whole_command
from cupaged.errors import CupagedError, InvalidArgument

if TYPE_CHECKING:
    from cupaged.engine.outputs import RequestOutput
    from cupaged.llm import LLM
    from cupaged.model.sampling import SamplingParams

logger = logging.getLogger("cupaged")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    args = None
    try:
        _prepare_streams()
        try:
            args = build_parser(_COMMANDS).parse_args(whole_command(sys.argv[1:] if argv is None else argv))
        except SystemExit:  # argparse has printed the help or the version
            write("")
            return 0
        with _logging_to_stderr(args):
            args.run(args)
        write("")
        return 0
    except KeyboardInterrupt:
        print(file=sys.stdout if sys.stdout.isatty() else sys.stderr)  # leave the line that was begun
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 0
    except Exception as error:
        if getattr(args, "verbose", 0) >= 2:
            traceback.print_exc()
        print(f"cupaged: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, CupagedError):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory{text and f' ({text})'}; use a smaller model, --max-model-len or --kv-memory"
    if isinstance(error, OSError):
        return text
    return f"internal error: {type(error).__name__}: {text}; run with -vv for the traceback"


def _prepare_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; print() would fail or go to the other stream
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's StringIO has no encoding to fail
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _logging_to_stderr(args: argparse.Namespace) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("cupaged: %(message)s"))
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        logger.setLevel(logging.NOTSET)


def write(text: str) -> None:
    """Put text, and what waits in the buffer, on stdout now.

    Raises BrokenPipeError when nobody reads it any more, and an OSError that names stdout for any other failure.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _abandon_stdout()
        if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows calls a closed pipe EINVAL
            raise BrokenPipeError from error
        raise OSError(f"cannot write to stdout: {error.strerror}") from error


def _abandon_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


# ---- the commands


def _generate(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    if args.raw and args.system is not None:
        raise InvalidArgument("--system has no place in a raw prompt; leave out --raw or write the message into the prompt")
    prompt, system = _prompt(args), _text(args.system, "--system")
    llm = _load(args)
    params = _params(llm, sampling)
    if not args.raw and llm.tokenizer.chat_template is None and (args.chat or system is not None):
        raise InvalidArgument(f"{llm.path.name} has no chat template; use --raw, without --system")
    if not args.raw and llm.tokenizer.chat_template is not None:
        messages = [] if system is None else [{"role": "system", "content": system}]
        prompt = {"prompt_token_ids": llm.tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])}

    streaming = sys.stdout.isatty() if args.stream is None else args.stream
    streaming = streaming and not args.json
    with contextlib.closing(llm.stream(prompt, params)) as stream:
        for delta in stream:
            if streaming:
                write(delta)
        output = stream.output
    if args.json:
        write(json.dumps(_as_json(llm, output, params.seed)) + "\n")
    else:
        write("\n" if streaming else output.outputs[0].text + "\n")
    if args.stats:
        print(_stats_table(llm, output), file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    from cupaged.chat.conversation import chat

    sampling = _sampling(args)
    system = _text(args.system, "--system")
    llm = _load(args)
    chat(llm, _params(llm, sampling), write, system=system, stats=args.stats, plain=args.plain)


def _batch(args: argparse.Namespace) -> None:
    from cupaged.batch import run_batch
    from cupaged.checkpoint.fetch import resolve

    if args.max_num_seqs < 1:
        raise InvalidArgument(f"--max-num-seqs is {args.max_num_seqs}; give a whole number of at least 1")
    summary = run_batch(
        _text(args.input, "IN.jsonl"),
        _text(args.output, "OUT.jsonl"),
        model=str(resolve(args.model).resolve()),
        load=lambda: _load(args, args.max_num_seqs),
        max_running=2 * args.max_num_seqs,  # so that the next ones are ready when some finish
    )
    done = f", {summary.done_before} of them from an earlier run" if summary.done_before else ""
    answered = summary.total - summary.failed
    logger.warning("wrote %s: %d answers and %d errors%s", args.output, answered, summary.failed, done)


def _serve(args: argparse.Namespace) -> None:
    from cupaged.engine.kv_pool import parse_bytes

    try:
        from cupaged.server.app import ServerOptions
        from cupaged.server.process import listen, serve
    except ImportError as error:
        raise CupagedError(f"`serve` needs {error.name}, which is not installed; pip install 'cupaged[serve]'") from error
    if args.max_num_seqs < 1:
        raise InvalidArgument(f"--max-num-seqs is {args.max_num_seqs}; give a whole number of at least 1")
    name, key = _text(args.served_model_name, "--served-model-name"), _text(args.api_key, "--api-key")
    options = ServerOptions(
        name=name or os.path.basename(args.model.rstrip("/\\")),
        api_key=os.environ.get("CUPAGED_API_KEY") or None if key is None else key,
        max_requests=args.max_requests,
        max_body_bytes=parse_bytes(args.max_body, "--max-body"),
        timeout=args.timeout,
        grace=args.grace,
        allowed_origins=tuple(args.allow_origin or ()),
    )
    with contextlib.closing(listen(args.host, args.port)) as bound:
        serve(_load(args, args.max_num_seqs), bound, options, access_log=args.verbose > 0)


def _fetch(args: argparse.Namespace) -> None:
    from cupaged.checkpoint.fetch import resolve

    write(f"{resolve(args.model)}\n")


def _info(args: argparse.Namespace) -> None:
    from cupaged.info import as_text, describe

    facts = describe(args.model, args.dtype, args.kv_cache_dtype, args.quantization)
    write((json.dumps(facts) if args.json else as_text(facts)) + "\n")


def _bench(name: str) -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        from cupaged.bench import commands

        getattr(commands, name)(args, write)

    return run


_COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "batch": _batch,
    "serve": _serve,
    "fetch": _fetch,
    "info": _info,
    "bench generate": _bench("generate"),
    "bench serving": _bench("serving"),
    "bench load": _bench("load"),
    "bench plot": _bench("plot"),
}


# ---- from arguments to objects


def _sampling(args: argparse.Namespace) -> dict[str, object]:
    """The sampling options that were given, checked before a model is fetched or loaded for them."""
    from cupaged import SamplingParams

    for stop in args.stop or ():
        _text(stop, "--stop")
    given = {name: getattr(args, name) for name in (*SAMPLING, "stop") if getattr(args, name) is not None}
    SamplingParams(**given)
    return given


def _params(llm: LLM, sampling: dict[str, object]) -> SamplingParams:
    params = llm.default_sampling_params(**sampling)
    if params.temperature != 0 and params.seed is None:  # each run another, but one that can be asked for again
        params = llm.default_sampling_params(**sampling, seed=secrets.randbits(32))
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p", "seed") if name in sampling]
    if params.temperature == 0 and idle:
        logger.warning("%s: no effect at temperature 0, where nothing is drawn; give --temperature", ", ".join(idle))
    return params


def _load(args: argparse.Namespace, max_num_seqs: int = 1) -> LLM:
    from cupaged import LLM

    return LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        threads=args.threads,
        max_model_len=args.max_model_len,
        kv_memory=args.kv_memory,
        block_size=args.block_size,
        max_num_seqs=max_num_seqs,
    )


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        prompt = _text(args.prompt, "--prompt")
    elif args.prompt_file not in (None, "-"):
        try:
            with open(args.prompt_file, encoding="utf-8-sig") as file:
                prompt = file.read()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{args.prompt_file} is not UTF-8 text ({error}); convert it to UTF-8") from error
        except OSError as error:
            raise InvalidArgument(
                f"cannot read {args.prompt_file}: {error.strerror}; give a text file that is readable"
            ) from error
    else:
        if args.prompt_file is None and sys.stdin.isatty():
            raise InvalidArgument("no prompt; give --prompt TEXT, --prompt-file FILE, or text on stdin")
        try:
            with contextlib.suppress(AttributeError):
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"stdin is not UTF-8 text ({error}); convert it to UTF-8") from error
    if args.prompt is None:
        prompt = prompt.removesuffix("\n")
    if not prompt.strip():
        raise InvalidArgument("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on stdin")
    return prompt


def _text(value: str | None, option: str) -> str | None:
    """The value, refused where the command line held bytes that are no text (Python keeps them as lone surrogates)."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{option} is not valid text in this locale's encoding; give it as UTF-8") from error
    return value


# ---- from objects to text


def _as_json(llm: LLM, output: RequestOutput, seed: int | None = None) -> dict[str, object]:
    answer, metrics, pool = output.outputs[0], output.metrics, llm.pool_stats()
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": metrics.num_prompt_tokens,
        "finish_reason": answer.finish_reason,
        "seed": seed,
        "model": str(llm.path),
        "device": llm.device,
        "dtype": llm.dtype,
        "kv_cache_dtype": llm.kv_cache_dtype,
        "quantization": llm.quantization,
        "stats": {
            "load_s": llm.load_seconds,
            "weights_bytes": llm.load_stats.num_bytes,
            "weights_s": llm.load_stats.seconds,
            "weights_gb_s": llm.load_stats.gb_s,
            "time_to_first_token_s": _finite(metrics.time_to_first_token),
            "prefill_tok_s": _finite(metrics.prefill_tok_s),
            "decode_tok_s": _finite(metrics.decode_tok_s),
            "cached_tokens": metrics.num_cached_tokens,
            "generated_tokens": metrics.num_generated_tokens,
            "kv_blocks": pool.num_blocks,
            "kv_blocks_peak": pool.peak_used_blocks,
            "kv_block_size": pool.block_size,
            "kv_bytes": pool.bytes,
        },
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN: what was not measured is null."""
    return value if value is not None and math.isfinite(value) else None


def _stats_table(llm: LLM, output: RequestOutput) -> str:
    from cupaged.info import format_bytes

    stats = _as_json(llm, output)["stats"]

    def speed(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} tok/s"

    first = stats["time_to_first_token_s"]
    rows = [
        ("model", llm.path.name, f"{llm.precision} on {llm.device}"),
        ("load", f"{stats['load_s']:.2f} s", ""),
        (
            "weights",
            f"{stats['weights_gb_s']:.1f} GB/s",
            f"{format_bytes(stats['weights_bytes'])} in {stats['weights_s']:.2f} s",
        ),
        ("first token", "-" if first is None else f"{first:.2f} s", "after the prompt was given"),
        ("prefill", speed(stats["prefill_tok_s"]), f"{output.metrics.num_prompt_tokens} prompt tokens"),
        ("decode", speed(stats["decode_tok_s"]), f"{stats['generated_tokens']} tokens"),
        (
            "KV pool",
            f"{stats['kv_blocks_peak']} of {stats['kv_blocks']} blocks",
            f"at the peak; {stats['kv_block_size']} tokens each, {format_bytes(stats['kv_bytes'])} in all",
        ),
    ]
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(f"{name:12} {value:>{width}}  {remark}".rstrip() for name, value, remark in rows)
