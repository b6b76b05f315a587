"""Many requests at once on this machine: a table, and serving_<gpu|cpu>.json under --output.

With --policy-only no model is loaded: the scheduler alone, in pure Python.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from cupaged import LLM, CupagedError
from cupaged.bench import save
from cupaged.bench_serving import GEOMETRIES, HEADER, Lengths, bench_policy, bench_serving, format_row, write_geometry


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="tiny",
        help=f"known name, folder, ORG/NAME, or with random weights {', '.join(GEOMETRIES)} (default: tiny)",
    )
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: config.json is enough")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one that works)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: auto)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of the KV pool (default: auto)")
    parser.add_argument("--kv-memory", help="of the KV pool, like 512MB (default: room for all that run at once, if it fits)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (default: 16)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="tokens of a step (default: the LLM's)")
    parser.add_argument(
        "--concurrency", type=int, nargs="*", default=[1, 8, 64, 256], help="closed loops (default: 1 8 64 256)"
    )
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="Poisson arrivals, requests a second (default: none)")
    parser.add_argument("--max-num-seqs", type=int, help="sequences of a step (default: the largest concurrency, or 256)")
    parser.add_argument("--requests", type=int, help="of each case (default: twice the concurrency; of a rate, for 30 s)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of a prompt, on average (default: 256)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, on average (default: 128)")
    parser.add_argument(
        "--spread", type=float, default=0.7, help="of both: deviation of the logarithm; 0: all alike (default: 0.7)"
    )
    parser.add_argument("--policy-only", action="store_true", help="the scheduler alone, at 256 sequences; writes no file")
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results"), help="file or folder (default: scripts/results)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    policy = bench_policy()
    print(format_row(policy), flush=True)
    if args.policy_only:
        return
    lengths = Lengths(args.prompt_tokens, args.tokens, args.spread)
    with contextlib.ExitStack() as stack:
        model, load_format = args.model, args.load_format
        if model in GEOMETRIES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model, load_format = write_geometry(folder / model, model), "dummy"
        llm = LLM(
            model,
            device=args.device,
            dtype=args.dtype,
            kv_cache_dtype=args.kv_cache_dtype,
            kv_memory=args.kv_memory,
            threads=args.threads,
            block_size=args.block_size,
            max_model_len=lengths.longest,
            max_num_seqs=args.max_num_seqs or max([*args.concurrency, *([256] if args.rate else [])], default=1),
            max_num_batched_tokens=args.max_num_batched_tokens,
            load_format=load_format,
        )
        print(f"loaded in {llm.load_seconds:.1f} s on {llm.device}\n{HEADER}", flush=True)
        result = bench_serving(
            llm,
            args.concurrency,
            args.rate,
            args.requests,
            lengths,
            args.threads,
            report=lambda row: print(format_row(row), flush=True),
        )
    result["rows"].insert(0, policy)
    Path(__file__).parent.joinpath("results").mkdir(exist_ok=True)
    print(f"wrote {save(result, args.output, 'serving')}")


if __name__ == "__main__":
    try:
        main()
    except CupagedError as error:
        sys.exit(f"cupaged: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
