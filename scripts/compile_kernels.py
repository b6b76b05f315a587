"""Compile the CUDA kernels with NVRTC and report what they take: no GPU is needed, only the extra cuda12 or cuda13.

Without options a named list of (variant, architecture) pairs; with --all every variant for every architecture. Exits with 1
where something does not compile or a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from cupaged.attention import kernel as persistent
from cupaged.cuda import jit
from cupaged.ops import cuda as ops

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
BF16, F16 = {"DTYPE_BF16": 1}, {"DTYPE_F16": 1}
ATTENTION = "paged_attention.cu"


def attention(dtype: dict[str, int], head_dim: int, heads: int) -> tuple[str, dict[str, int]]:
    return ATTENTION, {**dtype, "HEAD_DIM": head_dim, "HEADS": heads}


def persistent_attention(dtype: dict[str, int], head_dim: int, stages: int) -> tuple[str, dict[str, int]]:
    return persistent.SOURCE, {**dtype, "HEAD_DIM": head_dim, "STAGES": stages}


# The largest variants on every architecture that takes them, then each other variant on one that differs
NAMED = [
    *((persistent_attention(BF16, 128, 3), arch) for arch in ("90a", "100")),
    *((persistent_attention(BF16, 128, 2), arch) for arch in ("80", "86", "120")),
    (persistent_attention(F16, 64, 4), "90a"),
    *((attention(BF16, 128, 8), arch) for arch in ("80", "90a", "120")),
    *((("sampling.cu", {}), arch) for arch in ("80", "90a", "120")),
    *(((source, BF16), arch) for source in ("rms_norm.cu", "elementwise.cu", "rope_append.cu") for arch in ("80", "90a")),
    *(((source, F16), "89") for source in ("rms_norm.cu", "elementwise.cu", "rope_append.cu")),
    (("embedding.cu", {}), "86"),
    (attention(BF16, 64, 3), "80"),
    (attention(BF16, 64, 8), "86"),
    (attention(BF16, 64, 1), "90a"),
    (attention(BF16, 128, 1), "80"),
    (attention(BF16, 128, 4), "90a"),
    (attention(BF16, 128, 7), "86"),
    (attention(F16, 128, 8), "89"),
    (attention(F16, 64, 7), "100"),
]


def compile_variant(source: str, defines: dict[str, int], arch: str) -> str:
    """ptxas's report on the kernels of a source; RuntimeError with the first error where it does not compile."""
    from cuda.pathfinder import find_nvidia_header_directory
    from cupy_backends.cuda.libs import nvrtc

    include = "-I" + (find_nvidia_header_directory("cudart") or "")
    options = [*jit.options_of(defines), include, "-ftz=true", f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v"]
    program = nvrtc.createProgram(jit.read_source(source), source, [], [])
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(jit.first_error(nvrtc.getProgramLog(program))) from error
    finally:
        nvrtc.destroyProgram(program)


def usage(log: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes spilled or in local memory)} from ptxas's report."""
    found = {}
    for name, body in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", log, re.DOTALL):
        registers = int(re.search(r"Used (\d+) registers", body)[1])
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", body).groups())
        found[name] = registers, stack + stores + loads
    return found


def shared_bytes(name: str, defines: dict[str, int]) -> int:
    if name == persistent.NAME:
        return persistent.shared_bytes(defines["HEAD_DIM"], defines["STAGES"])
    return ops.shared_bytes(name, **defines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant for every architecture")
    every = parser.parse_args().all
    variants = {(source, tuple(defines.items())) for source, _, defines in ops.variants() + persistent.variants()}
    matrix = [((source, dict(defines)), arch) for source, defines in sorted(variants) for arch in ARCHITECTURES]
    pairs = matrix if every else NAMED

    failures, start = 0, time.perf_counter()
    print(f"{'kernel':<22}{'variant':<34}{'sm_':<6}{'registers':>9}{'spilled':>9}{'shared':>8}")
    for (source, defines), arch in pairs:
        variant = " ".join(key if key.startswith("DTYPE") else f"{key}={value}" for key, value in defines.items())
        assert (source, tuple(defines.items())) in variants, f"nothing asks for {source} {variant}"
        try:
            kernels = usage(compile_variant(source, defines, arch))
        except RuntimeError as error:
            print(f"{source:<22}{variant:<34}{arch:<6} FAILED: {error}")
            failures += 1
            continue
        for name, (registers, spilled) in sorted(kernels.items()):
            print(f"{name:<22}{variant:<34}{arch:<6}{registers:>9}{spilled:>9}{shared_bytes(name, defines):>8}")
            failures += spilled > 0
    print(f"{len(pairs)} pairs in {time.perf_counter() - start:.1f} s, {failures} failures or spills")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
