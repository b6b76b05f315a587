"""Host arrays to a device whose copies land as late as they may: every bit arrives, whatever shape, type or place it has."""

import random
import threading
import time

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from emulator.guarded_memory import GuardedMemory, Stream
from op_cases import SEED
from reference import assert_loaded_exactly

from cupaged.cuda import jit
from cupaged.errors import OutOfMemory
from cupaged.ops import cuda, staging

DTYPES = ["float32", "float16", ml_dtypes.bfloat16, "int8", "uint8", "int32", "float64"]


class LateMemory(GuardedMemory):
    """A device that copies from a pinned array when it is waited for, and not before: what is then in it is what arrives."""

    def __init__(self):
        super().__init__()
        self.queue = []  # copies and events, in the order of the stream
        self.pinned_bytes = 0
        runtime, memory = self.cuda.runtime, self

        def late(copy):
            return lambda *args: self.queue.append(lambda: copy(*args))

        runtime.memcpyAsync, runtime.memcpy2DAsync = late(runtime.memcpyAsync), late(runtime.memcpy2DAsync)

        class LateStream(Stream):
            def record(self, stream=None):
                memory.queue.append(self)

            def synchronize(self):
                """Of an event: run what is queued before it; of the stream: all."""
                while memory.queue and (self in memory.queue or not self.is_event):
                    if (first := memory.queue.pop(0)) is not self:
                        first() if callable(first) else None

            def __init__(self, is_event=False, **_):
                self.is_event = is_event

        self.cuda.get_current_stream = LateStream
        self.cuda.Event = lambda **options: LateStream(is_event=True, **options)
        self.cuda.alloc_pinned_memory = self._alloc

    def _alloc(self, size):
        self.pinned_bytes = max(self.pinned_bytes, size)
        return bytearray(b"\xff" * size)

    def asnumpy(self, array):
        self.cuda.get_current_stream().synchronize()
        return super().asnumpy(array)


@pytest.fixture
def memory(monkeypatch):
    memory = LateMemory()
    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(cuda, "cupy", memory)
    return memory


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(staging, "SLICE_BYTES", 1000)


def random_bits(shape, dtype):
    """Any bits, NaNs and infinities among them."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng([SEED, 41]).bytes(count), dtype).reshape(shape)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", [None, "bfloat16", "float16", "float32"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of conversions that overflow
def test_an_upload_is_what_a_conversion_on_the_host_gives(memory, source, target):
    for shape in ((4099,), (1,), (0, 5), (3, 1, 997), (250, 40)):
        array = random_bits(shape, source)
        for given in (array, array.T, array[::-1]):
            found = cuda.upload(given, target)
            assert found.shape == given.shape
            assert found.tobytes() == given.astype(target or source).tobytes(), (shape, target)
    memory.check()


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("source", ["float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("whole", "place"),
    [
        ((4099,), slice(None)),
        ((70, 64), slice(7, 31)),
        ((9, 2, 8, 33), (slice(None), 1)),  # rows of 528 bytes, with gaps
        ((5, 2, 8, 501), (slice(None), 0)),  # rows larger than a slice
        ((1, 2, 8, 501), (slice(None), 1)),
        ((3, 2, 0, 501), (slice(None), 1)),
    ],
)
def test_a_part_is_written_and_what_is_beside_it_stays(memory, source, whole, place):
    expected = random_bits(whole, ml_dtypes.bfloat16).copy()
    target = memory.asarray(expected)
    given = np.random.default_rng([SEED, 42]).standard_normal(expected[place].shape).astype(source)
    expected[place] = given
    cuda.write(target[place], given)
    assert target.tobytes() == expected.tobytes()
    memory.check()


def test_the_host_holds_no_more_than_the_slices(memory, monkeypatch):
    monkeypatch.setattr(staging, "SLICE_BYTES", 4096)
    array = np.random.default_rng().standard_normal((500, 1001), np.float32)
    assert cuda.upload(array, "bfloat16").tobytes() == array.astype("bfloat16").tobytes()
    assert 0 < memory.pinned_bytes <= staging.most_pinned_bytes() < array.nbytes / 10


def misalign(folder, padding):
    """Move all tensors of a file by so many bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip() + b" " * padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_checkpoint_arrives_bit_for_bit(memory, tmp_path, stored, padding):
    """Odd geometry, tensors at odd places of the file: every array of the model is that of the operations on the CPU."""
    given = {**tiny_models.CONFIGS["llama-bias"], "intermediate_size": 173, "vocab_size": 261, "torch_dtype": stored}
    folder = tiny_models.write_model(tmp_path, given)
    misalign(folder, padding)
    assert_loaded_exactly(cuda, folder, "bfloat16")
    memory.check()


@pytest.mark.usefixtures("small_slices")
def test_no_pinned_memory_is_one_line(memory):
    class RefusedError(Exception):
        pass

    def refuse(size):
        raise RefusedError("cudaErrorMemoryAllocation: out of memory")

    memory.cuda.runtime.CUDARuntimeError, memory.cuda.alloc_pinned_memory = RefusedError, refuse
    with pytest.raises(OutOfMemory, match=r"no 0 MB of pinned memory.*; "):
        cuda.upload(np.zeros(5000, np.float32))


@pytest.mark.usefixtures("small_slices")
def test_what_breaks_off_leaves_no_thread_at_work(memory, monkeypatch):
    """An interrupt in the midst of it: no slice is filled or fetched any more once it is told."""
    fill, started, ended = staging._fill, [], []

    def counted(*args):
        started.append(1)
        time.sleep(random.uniform(0, 0.02))
        fill(*args)
        ended.append(1)

    def interrupted(*args):
        if len(started) > len(ended):  # a thread is at work
            raise KeyboardInterrupt
        copy(*args)

    copy = memory.cuda.runtime.memcpyAsync
    memory.cuda.runtime.memcpyAsync = interrupted
    monkeypatch.setattr(staging, "_fill", counted)
    with pytest.raises(KeyboardInterrupt):
        cuda.upload(np.zeros(500_000, np.float32))
    assert len(started) == len(ended) < 2000
    assert memory.queue == []
    assert not [thread for thread in threading.enumerate() if "staging" in thread.name]
    memory.cuda.runtime.memcpyAsync = copy
    assert cuda.upload(np.ones(5000, np.float32)).tobytes() == np.ones(5000, np.float32).tobytes()
