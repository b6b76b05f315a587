"""The options of every command. Nothing else is imported, so that --help is fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cupaged.errors import InvalidArgument
from cupaged.version import __version__

DEFAULT_MODEL = "smollm2-135m-instruct"
QUANTIZATIONS = ("int8", "fp8", "int4")
SAMPLING = {  # option -> (type, what it does); an option that is not given follows the model's generation_config.json
    "max_tokens": (int, "the most tokens to generate (default: until the model ends or its context is full)"),
    "temperature": (float, "0 takes the most probable token, larger values vary more"),
    "top_k": (int, "draw from the K most probable tokens (0: all)"),
    "top_p": (float, "draw from the fewest tokens whose probabilities sum to P"),
    "min_p": (float, "draw from tokens at least P times as probable as the most probable"),
    "repetition_penalty": (float, "above 1: tokens already seen become less likely"),
    "presence_penalty": (float, "subtracted from the logits of tokens already generated"),
    "frequency_penalty": (float, "subtracted once for each time a token was generated"),
    "seed": (int, "of the draws, to repeat them (default: another one each time; --json tells which)"),
}
_JSON_KEYS = """\
--json writes one object: text, token_ids (generated), prompt_tokens (how many), finish_reason ("stop": the model ended or
a --stop string came, "length": --max-tokens or the context was reached), seed (null where nothing was drawn), model,
device, dtype, kv_cache_dtype, quantization (null: none), and stats: load_s (in all), weights_bytes, weights_s and
weights_gb_s (of the files),
time_to_first_token_s, prefill_tok_s, decode_tok_s (null where nothing was measured), cached_tokens, generated_tokens,
kv_blocks, kv_blocks_peak, kv_block_size, kv_bytes."""

_BATCH_FORMAT = """\
A line of IN.jsonl is a request in the format of OpenAI's batches:

  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 100}}

or with the url /v1/completions and a body that has a prompt. Bodies may hold temperature, top_p, n, seed, stop,
presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs, max_tokens, max_completion_tokens, and top_k, min_p,
repetition_penalty, min_tokens, ignore_eos, stop_token_ids, skip_special_tokens; what they leave out follows the model's
generation_config.json, but for max_tokens of a completion (16) and the seed, which is made from the request so that it can be
repeated. The body's model is only echoed. A line of OUT.jsonl is {"id", "custom_id", "response", "error"}, in the order of the
requests. A request that fails is a line with an error and does not change the exit code; of lines with the same custom_id
only the first is run, the others are errors with custom_id null, as are lines that are no request.

Until all is done the answers are in OUT.jsonl.partial. However a run has ended, the same command goes on from there and
computes no answer twice, errors included; to compute all anew, delete OUT.jsonl and OUT.jsonl.partial."""


_SERVE_FORMAT = """\
Bodies are OpenAI's: messages or prompt, model, stream and stream_options, n, temperature, top_p, max_tokens,
max_completion_tokens, stop, seed, presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs, response_format
(json_object, json_schema), and vLLM's top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
skip_special_tokens. Unknown fields are ignored, tools are refused. SIGTERM and Ctrl-C let running requests
finish, a second one ends them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InvalidArgument(f"{message}; see `{self.prog} --help`")


def whole_command(argv: list[str]) -> list[str]:
    """The command line with what it leaves out: `bench` and its options alone are `bench generate`."""
    bare = argv[:1] == ["bench"] and (len(argv) == 1 or (argv[1].startswith("-") and argv[1] not in ("-h", "--help")))
    return ["bench", "generate", *argv[1:]] if bare else argv


