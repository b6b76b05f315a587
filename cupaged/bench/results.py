"""Result files, and the lines of the table that is printed beside."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from cupaged.errors import InvalidArgument

WRITERS = "`cupaged bench generate`, `cupaged bench serving` or scripts/bench_attention.py"
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_MERGED = "decode"  # the kind of file that holds rows of several runs


def format_row(row: dict) -> str:
    """One line of the table."""
    unit, text = next((u, t) for u, t in (("ms", "ms"), ("tok_s", "tok/s"), ("s", "s"), ("gb", "GB")) if u in row)
    whole = "step" if " decode step " in row["case"] else "limit"
    share = f"{row['share']:7.1%} of the {whole}" if "share" in row else ""
    speed = f"   {row['tok_s']:.1f} tok/s" if "tok_s" in row and unit != "tok_s" else ""
    speed += f"   {row['gb_s']:.1f} GB/s" if "gb_s" in row else ""
    return f"{row['case']:66} {row[unit]:10.2f} {text:6}{share}{speed}{_notes(row)}".rstrip()


def _notes(row: dict) -> str:
    notes = [f"{name} {ms:.2f} ms, {ms / row['ms']:.1f} times that" for name, ms in row.get("peers", {}).items()]
    if "scores_gb" in row:
        notes.append(f"scores of a layer unfused {row['scores_gb']:.3g} GB, all of a step here {row['step_gb']:.3g} GB")
    if "weights_s" in row:
        notes.append(f"and {row['weights_s']:.2f} s to make weights")
    if "concurrent" in row:
        notes.append(f"{row['concurrent']:.1f} requests at a time, at most {row['most']}, in {row['kv_gb']:.2f} GB")
    notes += [f"{ratio:.2f} times the {name}" for name, ratio in row.get("ratio", {}).items()]
    return "".join(f"   {note}" for note in notes)


def model_name(path: Path) -> str:
    """What cases of decode and load files call a model: 7B if its file or folder is called like llama-2-7b; else that name."""
    size = re.search(r"(\d+)b$", path.stem)
    return f"{size[1]}B" if size else path.stem


def types(weights: str, kv: str) -> str:
    """What the cases of decode files say of the types of weights and K/V: "w=bf16 kv=fp8"."""
    return f"w={_SHORT.get(weights, weights)} kv={_SHORT.get(kv, kv)}"


def types_if_unusual(weights: str, kv: str) -> str:
    """The same behind a blank, for cases that name no types where both are bfloat16, or on a CPU float32: then nothing."""
    text = types(weights, kv)
    return "" if text in ("w=bf16 kv=bf16", "w=f32 kv=f32") else f" {text}"


def card(machine: str) -> str:
    """What the cases of decode files end with: " H200" on that card, and so on others; nothing on a CPU and on an H100."""
    name = _short(machine)
    return "" if name in ("cpu", "h100") else f" {name.upper()}"


def _short(machine: str) -> str:
    return "cpu" if " threads, " in machine else machine.removeprefix("NVIDIA ").split()[0].lower()


def usual_name(machine: str, what: str = "generate") -> str:
    """What the file of a machine's result is called: <what>_<gpu|cpu>.json, but cpu.json for generate's."""
    name = _short(machine)
    return "cpu.json" if (what, name) == ("generate", "cpu") else f"{what}_{name}.json"


def read_result(path: str | Path) -> dict:
    """A result file; InvalidArgument where it is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}; give a file that {WRITERS} wrote") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise InvalidArgument(f"{path} is not JSON ({error}); give a file that {WRITERS} wrote") from error
    rows = result.get("rows") if isinstance(result, dict) else None
    named = rows and isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("case"), str) for row in rows)
    if not named or not all(isinstance(result.get(name), str) for name in ("machine", "date")):
        raise InvalidArgument(f"{path} is no result file; give one that {WRITERS} wrote")
    return result


def earlier(output: str, machine: str, what: str) -> dict | None:
    """The result that `save` will add rows to, if there is one; InvalidArgument where rows of this machine cannot be added."""
    path = _path(output, machine, what)
    if what != _MERGED or not path.is_file():
        return None
    result, remedy = read_result(path), "give --output another file or folder"
    if result["machine"] != machine:
        raise InvalidArgument(f"{path} is of another machine ({result['machine']}), and this is {machine}; {remedy}")
    if not all({"date", "limit_tbps"} <= set(row) for row in result["rows"]):
        raise InvalidArgument(f"{path} holds other rows than those of decode steps; {remedy}")
    return result


def save(result: dict, output: str, what: str = "generate") -> Path:
    """Write a result file; a folder gets it under its usual name.

    A file of decode steps keeps the rows of earlier runs, but for those of the same case. So each of its rows says itself of
    which date it is and what the limits of its run were; what the file says of that is of the last run.
    """
    path = _path(output, result["machine"], what)
    if what == _MERGED:
        before = earlier(output, result["machine"], what) or {"rows": []}
        known = {name: value for name, value in result.items() if value is not None}
        own = {name: known[name] for name in ("limit_tbps", "limit_tflops", "date") if name in known}
        rows = {row["case"]: row for row in before["rows"]} | {row["case"]: {**row, **own} for row in result["rows"]}
        result = {**result, **before, **known, "rows": list(rows.values())}
    write_whole(path, (json.dumps(result, indent=2) + "\n").encode(), "give --output a file in a folder that exists")
    return path


def _path(output: str, machine: str, what: str) -> Path:
    path = Path(output)
    return path / usual_name(machine, what) if path.is_dir() else path


def write_whole(path: Path, data: bytes, remedy: str) -> None:
    """Write a file such that under its name there is all of it or what was there before; InvalidArgument where that fails.

    What is there and no plain file, like /dev/stdout, is written to as it is.
    """
    target = path.resolve()  # a link stays one
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}; {remedy}") from error
