"""What the README claims."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = {"2 cores of an EPYC, float32": "cpu.json", "H200, bfloat16": "generate_h200.json"}


@pytest.mark.parametrize("machine", RESULTS)
def test_figures_are_those_of_the_result_files(machine):
    rows = json.loads((ROOT / "scripts" / "results" / RESULTS[machine]).read_text())["rows"]
    start, memory, prefill, decode = (
        next(row for row in rows if name in row["case"]) for name in ("process start", "peak memory", "prefill", "decode")
    )
    assert figures(machine, start, memory, prefill, decode) in (ROOT / "README.md").read_text(encoding="utf-8")


def figures(machine, start, memory, prefill, decode):
    def speed(row):
        return f"{row['tok_s']:.{0 if row['tok_s'] > 100 else 1}f} tok/s ({row['share'] * 100:.2g} %)"

    return f"| {machine} | {start['s']:.1f} s | {speed(prefill)} | {speed(decode)} | {memory['gb']:.2f} GB |"


def test_figures_of_attention_are_those_of_the_result_file():
    rows = json.loads((ROOT / "scripts" / "results" / "attention_h100.json").read_text())["rows"]
    assert attention_table(rows) in (ROOT / "README.md").read_text(encoding="utf-8")


def attention_table(rows):
    lines = ["| heads/KV heads, batch x length | time | of the limit | cuDNN |", "| --- | --- | --- | --- |"]
    for row in rows:
        [peer] = [us for name, us in row["peers"].items() if "contiguous" in name] or [None]

        def shown(us, row=row):
            return f"{row['tflop_s'] * row['us'] / us:.0f} TFLOP/s" if "tflop_s" in row else f"{us:.4g} us"

        ours = shown(row["us"])
        lines.append(f"| {row['case']} | {ours} | {row['share']:.0%} | {shown(peer) if peer else ''} |".replace("  ", " "))
    return "\n".join(lines)


def test_figures_of_decode_steps_are_those_of_the_result_file():
    rows = json.loads((ROOT / "scripts" / "results" / "decode_h100.json").read_text())["rows"]
    lines = [
        "| Llama, batch x context, types of weights and K/V | a step | of the limit | tokens |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        if " w=" in row["case"] and "ms" in row:
            figures = f"{row['ms']:.2f} ms | {row['share']:.0%} | {row['tok_s']:.0f} tok/s"
            lines.append(f"| {row['case']} | {figures} |")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in text
    [load] = [row for row in json.loads((ROOT / "scripts" / "results" / "load_h100.json").read_text())["rows"] if "s" in row]
    assert f"in {load['s']:.1f} s" in text


def test_every_file_that_is_named_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:cupaged|cuda_src|attention|engine|ops|scripts|weights|tests)/[\w./]*)`", text)
    assert len(named) > 15
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "cupaged" / name).exists()]
    assert missing == []
