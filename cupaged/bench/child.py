"""Measurements in a process of their own: a question as JSON goes in, an answer as JSON comes out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from cupaged.errors import CupagedError, InvalidArgument


def ask(module: str, question: dict, environment: Mapping[str, str] | None = None) -> tuple[float, Any]:
    """Seconds from the start of `python -m module` to the first byte of its answer, and the answer.

    CupagedError, or InvalidArgument if it is one there, with the last line that the process wrote to stderr, if it fails.
    """
    command = [sys.executable, "-m", module, json.dumps(question)]
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}  # no byte may wait in a buffer
    with subprocess.Popen(command, env=environment, **pipes) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        rest, errors = process.communicate()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines() or [f"{module} failed; run it alone"]
        raise (InvalidArgument if process.returncode == 2 else CupagedError)(lines[-1])
    return seconds, json.loads(first + rest)


def answer(measure: Callable[..., Any]) -> int:
    """The main function of such a module: calls `measure` with what was asked; returns the exit code."""
    try:
        print(json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)
        return 0
    except CupagedError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