def build_parser(commands: dict[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the whole command line; the namespace it returns holds the chosen one of `commands` as `run`.

    A wrong argument raises InvalidArgument, --help and --version raise SystemExit once they are printed.
    """
    parser = _Parser(
        prog="cupaged",
        description="Run Llama-family models through paged attention, on the CPU or an NVIDIA GPU.",
        epilog="exit codes: 0 done, 1 failed, 2 an option, file or prompt that cannot be used as given, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cupaged {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, **kwargs: object) -> argparse.ArgumentParser:
        *above, last = name.split()
        among = bench if above else subparsers
        sub = among.add_parser(last, help=summary, description=summary, allow_abbrev=False, **kwargs)
        sub.set_defaults(run=commands[name])
        level = sub.add_mutually_exclusive_group()
        level.add_argument("-v", "--verbose", action="count", default=0, help="say what happens; -vv: tracebacks too")
        level.add_argument("-q", "--quiet", action="store_true", help="only errors on stderr")
        return sub

    sub = command(
        "generate",
        "Answer one prompt.",
        epilog=_JSON_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = sub.add_argument_group("prompt (default: stdin, where that is not a terminal)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text, less one newline at its end; - is stdin")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="through the model's chat template (the default when it has one)")
    form.add_argument("--raw", action="store_true", help="the text as it is, for the model to continue")
    group.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own, if any)")
    _add_model_options(sub)
    _add_sampling_options(sub)
    group = sub.add_argument_group("output")
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (the default on a terminal)"
    )
    form.add_argument("--json", action="store_true", help="one JSON object instead of the text; keys below")
    group.add_argument("--stats", action="store_true", help="times, GB/s of loading, and pool use, on stderr")

    sub = command("chat", "Talk with a model in the terminal; /help there lists what can be typed.")
    sub.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own, if any)")
    sub.add_argument(
        "--stats", action="store_true", help="after each answer: prompt and cached tokens, speed, context used; on stderr"
    )
    sub.add_argument("--plain", action="store_true", help="answers on a terminal as they are, not rendered as Markdown")
    _add_model_options(sub)
    _add_sampling_options(sub)

    sub = command(
        "batch",
        "Answer a file of requests, many at a time; a run that was broken off goes on where it was.",
        epilog=_BATCH_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("input", metavar="IN.jsonl", help="the requests, one JSON object a line; format below")
    sub.add_argument("output", metavar="OUT.jsonl", help="gets the answers, once all are there")
    sub.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="N", help="sequences computed at a time, at most (default: 64)"
    )
    _add_model_options(sub, kv_memory="room for all --max-num-seqs, within a quarter of the free memory, or 90%% of a GPU's")

    sub = command(
        "serve",
        "Serve a model over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.",
        epilog=_SERVE_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = sub.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0: all)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default: 8000; 0: any)")
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: MODEL's last part)")
    group.add_argument("--api-key", metavar="KEY", help="that requests must carry (default: $CUPAGED_API_KEY, else none)")
    group.add_argument(
        "--allow-origin", action="append", metavar="URL", help="web pages that may call (CORS); may be given several times"
    )
    group.add_argument(
        "--max-requests",
        type=int,
        default=1024,
        metavar="N",
        help="running and waiting at a time; more get 429 (default: 1024)",
    )
    group.add_argument("--max-body", default="4MiB", metavar="SIZE", help="of a request; more gets 413 (default: 4MiB)")
    group.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds a request may take (default: 600)")
    group.add_argument(
        "--grace", type=float, default=30, metavar="S", help="seconds running requests get to finish at SIGTERM (default: 30)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="N", help="sequences computed at a time, at most (default: 64)"
    )
    kv_memory = "room for all --max-num-seqs, within a quarter of the free memory, or 90%% of a GPU's"
    _add_model_options(sub, kv_memory, positional=True)

    sub = command("fetch", "Download a model if it is not there yet, and print its folder.")
    sub.add_argument("model", metavar="NAME", help=f"a known name ({DEFAULT_MODEL}) or ORG/NAME on the Hugging Face hub")

    sub = command("info", "Print a model's geometry and sizes, and what context fits where.")
    sub.add_argument("model", metavar="MODEL", help="known name, folder, or ORG/NAME on the Hugging Face hub")
    sub.add_argument("--dtype", default="auto", metavar="TYPE", help="as for generate (default: auto, for each device its own)")
    sub.add_argument("--kv-cache-dtype", default="auto", metavar="TYPE", help="as for generate (default: auto)")
    sub.add_argument("--quantization", choices=QUANTIZATIONS, help="as for generate (default: none)")
    sub.add_argument("--json", action="store_true", help="one JSON object instead of the table")

    summary = "Measure this machine; figures stand beside the machine's own limits, taken in the same run."
    sub = subparsers.add_parser("bench", help=summary, description=summary, allow_abbrev=False)
    bench = sub.add_subparsers(metavar="WHAT", required=True, title="what to measure (default: generate)")

    sub = command("bench generate", "One request: start-up, memory, prefill, decode, and where the time of a decode step goes.")
    _add_result_options(sub, "decode_step_<gpu|cpu>.png, where the time of a decode step goes")
    sub.add_argument("--runs", type=int, metavar="N", help="repetitions, of which the median counts (default: 5, of a start 3)")
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="random tokens to prefill (default: 512)")
    sub.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to decode (default: 128)")
    sub.add_argument(
        "--batch", type=int, nargs="+", metavar="B", help="measure only steps of B sequences at a time, and the prefill before"
    )
    sub.add_argument(
        "--context", type=int, nargs="+", metavar="C", help="... of C tokens each; as many numbers as --batch, or one for all"
    )
    sub.add_argument(
        "--cache",
        default="paged",
        choices=["paged", "contiguous"],
        help="contiguous: measure the steps of --batch also over a cache of that kind, with unfused attention",
    )
    sub.add_argument(
        "--peers", action="store_true", help="measure the steps of --batch also with transformers, which must be installed"
    )
    sub.add_argument(
        "--serve", action="store_true", help="send B requests of C tokens at once instead, each answered with --tokens"
    )
    _add_load_format(sub, "; without --batch the start is measured, with an empty kernel cache and a filled one")
    _add_model_options(sub, kv_memory=None)

    sub = command("bench serving", "Many requests at once: throughput, what each waits, and what the scheduler itself costs.")
    _add_result_options(sub, "serving_<gpu|cpu>.png, throughput over the time between tokens")
    add = sub.add_argument
    add("--concurrency", type=int, nargs="*", default=[1, 8, 64, 256], metavar="N", help="closed loops (default: 1 8 64 256)")
    add("--rate", type=float, nargs="*", default=[], metavar="X", help="Poisson arrivals, requests a second (default: none)")
    add("--requests", type=int, metavar="N", help="of each case (default: twice the concurrency; of a rate, for 30 s)")
    add("--prompt-tokens", type=int, default=256, metavar="N", help="of a prompt, on average (default: 256)")
    add("--tokens", type=int, default=128, metavar="N", help="of an answer, on average (default: 128)")
    add(
        "--spread",
        type=float,
        default=0.7,
        metavar="X",
        help="of both: deviation of the logarithm; 0: all alike (default: 0.7)",
    )
    add("--policy-only", action="store_true", help="the scheduler alone, at 256 sequences; no model, no file")
    _add_model_options(sub, kv_memory=None)
    add = sub.add_argument_group("engine").add_argument
    _add_load_format(sub)
    add("--kv-memory", metavar="SIZE", help="of the KV pool: 512MB, 2GiB or bytes (default: room for all at once, if it fits)")
    add("--block-size", type=int, default=16, metavar="N", help="tokens of a block of the pool (default: 16)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens of a step (default: 512 on the CPU, 8192 on a GPU)")
    add("--max-num-seqs", type=int, metavar="N", help="sequences of a step (default: the largest concurrency, of a rate 256)")

    summary = "How many requests the same KV memory holds, and what they give: reserved slots against pages."
    sub = command("bench capacity", summary)
    _add_output(sub)
    add = sub.add_argument
    add("--kv-memory", default="16GiB", metavar="SIZE", help="of both: 512MB, 2GiB or bytes (default: 16GiB)")
    add(
        "--max-model-len",
        type=int,
        default=8192,
        metavar="N",
        help="slots reserved a request; prompt and answer are from a 32nd of it to all of it, log-uniform (default: 8192)",
    )
    add("--requests", type=int, default=128, metavar="N", help="served by each of the two (default: 128)")
    add("--tokens", type=int, default=128, metavar="N", help="of an answer, but at most half of the request (default: 128)")
    _add_load_format(sub)
    _add_model_options(sub, kv_memory=None)

    sub = command(
        "bench load", "A sharded checkpoint from the page cache to the device; it is written to $TMPDIR first, and removed."
    )
    _add_output(sub)
    sub.add_argument("--runs", type=int, default=5, metavar="N", help="repetitions, of which the median counts (default: 5)")
    sub.add_argument(
        "--model",
        metavar="MODEL",
        help="config.json or model whose geometry is written, in random bfloat16 (default: Llama 2 7B, 13.5 GB)",
    )
    _add_device_options(sub)

    sub = command("bench plot", "Draw result files, without measuring; prints the path of each picture.")
    sub.add_argument(
        "results",
        nargs="+",
        metavar="RESULT.json",
        help="of `bench generate`, `bench serving` or scripts/bench_attention.py; the picture is written beside it",
    )
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="write the figures as JSON: a file, or a folder where it gets its usual name; decode_<gpu|cpu>.json, of --batch, "
        "of a start and of `bench capacity`, keeps what it holds of other cases",
    )


def _add_result_options(parser: argparse.ArgumentParser, picture: str) -> None:
    _add_output(parser)
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FOLDER",
        help=f"draw {picture}, in FOLDER (default: that of --output, or the current one); needs matplotlib",
    )


def _add_load_format(parser: argparse.ArgumentParser, further: str = "") -> None:
    parser.add_argument(
        "--load-format",
        default="auto",
        choices=["auto", "dummy"],
        help=f"dummy: random weights; --model may be a bare config.json, like those of scripts/configs{further}",
    )


def _add_model_options(
    parser: argparse.ArgumentParser, kv_memory: str | None = "one whole context", positional: bool = False
) -> None:
    """`kv_memory`: what the pool's memory is by default; None: the command decides on the pool. `positional`: the model's."""
    group = parser.add_argument_group("model and device")
    group.add_argument(
        *(["model"] if positional else ["--model"]),
        **({"nargs": "?", "metavar": "MODEL"} if positional else {}),
        default=DEFAULT_MODEL,
        help=f"known name, Hugging Face folder, or ORG/NAME on the hub (default: {DEFAULT_MODEL})",
    )
    _add_device_options(group)
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="TYPE",
        help="of the KV pool: auto (like --dtype), fp8 or int8 (half the memory), on the CPU also bfloat16 or float16",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of the weights, while they are loaded (default: none, they are of --dtype)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    if kv_memory is not None:
        group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and answer together, in tokens")
        group.add_argument(
            "--kv-memory", metavar="SIZE", help=f"memory of the KV pool: 512MB, 2GiB or bytes (default: {kv_memory})"
        )
        group.add_argument(
            "--block-size", type=int, default=16, metavar="N", help="tokens of a block of the pool (default: 16)"
        )


def _add_device_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: a GPU if there is one that works"
    )
    group.add_argument("--dtype", default="auto", metavar="TYPE", help="auto, float32 (CPU), bfloat16 or float16 (GPU)")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: the model's generation_config.json, else the most probable token)")
    for name, (kind, what) in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=what)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
