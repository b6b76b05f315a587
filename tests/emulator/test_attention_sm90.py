"""cuda_src/persistent_attention_sm90.cu, emulated: wgmma, mbarriers and tensor copies at their least convenient times."""

import ctypes
import dataclasses

import attention_cases
import numpy as np
import pytest
from attention_cases import Case
from op_cases import SEED

from cupaged.attention import Grid, plan
from cupaged.attention import kernel as attention
from cupaged.cuda import jit, tensor_map

from . import emulator
from .guarded_memory import GuardedMemory

ROWS, COLUMNS = tensor_map.ROWS, tensor_map.COLUMNS


def encode(address, rows, columns, box_rows, dtype):
    """What tensor_map.encode_atoms makes, of an array of the host."""
    assert dtype in ("bfloat16", "float16")
    elements = np.ctypeslib.as_array((ctypes.c_uint16 * (rows * columns)).from_address(address))
    atoms = elements.reshape(rows // ROWS, ROWS, columns // COLUMNS, COLUMNS).swapaxes(1, 2)
    return emulator.tensor_map(atoms, (box_rows // ROWS, columns // COLUMNS, ROWS, COLUMNS))


@pytest.fixture
def run(monkeypatch):
    """The inputs of a case, with a plan for the sm90 kernel, and the (out, lse) of so many runs from it."""
    memory = GuardedMemory()
    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(attention, "_workspaces", {})
    monkeypatch.setattr(tensor_map, "encode_atoms", encode)

    def kernel(source, name, **defines):
        kernel = emulator.emulate(source, name, **defines)
        kernel.after_launch = memory.check
        return kernel

    monkeypatch.setattr(jit, "kernel", kernel)

    def run(case, rng, times=1, **grid):
        drawn = attention_cases.draw(case, rng)
        old = drawn.plan
        sizes = {name: getattr(old, name) for name in ("num_heads", "num_kv_heads", "block_size", "num_blocks")}
        batch = old.q_indptr, old.seq_lens, old.page_indptr, old.page_indices
        wide = Grid(case.num_ctas, 128, 128, 3, 4, 8, kernel="sm90", **grid)
        rules = {"causal": case.causal, "sliding_window": case.window}
        made = plan(*batch, **sizes, **rules, decode_grid=Grid(1), prefill_grid=wide)
        assert made.kernel == "sm90"
        drawn = dataclasses.replace(drawn, plan=made)
        arguments, keywords, _kept = attention_cases.arguments_of(drawn, memory.asarray)
        results = []
        for _ in range(times):
            results.append(attention.run(made, *arguments, return_lse=True, **keywords))
            workspace = attention._workspaces[0]
            assert not workspace.counters.any(), "counters are not left at zero"
            assert not workspace.flag.any(), "a page id is said to be out of range"
            workspace.out[:] = workspace.lse[:] = np.nan
        return drawn, results

    return run


CASES = [
    Case(((70, 70),), (4, 1), 64, 16, num_ctas=1),
    Case(((70, 70),), (4, 1), 128, 8, num_ctas=2, dtype="float16"),
    Case(((300, 70), (33, 20), (1, 1), (150, 17)), (4, 2), 64, 32, num_ctas=3),
    Case(((200, 1), (19, 19), (0, 0), (350, 40), (1, 1), (31, 2), (5, 0), (128, 1)), (8, 1), 64, 16, num_ctas=4),
    Case(((0, 1), (140, 1), (0, 30)), (4, 1), 64, 16, num_ctas=2),
    Case(((300, 60),), (3, 1), 64, 64, window=50, num_ctas=2),
    Case(((300, 60), (150, 1)), (4, 1), 64, 256, causal=False, num_ctas=3),
    Case(((70, 70),), (4, 1), 64, 16, num_ctas=1, kv="fp8"),
    Case(((300, 140),), (4, 2), 128, 8, num_ctas=2, kv="fp8"),
    Case(((500, 20), (40, 1)), (4, 1), 128, 16, num_ctas=4, dtype="float16", kv="fp8"),
    Case(((300, 70), (33, 20), (1, 1), (150, 17)), (4, 2), 64, 8, num_ctas=3, kv="fp8"),
    Case(((200, 1), (19, 19), (0, 0), (350, 40), (1, 1), (31, 2), (5, 0), (128, 1)), (16, 2), 64, 16, num_ctas=4, kv="fp8"),
    Case(((200, 1), (19, 19), (0, 0), (350, 40), (1, 1)), (8, 1), 128, 32, num_ctas=3, kv="fp8"),
    Case(((0, 1), (140, 1), (0, 30)), (4, 1), 64, 16, num_ctas=2, dtype="float16", kv="fp8"),
    Case(((300, 60),), (3, 1), 64, 64, window=50, num_ctas=2, kv="fp8"),
    Case(((600, 60), (400, 1)), (6, 2), 128, 16, window=200, num_ctas=3, kv="fp8"),
    Case(((300, 60), (150, 1)), (4, 1), 128, 256, causal=False, num_ctas=3, kv="fp8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(run, case):
    rng = np.random.default_rng([SEED, 31, CASES.index(case)])
    drawn, results = run(case, rng)
    attention_cases.check(drawn, *results[0])


@pytest.mark.parametrize("kv", [None, "fp8"])
def test_dealt_tasks(run, kv):
    """Several records for a CTA."""
    case = Case(((320, 320), (70, 33)), (8, 2), 64, num_ctas=2, kv=kv)
    drawn, results = run(case, np.random.default_rng([SEED, 32]), deals=True)
    assert len(drawn.plan.ctas) > 2
    attention_cases.check(drawn, *results[0])


@pytest.mark.parametrize("kv", [None, "fp8"])
def test_every_schedule_gives_the_same_bits(run, kv):
    case = Case(((500, 20), (40, 1)), (4, 1), 64, num_ctas=4, kv=kv)
    drawn, results = run(case, np.random.default_rng([SEED, 33]), times=4)
    assert drawn.plan.ctas[:, 6:].max() > 1, "no task is cut"
    attention_cases.check(drawn, *results[0])
    assert len({out.tobytes() + lse.tobytes() for out, lse in results}) == 1


MUTATIONS = {
    "keys are not waited for": ("    mbarrier_wait_parity(&shared.rings.full[K][k_turn.stage], k_turn.parity);\n  }", "  }"),
    "values are not waited for": (
        "    mbarrier_wait_parity(&shared.rings.full[V][v_turn.stage], v_turn.parity);\n    if (clear",
        "    if (clear",
    ),
    "scores are not waited for": ("wgmma_wait<1>();  // for the scores", ""),
    "products with values are not waited for": (
        "  __device__ __forceinline__ void wait_for_values() {\n    wgmma_wait<0>();",
        "  __device__ __forceinline__ void wait_for_values() {",
    ),
    "a stage is refilled in use": ("      mbarrier_wait_parity(&rings.empty[ring][turn.stage], turn.parity ^ 1);\n", ""),
    "queries are not fenced": ("convert_queries(tile);\n      fence_proxy_async_shared();", "convert_queries(tile);"),
    "queries are replaced in use": ("    mbarrier_wait_parity(&room.empty, turn ^ 1);\n", ""),
    "rows past the end are not cleared": ("    clear(max(part.kv_stop - position, slot), slot + count);\n", ""),
    "what is cleared is not fenced": ("    fence_proxy_async_shared();\n    return true;", "    return true;"),
    "parts are counted before they are written": ("atom_add_acq_rel_gpu(counter, 1)", "atom_add_relaxed_gpu(counter, 1)"),
}
MUTATIONS_FP8 = {
    "codes are not waited for": ("    mbarrier_wait_parity(&rings.landed[ring][stage], turn.parity ^ 1);\n", ""),
    "a tile is written in use": ("    mbarrier_wait_parity(&rings.empty[ring][stage], turn.parity);\n", ""),
    "tiles are not fenced": ("    fence_proxy_async_shared();\n    __syncwarp();\n", "    __syncwarp();\n"),
    "queries are not converted": ("      if constexpr (CONVERT_QUERIES) convert_queries(tile);\n", ""),
    "rows past the end are not cleared": MUTATIONS["rows past the end are not cleared"],
    "scores are of another head's scale": ("scales_of(params, part.kv_head).at[0];", "scales_of(params, 0).at[0];"),
}


@pytest.mark.parametrize(
    ("kv", "mutation"), [*((None, name) for name in MUTATIONS), *(("fp8", name) for name in MUTATIONS_FP8)]
)
def test_a_mutation_fails(run, monkeypatch, kv, mutation):
    text, (old, new) = jit.read_source(attention.SOURCES["sm90"]), (MUTATIONS_FP8 if kv else MUTATIONS)[mutation]
    assert text.count(old) == 1
    monkeypatch.setattr(jit, "read_source", lambda source: text.replace(old, new))
    case = Case(((700, 70), (300, 40), (90, 1)), (8, 2) if kv else (4, 1), 64, num_ctas=3, kv=kv)
    rng = np.random.default_rng([SEED, 34])

    def attempt():
        for _ in range(10):
            drawn, results = run(case, rng, times=4)
            for result in results:
                attention_cases.check(drawn, *result)

    with pytest.raises((AssertionError, emulator.EmulationError)):
        attempt()
