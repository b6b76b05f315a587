"""Every barrier and every wait for copies in the kernels of `ops.cuda` is needed: without any one an operation fails here.

That shows two things at once: the emulator sees a missing barrier, and the kernels have none to spare.
"""

import re
import shutil

import pytest
from op_cases import CASES, check

from cupaged.cuda import jit
from cupaged.ops import cuda

from .emulator import EmulationError

BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<\d+>\(\));")
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


def files_of(name):
    """A file of cuda_src and those it includes."""
    included = INCLUDE.findall((jit.source_folder() / name).read_text())
    return {name}.union(*(files_of(file) for file in included if (jit.source_folder() / file).is_file()))


BARRIERS = [
    (file, text[: match.start()].count("\n") + 1, match.span())
    for file in sorted(set.union(*(files_of(source) for source, _, _ in cuda.variants())))
    for text in [(jit.source_folder() / file).read_text()]
    for match in BARRIER.finditer(text)
]
SHOWING = [case for case in CASES if case.op in ("rms_norm", "sample")]  # the operations whose kernels have barriers


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
