"""Draw the roofline of attention from attention_<gpu>.json: every case, and the best of its peers, under the run's limits.

Needs matplotlib; writes a PNG of the same name beside the result file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def draw(result: dict, path: Path) -> None:
    """Arithmetic intensity over bytes of K/V, both axes logarithmic; a dot under the roof is lost time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tbps, tflops = result["limit_tbps"], result["limit_tflops"]
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    ridge = tflops / tbps
    ends = [0.5, ridge, 2e4]
    axes.loglog(ends, [min(x * tbps, tflops) for x in ends], color="black", linewidth=1)
    axes.annotate(f"read limit {tbps:.2f} TB/s", (12, 24 * tbps), rotation=40, ha="center", fontsize=8)
    axes.annotate(f"matrix products {tflops:.0f} TFLOP/s", (ends[-1], tflops), ha="right", va="bottom", fontsize=8)
    colours = {"decode": "tab:blue", "mixed": "tab:green", "prefill": "tab:red"}
    for kind, colour in colours.items():
        rows = [row for row in result["rows"] if row["case"].startswith(kind)]
        label = f"{kind}, cupaged"
        for row in rows:
            x, flop = row["flop_per_byte"], row.get("tflop_s") or row["tb_s"] * row["flop_per_byte"]
            axes.plot(x, flop, "o", color=colour, label=label, markersize=5)
            if row["peers"]:
                best = min(row["peers"].values())
                axes.plot(x, flop * row["us"] / best, "x", color=colour, label=label and f"{kind}, best peer", markersize=5)
            label = None
    axes.set(xlabel="FLOP a byte of K/V", ylabel="TFLOP/s", title=f"Paged attention on {result['machine']}, {result['date']}")
    axes.grid(which="major", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "attention_h100.json"
    parser.add_argument("result", nargs="?", type=Path, default=default, help=f"a result file (default: {default.name})")
    args = parser.parse_args()
    try:
        result = json.loads(args.result.read_text(encoding="utf-8"))
        draw(result, args.result.with_suffix(".png"))
    except ImportError:
        print("matplotlib, which draws the picture, is not installed; pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, json.JSONDecodeError, KeyError) as error:
        print(f"{args.result} is no result of bench_attention.py ({error}); run that first", file=sys.stderr)
        return 1
    print(args.result.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
