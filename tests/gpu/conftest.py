"""`cupaged.ops.cuda` on a GPU, its results poisoned before they are computed; skips where there is no GPU."""

import pytest

from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.ops import cuda


@pytest.fixture(scope="session", autouse=True)
def gpu():
    try:
        jit.check_device(0)
    except DeviceError as error:
        pytest.skip(f"no GPU to run on: {error}")
    with cuda.device(0):
        yield


@pytest.fixture
def ops(monkeypatch):
    empty = cuda.empty

    def poisoned(shape, dtype):
        array = empty(shape, dtype)
        if array.nbytes:
            array.data.memset(0xFF, array.nbytes)  # a NaN in every float type, -1 in every integer
        return array

    monkeypatch.setattr(cuda, "empty", poisoned)
    return cuda
