"""`cupaged.ops.cuda` on a GPU against `cupaged.ops.numpy`: the cases of the emulator and larger ones."""

import pytest
from op_cases import (
    CASES,
    LARGE_CASES,
    QUANTISED,
    SHAPES_OF_QUANTISED,
    check,
    check_large_pool,
    check_layout,
    check_padding_rows,
    check_rows_are_independent,
    check_shared_prefix,
    check_write,
)

from cupaged.errors import OutOfMemory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_an_operation_is_what_its_numpy_twin_says(ops, case, dtype):
    check(ops, case, dtype)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rows_of_no_sequence_are_left_alone(ops, kv, qk_norm):
    check_padding_rows(ops, kv, qk_norm)


def test_a_part_of_an_array_can_be_written(ops, monkeypatch):
    check_write(ops, monkeypatch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES_OF_QUANTISED, ids=str)
def test_quantised_matrices_lie_as_other_kernels_read_them(ops, shape, kind, dtype):
    check_layout(ops, kind, dtype, shape)


def test_a_token_depends_on_its_own_row_alone(ops):
    check_rows_are_independent(ops)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_what_sequences_share_is_attended_once(ops, monkeypatch, dtype, kv):
    check_shared_prefix(ops, monkeypatch, dtype, kv)


def test_a_pool_may_be_larger_than_4_gib(ops):
    try:
        check_large_pool(ops, ops.empty)
    except OutOfMemory as error:
        pytest.skip(str(error))
