"""cuda_src/persistent_attention.cu, emulated, over small ragged batches and many schedules."""

import re
import shutil
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


@pytest.fixture
def device(monkeypatch):
    """A device of NumPy arrays for `attention.run`: what is empty is NaN, the workspace too."""
    memory = GuardedMemory()
    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(attention, "_workspaces", {})

    def kernel(source, name, **defines):
        kernel = emulator.emulate(source, name, **defines)
        kernel.after_launch = memory.check
        return kernel

    monkeypatch.setattr(jit, "kernel", kernel)

    def run(case, rng=None, times=1, change=lambda drawn: None):
        """The case's inputs, and the (out, lse) of so many runs from one plan."""
        monkeypatch.setattr(attention, "_shared_memory_per_sm", lambda device: attention_cases.SHARED_MEMORY[case.sm])
        drawn = attention_cases.draw(case, rng or np.random.default_rng([SEED, zlib.crc32(str(case).encode())]))
        change(drawn)
        arguments, keywords, _kept = attention_cases.arguments_of(drawn, memory.asarray)
        results = []
        for _ in range(times):
            results.append(attention.run(drawn.plan, *arguments, return_lse=True, **keywords))
            workspace = attention._workspaces.get(0)
            if workspace:
                assert not workspace.counters.any(), "counters are not left at zero"
                workspace.out[:] = workspace.lse[:] = np.nan
        return drawn, results

    run.memory = memory
    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(device, case):
    drawn, results = device(case)
    attention_cases.check(drawn, *results[0])
    workspace = attention._workspaces.get(0)
    assert workspace is None or not workspace.flag.any(), "a page id is said to be out of range"


@pytest.mark.parametrize("number", range(12))
def test_attention_of_any_batch(device, number):
    rng = np.random.default_rng([SEED, 3, number])
    drawn, results = device(attention_cases.random_case(rng, most=200, num_ctas=int(rng.integers(1, 12))))
    attention_cases.check(drawn, *results[0])


def test_a_pool_may_be_larger_than_4_gib(device):
    drawn, _ = device(Case(((100, 3), (40, 40)), heads=(4, 2)), times=0)

    def put(pool, block, values):
        pool[:, block] = values

    def make(shape, dtype):
        return np.zeros(shape, dtype).view(device.memory.ndarray)  # memory that is never touched is never taken

    planned, *pools = attention_cases.in_large_pool(drawn, make, put)
    attention_cases.check(drawn, *attention.run(planned, device.memory.asarray(drawn.q), *pools, return_lse=True))


def test_without_lse(device):
    """The same output, and nothing written where no lse is wanted."""
    drawn, results = device(Case(((90, 1), (70, 30)), num_ctas=5))
    arguments, keywords, _ = attention_cases.arguments_of(drawn, device.memory.asarray)
    out = attention.run(drawn.plan, *arguments, **keywords)
    assert out.tobytes() == results[0][0].tobytes()


@pytest.mark.parametrize("kv", [None, "int8"])
def test_a_bad_page_id_is_block_0_and_raises_the_flag(device, kv):
    """As when a graph is replayed over a page table that nobody has checked; a bad id that nobody needs does nothing."""

    def spoil(drawn):
        at = drawn.plan.page_indptr[1] + 2  # third page of the second sequence
        drawn.plan.page_indices[at] = rng.choice([-1, drawn.plan.num_blocks, 2**31 - 1])
        drawn.slots[1][32:48, 0] = 0
        drawn.k_pool[:, 0] = drawn.k_pool[:, drawn.slots[0][0, 0]]  # in case nobody's block was the first
        drawn.v_pool[:, 0] = drawn.v_pool[:, drawn.slots[0][0, 0]]
        if kv:
            drawn.more["kv_scales"][:, 0] = drawn.more["kv_scales"][:, drawn.slots[0][0, 0]]
        drawn.out[:], drawn.lse[:] = attention_cases.results_of(
            drawn.q, drawn.k_pool, drawn.v_pool, drawn.slots, drawn.seen, drawn.more
        )

    rng = np.random.default_rng([SEED, 5])
    drawn, results = device(Case(((16, 1), (70, 30), (20, 1)), num_ctas=2, kv=kv), change=spoil)
    attention_cases.check(drawn, *results[0])
    assert attention._workspaces[0].flag.tolist() == [1]


def test_every_schedule_gives_the_same_bits(device):
    """Also from run to run of one plan, whoever merges the parts."""
    case = Case(((500, 1), (40, 40), (3, 1), (290, 20)), num_ctas=14, block_size=4)
    drawn, results = device(case, times=25)
    attention_cases.check(drawn, *results[0])
    assert drawn.plan.ctas[:, 6:].max() > 2, "no task is in more than two parts"
    assert len({out.tobytes() + lse.tobytes() for out, lse in results}) == 1


def test_a_rows_bits_do_not_depend_on_its_batch(device):
    """In a batch-invariant plan: alone or with others, on few CTAs or many, one row of the sequence or all that it has."""
    lengths = ((1500, 9), (40, 1), (2100, 1))
    drawn, results = device(Case(lengths, heads=(4, 2), num_ctas=7, invariant=True))
    for b, rows, num_ctas in ((0, 9, 3), (0, 1, 11), (2, 1, 4)):
        alone = Case(((lengths[b][0], rows),), heads=(4, 2), num_ctas=num_ctas, invariant=True)
        last = drawn.plan.q_indptr[b + 1]
        wanted = [x[last - rows : last] for x in results[0]]

        def same(other, b=b, rows=rows, last=last):
            other.q[:] = drawn.q[last - rows : last]
            for pool, source in ((other.k_pool, drawn.k_pool), (other.v_pool, drawn.v_pool)):
                for (page, slot), (from_page, from_slot) in zip(other.slots[0], drawn.slots[b], strict=True):
                    pool[:, page, slot] = source[:, from_page, from_slot]

        _, found = device(alone, change=same)
        assert [x.tobytes() for x in found[0]] == [x.tobytes() for x in wanted]


FILES = ("persistent_attention.cu", "kv_ring.cuh", "attention_tile_sm80.cuh")
BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]+>\(\));(?!  // for racecheck)")
MUTANTS = [
    (file, match.span(), "") for file in FILES for match in BARRIER.finditer((jit.source_folder() / file).read_text())
] + [
    (file, match.span(), new)
    for file, old, new in [
        ("kv_ring.cuh", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
        ("persistent_attention.cu", "position == part.first_step()", "false"),  # a barrier of warps only
        (
            "persistent_attention.cu",
            "shared.counted + 1 != part.num_parts",
            "shared.counted + 2 != part.num_parts",
        ),  # too early
        ("persistent_attention.cu", "counters[part.first_slot] = 0;", "counters[part.first_slot] += 0;"),
        ("persistent_attention.cu", "atom_add_acq_rel_gpu", "atom_add_relaxed_gpu"),  # nobody sees what was stored
    ]
    for match in re.finditer(re.escape(old), (jit.source_folder() / file).read_text())
]
SHOWING = [  # few chunks; tasks of three parts; CTAs of many parts
    Case(((700, 1), (300, 20)), heads=(2, 1), num_ctas=9),
    Case(((300, 1), (100, 30), (70, 1), (140, 60)), num_ctas=5),
    Case(((300, 1), (100, 30), (70, 1), (140, 60)), num_ctas=1, sm=86),
    Case(((140, 140), (70, 60)), num_ctas=1, sm=86),
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
