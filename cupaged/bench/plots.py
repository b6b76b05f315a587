"""Pictures of result files: a PNG each, made to be read 700 pixels wide.

`roofline` is for what scripts/bench_attention.py measures, `breakdown` for `cupaged bench generate`, `throughput_latency` for
`cupaged bench serving`; `draw` takes the one that a result's rows are for. Colours are those of Okabe and Ito ("Color universal
design", 2008), which colour-blind eyes tell apart; where that is not enough, shapes differ too. matplotlib is the extra `plot`.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupaged.bench.results import WRITERS, write_whole
from cupaged.bench.step import OUTSIDE
from cupaged.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
)
GREY = "#bbbbbb"
_SERVED = re.compile(
    r"(?P<model>.+) (?:concurrency (?P<concurrency>\d+)|rate (?P<rate>\d+(?:\.\d+)?(?:e[+-]?\d+)?)/s) (?P<lengths>\d+\+\d+)"
)


def draw(result: dict, source: str | Path) -> Path:
    """Draw a result beside its file `source`, which need not be there, and return the picture's path.

    It has the file's name, but what `cupaged bench generate` measured, in cpu.json or generate_<gpu>.json, is
    decode_step_<gpu|cpu>.png.
    """
    source = Path(source)
    stem = source.stem
    if any("itl_ms" in row for row in result["rows"]):
        function = throughput_latency
    elif any(" decode step " in row["case"] for row in result["rows"]):
        function, stem = breakdown, f"decode_step_{stem.removeprefix('generate_')}"
    elif any(_of_attention(row) for row in result["rows"]):
        function = roofline
    else:
        what = "no steps, requests or cases of attention that can be drawn"
        raise InvalidArgument(f"{source} holds {what}; give a file that {WRITERS} of this version wrote")
    path = source.with_name(f"{stem}.png")
    function(result, path)
    return path


def check(folder: str | Path) -> None:
    """InvalidArgument unless pictures can be drawn and written to `folder`: to be known before minutes of measuring."""
    _figure_class()
    if not os.path.isdir(folder):
        raise InvalidArgument(f"{folder} is no folder; give --plot one that exists")
    if not os.access(folder, os.W_OK):
        raise InvalidArgument(f"{folder} cannot be written to; give --plot another folder")


# ---- the pictures


def _of_attention(row: dict) -> bool:
    return "flop_per_byte" in row and row["case"].startswith(("decode ", "mixed ", "prefill "))


def roofline(result: dict, path: Path) -> None:
    """Speed over arithmetic intensity of every case and its best peer; a gap to the roof is lost (Williams et al. 2009)."""
    rows = [row for row in result["rows"] if _of_attention(row)]
    tbps = _number(result, "limit_tbps")
    tflops = math.inf if result.get("limit_tflops") is None else _number(result, "limit_tflops")  # there was no cuBLAS
    figure, axes = _figure(result, "Paged attention of one layer", height=4.6)
    ends = [min(_number(row, "flop_per_byte") for row in rows) / 2, 2 * max(row["flop_per_byte"] for row in rows)]
    roof = sorted({*ends, min(max(tflops / tbps, ends[0]), ends[1])})
    axes.loglog(roof, [min(x * tbps, tflops) for x in roof], color=BLACK, linewidth=1.2)
    x, y = math.sqrt(roof[0] * roof[1]), 1.2 * math.sqrt(roof[0] * roof[1]) * tbps  # above the middle of the slope
    slope = {"rotation": math.degrees(math.atan(y / x)), "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(x, y, f"read limit {tbps:.2f} TB/s", ha="center", va="bottom", fontsize=9, **slope)
    if tflops < math.inf:
        axes.text(ends[1], 1.04 * tflops, f"largest matrix product {tflops:.0f} TFLOP/s", ha="right", va="bottom", fontsize=9)
    ours: dict[str, list[tuple[float, float]]] = {}  # kind -> (FLOP a byte, TFLOP/s)
    peers: list[tuple[float, float]] = []
    for row in rows:
        x = row["flop_per_byte"]
        speed = _number(row, "tflop_s") if "tflop_s" in row else _number(row, "tb_s") * x
        ours.setdefault(row["case"].split()[0], []).append((x, speed))
        if isinstance(row.get("peers"), dict) and row["peers"]:
            best = min(_number(row, "peers", name) for name in row["peers"])
            peers.append((x, speed * _number(row, "us") / best))
    looks = {"decode": (BLUE, "o"), "mixed": (GREEN, "s"), "prefill": (RED, "^")}
    for kind, points in ours.items():
        colour, marker = looks[kind]
        axes.plot(*zip(*points, strict=True), linestyle="none", color=colour, marker=marker, markersize=7, label=kind)
    if peers:
        axes.plot(*zip(*peers, strict=True), linestyle="none", color=BLACK, marker="x", markersize=5, label="best peer")
    axes.set(xlabel="FLOP a byte of K/V", ylabel="TFLOP/s")
    axes.grid(which="major", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=9)
    _write(figure, path)


def breakdown(result: dict, path: Path) -> None:
    """Where the time of one decode step goes, by kind of operation, above the floor: its bytes at the read limit."""
    steps = [row for row in result["rows"] if row["case"].endswith(" decode step")]
    if not steps:
        raise InvalidArgument("the result holds no row of the whole step; measure again with `cupaged bench generate`")
    whole = steps[0]["case"]
    step, share, tbps = _number(steps[0], "ms"), _number(steps[0], "share"), _number(result, "limit_tbps")
    parts = {
        row["case"].removeprefix(whole).strip(): _number(row, "ms", zero=True)
        for row in result["rows"]
        if row["case"].startswith(f"{whole} ")
    }
    figure, axes = _figure(result, f"One decode step of {whole.removesuffix(' decode step')}", height=3.3)
    colours = itertools.cycle((BLUE, SKY, RED, ORANGE, GREEN, YELLOW, PURPLE, BLACK))
    left = 0.0
    for kind, ms in parts.items():
        colour, hatch = (GREY, "////") if kind == OUTSIDE else (next(colours), None)
        label = f"{kind} {ms:.3g} ms, {ms / step:.1%}"
        axes.barh(1, ms, left=left, color=colour, edgecolor="white", linewidth=0.5, hatch=hatch, height=0.7, label=label)
        left += ms
    floor = step * share
    axes.barh(0, floor, color="white", edgecolor=BLACK, linewidth=1.2, height=0.7)
    axes.text(step, 1, f" {step:.3g} ms", va="center", fontsize=9)
    size = floor / 1e3 * tbps * 1e12
    amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
    limit = f"{tbps:.2f} TB/s" if tbps >= 1 else f"{tbps * 1e3:.0f} GB/s"
    axes.text(floor, 0, f" {floor:.3g} ms, {share:.1%}: {amount} at {limit}", va="center", fontsize=9)
    axes.set(xlabel="ms", yticks=[0, 1], yticklabels=["floor", "step"], xlim=(0, 1.15 * max(step, 1.4 * floor)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _write(figure, path)


def throughput_latency(result: dict, path: Path) -> None:
    """Generated tokens a second over the time between a request's tokens, its p50 and its p99, a point for each concurrency or
    rate of arrivals; a line for each model and lengths."""
    lines: dict[str, list[tuple[str, float, float, float]]] = {}  # label of a point, its tok/s, p50 and p99
    for row in result["rows"]:
        case = _SERVED.fullmatch(row["case"])
        if case and isinstance(row.get("itl_ms"), dict) and row["itl_ms"].get("p50") is not None:  # null where all failed
            label = case["concurrency"] or f"{case['rate']}/s"
            figures = _number(row, "tok_s"), _number(row, "itl_ms", "p50"), _number(row, "itl_ms", "p99")
            lines.setdefault(f"{case['model']} {case['lengths']}", []).append((label, *figures))
    if not lines:
        raise InvalidArgument("no request of the result has two tokens; measure it again with `cupaged bench serving`")
    figure, axes = _figure(result, "Throughput over the time between tokens", height=4.6)
    for points in lines.values():
        points.sort(key=lambda point: float(point[0].removesuffix("/s")))  # the order of a line
    for (name, points), colour in zip(lines.items(), itertools.cycle((BLUE, RED, GREEN, PURPLE, ORANGE)), strict=False):
        for label, speed, p50, p99 in points:
            axes.plot([p50, p99], [speed, speed], color=GREY, linewidth=0.8, zorder=1)
            place = {"xytext": (-7, 0), "ha": "right", "va": "center"}
            if label.endswith("/s"):  # within the lines
                place = {"xytext": (0, -6), "ha": "center", "va": "top"}
            axes.annotate(label, (p50, speed), textcoords="offset points", fontsize=9, color=colour, **place)
        for column, share, marker, fill in ((2, "p50", "o", colour), (3, "p99", "D", "white")):
            for rates, dashes in ((False, "-" if column == 2 else "--"), (True, "none")):  # arrivals are no line
                chosen = [point for point in points if point[0].endswith("/s") == rates]
                label = None if rates and len(chosen) < len(points) else f"{name}, {share}"
                style = {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": dashes}
                if chosen:
                    axes.plot([point[column] for point in chosen], [point[1] for point in chosen], **style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="ms between a request's tokens", ylabel="generated tokens a second")
    axes.margins(0.1)
    _plain_numbers(axes)
    axes.grid(which="major", linewidth=0.3)
    shown = "prompt+answer tokens; points: requests at a time" + (
        ", or arrivals a second" if any(point[0].endswith("/s") for points in lines.values() for point in points) else ""
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, title=shown, title_fontsize=9)
    _write(figure, path)


# ---- what they share


def _number(row: dict, *keys: str, zero: bool = False) -> float:
    """row[keys[0]][keys[1]]..., a finite number above 0, or 0 where that may be; else InvalidArgument."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        where = f" of {row['case']!r}" if "case" in row else ""
        raise InvalidArgument(f"{'.'.join(keys)}{where} is {value!r} in the result; give a file that {WRITERS} wrote")
    return value


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgument("matplotlib, which draws, is not installed; pip install 'cupaged[plot]'") from error
    return Figure


def _figure(result: dict, title: str, height: float) -> tuple[Figure, Axes]:
    """7 by `height` inches: letters of 9 points are 12 pixels high where 700 are shown."""
    figure = _figure_class()(figsize=(7, height), layout="constrained")
    figure.suptitle(f"{title}\n{result['machine']}, {result['date']}", fontsize=11)
    return figure, figure.add_subplot()


def _plain_numbers(axes: Axes) -> None:
    """Logarithmic axes with a handful of ticks, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _write(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200)
    write_whole(path, data.getvalue(), "give a folder that can be written to")
