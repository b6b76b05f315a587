"""Result files, and the lines of the table that is printed beside."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cupaged.errors import InvalidArgument


def format_row(row: dict) -> str:
    """One line of the table."""
    unit, text = next((u, t) for u, t in (("ms", "ms"), ("tok_s", "tok/s"), ("s", "s"), ("gb", "GB")) if u in row)
    whole = "step" if " decode step " in row["case"] else "limit"
    share = f"{row['share']:7.1%} of the {whole}" if "share" in row else ""
    speed = f"   {row['tok_s']:.1f} tok/s" if "tok_s" in row and unit != "tok_s" else ""
    speed += f"   {row['gb_s']:.1f} GB/s" if "gb_s" in row else ""
    return f"{row['case']:66} {row[unit]:10.2f} {text:6}{share}{speed}".rstrip()


def usual_name(result: dict, what: str = "generate") -> str:
    """What the file of a result is called: <what>_<gpu|cpu>.json, but cpu.json for generate's."""
    if " threads, " in result["machine"]:
        return "cpu.json" if what == "generate" else f"{what}_cpu.json"
    return f"{what}_{result['machine'].removeprefix('NVIDIA ').split()[0].lower()}.json"


def save(result: dict, output: str, what: str = "generate") -> Path:
    """Write a result file; a folder gets it under its usual name."""
    path = Path(output)
    if path.is_dir():
        path /= usual_name(result, what)
    write_whole(path, (json.dumps(result, indent=2) + "\n").encode(), "give --output a file in a folder that exists")
    return path


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
