"""Every barrier and every wait for copies in cuda_src is needed: without any one of them some operation fails here.

That shows two things at once: the emulator sees a missing barrier, and the kernels have none to spare.
"""

import re
import shutil

import pytest
from op_cases import CASES, check

from cupaged.cuda import jit

from .emulator import EmulationError

BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<\d+>\(\));")
BARRIERS = [
    (path.name, text[: match.start()].count("\n") + 1, match.span())
    for path in sorted(jit.source_folder().iterdir())
    if path.suffix in (".cu", ".cuh")
    for text in [path.read_text()]
    for match in BARRIER.finditer(text)
]
# the operations whose kernels have barriers, few enough shapes that a mutant is compiled once or twice
SHOWING = [
    case
    for case in CASES
    if case.op in ("rms_norm", "sample") or (case.op == "paged_attention" and re.search("9/3x64|3/1x64|4/1x64 p16", case.name))
]


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: f"{barrier[0]}:{barrier[1]}")
def test_no_barrier_can_be_missing(ops, monkeypatch, tmp_path, barrier):
    file, line, (start, end) = barrier
    folder = shutil.copytree(jit.source_folder(), tmp_path / "cuda_src")
    text = (folder / file).read_text()
    (folder / file).write_text(text[:start] + text[end:])
    monkeypatch.setattr(jit, "source_folder", lambda: folder)
    assert any(fails(ops, case) for case in SHOWING * 3), f"{file} works as well without its barrier in line {line}"


def fails(ops, case):
    try:
        check(ops, case, "bfloat16")
    except (AssertionError, EmulationError):
        return True
    return False
