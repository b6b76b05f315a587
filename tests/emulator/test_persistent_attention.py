"""cuda_src/persistent_attention.cu, emulated, over small ragged batches and many schedules."""

import re
import shutil
import types
import zlib

import attention_cases
import numpy as np
import pytest
from attention_cases import CASES, Case
from op_cases import SEED

from cupaged.attention import kernel as attention
from cupaged.cuda import jit

from . import emulator
from .emulator import EmulationError
from .guarded_memory import GuardedMemory


class LargeSharedMemory:
    """An emulated kernel with RawKernel's way to ask for more than 48 KiB of shared memory."""

    def __init__(self, kernel, memory):
        self.kernel, self.memory = kernel, memory
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, shared_mem=0):
        kernel = self.kernel
        assert shared_mem <= self.max_dynamic_shared_size_bytes <= 232448
        values = [kernel._pass(i, arg, kind) for i, (arg, kind) in enumerate(zip(args, kernel._parameters, strict=True))]
        pointers = (emulator.ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        seed = emulator.schedules.getrandbits(31)
        failure = kernel._launch(pointers, (emulator.ctypes.c_uint * 3)(*grid, 1, 1), block[0], shared_mem, seed)
        if failure:
            raise EmulationError(f"{kernel.name}: {failure.decode()} (schedule {seed})")
        self.memory.check()


@pytest.fixture
def device(monkeypatch):
    """A device of NumPy arrays for `attention.run`: what is empty is NaN, the workspace too."""
    memory = GuardedMemory()
    memory.cuda.runtime = types.SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setattr(attention.ops, "cupy", memory)
    monkeypatch.setattr(attention, "_workspaces", {})
    monkeypatch.setattr(jit, "kernel", lambda source, name, **d: LargeSharedMemory(emulator.emulate(source, name, **d), memory))

    def run(case, rng=None, times=1):
        """The case's inputs, and the (out, lse) of so many runs from one plan."""
        monkeypatch.setattr(attention, "_shared_memory_per_sm", lambda device: attention_cases.SHARED_MEMORY[case.sm])
        drawn = attention_cases.draw(case, rng or np.random.default_rng([SEED, zlib.crc32(str(case).encode())]))
        arrays = [memory.asarray(x) for x in (drawn.q, drawn.k_pool, drawn.v_pool)]
        results = []
        for _ in range(times):
            results.append(attention.run(drawn.plan, *arrays, return_lse=True))
            workspace = attention._workspaces.get(0)
            if workspace:
                assert not workspace.counters.any(), "counters are not left at zero"
                workspace.out[:] = workspace.lse[:] = np.nan
        return drawn, results

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(device, case):
    drawn, results = device(case)
    attention_cases.check(drawn, *results[0])


@pytest.mark.parametrize("number", range(6))
def test_attention_of_any_batch(device, number):
    rng = np.random.default_rng([SEED, 3, number])
    drawn, results = device(attention_cases.random_case(rng, most=200, num_ctas=int(rng.integers(1, 12))))
    attention_cases.check(drawn, *results[0])


def test_a_pool_may_be_larger_than_4_gib(device):
    drawn, _ = device(Case(((100, 3), (40, 40)), heads=(4, 2)), times=0)

    def put(pool, block, values):
        pool[:, block] = values

    large = attention_cases.in_large_pool(drawn, np.zeros, put)  # memory that is never touched is never taken
    attention_cases.check(drawn, *attention.run(large[0], drawn.q, *large[1:], return_lse=True))


def test_every_schedule_gives_the_same_bits(device):
    """Also from run to run of one plan, whoever merges the parts."""
    case = Case(((500, 1), (40, 40), (3, 1), (290, 20)), num_ctas=14, block_size=4)
    drawn, results = device(case, times=25)
    attention_cases.check(drawn, *results[0])
    assert len(drawn.plan.tasks) > 1
    assert drawn.plan.tasks[:, 1].max() > 2
    assert len({out.tobytes() + lse.tobytes() for out, lse in results}) == 1


FILES = ("persistent_attention.cu", "kv_ring.cuh", "attention_tile_sm80.cuh")
BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]+>\(\));")
MUTANTS = [
    (file, match.span(), "") for file in FILES for match in BARRIER.finditer((jit.source_folder() / file).read_text())
] + [
    (file, match.span(), new)
    for file, old, new in [
        ("kv_ring.cuh", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
        ("persistent_attention.cu", "decode && position != item.first_step()", "decode"),  # a barrier of warps only
        (
            "persistent_attention.cu",
            "shared.counted + 1 != task.num_parts",
            "shared.counted + 2 != task.num_parts",
        ),  # too early
        ("persistent_attention.cu", "counters[item.task] = 0;", ""),
    ]
    for match in re.finditer(re.escape(old), (jit.source_folder() / file).read_text())
]
SHOWING = [  # few steps; tasks of three parts; CTAs of many items
    Case(((700, 1), (300, 20)), heads=(2, 1), num_ctas=9),
    Case(((300, 1), (100, 30), (70, 1), (140, 60)), num_ctas=5),
    Case(((300, 1), (100, 30), (70, 1), (140, 60)), num_ctas=1, sm=86),
]


def name_of(mutant):
    file, (start, stop), _ = mutant
    text = (jit.source_folder() / file).read_text()
    return f"{file}:{text[:start].count(chr(10)) + 1} {text[start:stop]}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_no_barrier_can_be_missing(device, monkeypatch, tmp_path, mutant):
    file, (start, stop), new = mutant
    folder = shutil.copytree(jit.source_folder(), tmp_path / "cuda_src")
    text = (folder / file).read_text()
    (folder / file).write_text(text[:start] + new + text[stop:])
    monkeypatch.setattr(jit, "source_folder", lambda: folder)
    assert any(fails(device, case) for case in SHOWING * 25), "the kernel works as well without it"


def fails(device, case):
    try:
        drawn, results = device(case)
        attention_cases.check(drawn, *results[0])
    except (AssertionError, EmulationError):
        return True
    return False
