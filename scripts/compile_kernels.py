"""Compile the CUDA kernels with NVRTC and report what they take: no GPU is needed, only the extra cuda12 or cuda13.

Without options a named list of (variant, architecture) pairs; with --all every variant for every architecture. Exits with 1
where something does not compile or a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from cupaged.attention import device_plan
from cupaged.attention import kernel as persistent
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.ops import chain, products
from cupaged.ops import cuda as ops
from cupaged.ops.quantized import KINDS

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
BF16, F16 = {"DTYPE_BF16": 1}, {"DTYPE_F16": 1}


def persistent_attention(dtype: dict[str, int], head_dim: int, stages: int, **flags: int) -> tuple[str, dict[str, int]]:
    return persistent.SOURCE, {**dtype, "HEAD_DIM": head_dim, **flags, "STAGES": stages}


STREAMS = [
    (source, defines)
    for dtype, kv_dtype, kinds in (("float16", "uint8", (None,)), ("bfloat16", "bfloat16", (None, *KINDS)))
    for source, _, defines in chain.variants(dtype, kv_dtype, kinds)
]

PLAN = (device_plan.SOURCE, {"STEP": persistent.STEP["sm80"]})

# The largest variants on every architecture that takes them, then each other variant on one that differs
NAMED = [
    *((persistent_attention(BF16, 128, 3, **flags), arch) for arch in ("90a", "100") for flags in ({}, {"DECODE_ONLY": 1})),
    *((persistent_attention(BF16, 128, n), arch) for arch, n in (("80", 2), ("86", 3), ("120", 3))),
    *((persistent_attention(F16, 128, 2, **{kv: 1}), "80") for kv in ("KV_FP8", "KV_INT8")),
    *((persistent_attention(F16, 128, 3, **{kv: 1}), "89") for kv in ("KV_FP8", "KV_INT8")),
    *((persistent_attention(BF16, 128, 3, **{flag: 1}), "90a") for flag in ("KV_FP8", "KV_INT8", "MASK", "POINTERS")),
    (persistent_attention(F16, 64, 3), "90a"),
    (persistent_attention(BF16, 64, 3, DECODE_ONLY=1), "86"),
    (persistent_attention(BF16, 64, 6, KV_INT8=1, DECODE_ONLY=1), "100"),
    *(
        ((persistent.SOURCES["sm90"], persistent.variant_sm90("bfloat16", dim, kv)), "90a")
        for dim in (128, 64)
        for kv in ("bfloat16", "uint8")
    ),
    *((("sampling.cu", {}), arch) for arch in ("80", "90a", "120")),
    *((("logprobs.cu", {}), arch) for arch in ("80", "120")),
    (("copy_blocks.cu", {}), "90a"),
    *(((source, BF16), arch) for source in ("rms_norm.cu", "elementwise.cu", "rope_append.cu") for arch in ("80", "90a")),
    *(((source, F16), "89") for source in ("rms_norm.cu", "elementwise.cu", "rope_append.cu")),
    *((("rope_append.cu", {**BF16, "KV_INT8": 1}), arch) for arch in ("80", "90a", "120")),
    *((("rope_append.cu", {**F16, "KV_FP8": 1}), arch) for arch in ("86", "89", "100")),
    *((("rope_append.cu", {**BF16, **kv, "QK_NORM": 1}), "90a") for kv in ({}, {"KV_INT8": 1}, {"KV_FP8": 1})),
    *((("quantize.cu", {**BF16, f"WEIGHT_{kind}": 1}), arch) for kind in ("INT8", "FP8", "INT4") for arch in ("80", "90a")),
    *((("quantize.cu", {**F16, f"WEIGHT_{kind}": 1}), arch) for kind in ("FP8", "INT4") for arch in ("86", "89")),
    (("embedding.cu", {}), "86"),
    *((stream, "90a") for stream in STREAMS),
    *((PLAN, arch) for arch in ("80", "90a", "120")),
]


SM90 = [persistent.variant_sm90(dtype, dim, kv) for dtype in ops.DTYPES for dim in (64, 128) for kv in (dtype, "uint8")]


def compile_variant(source: str, defines: dict[str, int], arch: str) -> str:
    """ptxas's report on the kernels of a source; DeviceError with the first error where it does not compile."""
    return jit.compile_text(jit.source_text(source, defines), f"sm_{arch}", ["--ptxas-options=-v"])[1]


def usage(log: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes spilled or in local memory)} from ptxas's report."""
    found = {}
    for name, body in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", log, re.DOTALL):
        registers = int(re.search(r"Used (\d+) registers", body)[1])
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", body).groups())
        found[name] = registers, stack + stores + loads
    return found


def shared_bytes(name: str, defines: dict[str, int]) -> int:
    kv_bytes = 1 if {"KV_FP8", "KV_INT8"} & set(defines) else 2
    if name == persistent.NAMES["sm90"]:
        return persistent.shared_bytes_sm90(defines["HEAD_DIM"], defines["STAGES"], kv_bytes)
    if name == persistent.NAME:
        return persistent.shared_bytes(defines["HEAD_DIM"], defines["STAGES"], kv_bytes)
    return products.shared_bytes(defines) if name == products.NAME else ops.shared_bytes(name)


def key(source: str, defines: dict[str, int]) -> tuple:
    return source, tuple(sorted(defines.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant for every architecture")
    every = parser.parse_args().all
    variants = {key(source, defines): ARCHITECTURES for source, _, defines in ops.variants() + persistent.variants()}
    for dtype in ops.DTYPES:
        kinds = (None, *KINDS)
        streams = [each for kv_dtype in (dtype, "uint8") for each in chain.variants(dtype, kv_dtype, kinds)]
        variants |= {key(source, defines): ("90a",) for source, _, defines in streams}
    variants[key(*PLAN)] = ARCHITECTURES
    variants |= {key(persistent.SOURCES["sm90"], defines): ("90a",) for defines in SM90}
    matrix = [((source, dict(defines)), arch) for (source, defines), archs in sorted(variants.items()) for arch in archs]
    pairs = matrix if every else NAMED

    failures, start = 0, time.perf_counter()
    print(f"{'kernel':<28}{'variant':<52}{'sm_':<6}{'registers':>9}{'spilled':>9}{'shared':>8}")
    for (source, defines), arch in pairs:
        variant = " ".join(key if key.startswith("DTYPE") else f"{key}={value}" for key, value in defines.items())
        assert key(source, defines) in variants, f"nothing asks for {source} {variant}"
        try:
            kernels = usage(compile_variant(source, defines, arch))
        except DeviceError as error:
            print(f"{source:<28}{variant:<52}{arch:<6} FAILED: {error}")
            failures += 1
            continue
        for name, (registers, spilled) in sorted(kernels.items()):
            print(f"{name:<28}{variant:<52}{arch:<6}{registers:>9}{spilled:>9}{shared_bytes(name, defines):>8}")
            failures += spilled > 0
    print(f"{len(pairs)} pairs in {time.perf_counter() - start:.1f} s, {failures} failures or spills")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
