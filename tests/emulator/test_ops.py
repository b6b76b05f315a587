"""The kernels and the host code of `cupaged.ops.cuda`, emulated, against `cupaged.ops.numpy`."""

import pytest
from op_cases import CASES, check


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operation_is_what_its_numpy_twin_says(ops, case, dtype):
    check(ops, case, dtype)
