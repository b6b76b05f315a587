"""DevicePlanner: plans made on the device by cuda_src/plan.cu, so that a captured graph goes on while its batch changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged.attention import validation
from cupaged.attention.planner import DECODE_ROWS, Grid
from cupaged.cuda import jit
from cupaged.errors import CupagedError, InvalidArgument

Array = Any  # cupy.ndarray

SOURCE, NAME = "plan.cu", "plan"
THREADS = 512
MOST_SEQUENCES = 4096  # as many as fit into shared memory
_NO_WINDOW = 2**30
_POINTERS = "q_indptr seq_lens page_indptr header tiles ctas cost_end first_cut flag"
_NUMBERS = "num_sequences max_tokens max_tokens_each max_pages max_tiles num_kv_heads group_size block_size window num_ctas"
_NUMBERS += " tile_rows decode_rows decode_cost prefill_cost item_cost reserved"
PARAMS = np.dtype([(name, "<u8") for name in _POINTERS.split()] + [(name, "<i4") for name in _NUMBERS.split()])
assert PARAMS.itemsize == 136, "struct PlanParams of cuda_src/plan.cu"


class DevicePlanner:
    """A plan of causal attention for batches up to a fixed size, in arrays that stay where they are; `run` takes it as a Plan.

    max_sequences, max_tokens, max_pages   most sequences, rows of q, and entries of page_indices; q then has max_tokens rows,
                                           and rows of no sequence are left as they are in `out`
    max_tokens_each                        most rows of q that one sequence has; max_tokens unless given
    grid                                   one of `grids_of_device`; the first for steps of decodes only

    A step is `update(...)` (host arrays to the device), then, on the same stream, `launch()` and the runs of its layers; these
    two may be captured in a graph once `run` has been called outside of it. q_indptr, seq_lens, page_indptr and page_indices
    are arrays of the device and may be written to there instead of `update`. What is found wrong on the device is clamped, so
    that no address is illegal, and `check` raises it.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        num_blocks: int,
        grid: Grid,
        max_sequences: int,
        max_tokens: int,
        max_pages: int,
        max_tokens_each: int | None = None,
        sliding_window: int | None = None,
    ) -> None:
        validation.check_numbers(num_heads, num_kv_heads, block_size, num_blocks, sliding_window)
        validation.check_grid("grid", grid)
        max_tokens_each = max_tokens if max_tokens_each is None else max_tokens_each
        sizes = {"max_sequences": max_sequences, "max_tokens": max_tokens, "max_pages": max_pages}
        for name, value in {**sizes, "max_tokens_each": max_tokens_each}.items():
            validation.check_positive(name, value)
        if max_sequences > MOST_SEQUENCES:
            raise InvalidArgument(f"max_sequences is {max_sequences}; give {MOST_SEQUENCES} at most")
        cupy, group_size = jit.import_cupy(), num_heads // num_kv_heads
        self.device = cupy.cuda.runtime.getDevice()
        # What `run` asks a Plan for
        self.num_heads, self.num_kv_heads, self.num_tokens, self.grid = num_heads, num_kv_heads, max_tokens, grid
        self.block_size, self.num_blocks, self.pool_shape = block_size, num_blocks, (num_blocks, block_size)
        self.sliding_window, self.decode_rows, self.kernel, self.num_ctas = (
            sliding_window,
            DECODE_ROWS,
            grid.kernel,
            grid.num_ctas,
        )
        self.decode_only, self.num_slots = max_tokens_each * group_size <= DECODE_ROWS, 2 * grid.num_ctas
        self.num_entries, self.mask_words, self.pointer_rows = max_pages, None, None

        self.max_sequences, self.max_tokens_each = max_sequences, max_tokens_each
        max_tiles = max_tokens * group_size // grid.tile_rows + max_sequences
        inputs = {"q_indptr": max_sequences + 1, "seq_lens": max_sequences, "page_indptr": max_sequences + 1}
        inputs["page_indices"] = max_pages
        records = {"header": 4, "tiles": 12 * max_tiles, "ctas": 8 * grid.num_ctas, "cost_end": 2 * max_tiles}
        starts, end = {}, 0
        for name, size in {**inputs, **records, "first_cut": grid.num_ctas + 1, "flag": 1}.items():
            starts[name], end = end, end + -(-size // 4) * 4  # in int32, each from a multiple of 16 bytes on
        self._memory = cupy.asarray(np.zeros(end, np.int32))
        views = {name: self._memory[starts[name] : starts[name] + size] for name, size in inputs.items()}
        self.q_indptr, self.seq_lens = views["q_indptr"], views["seq_lens"]
        self.page_indptr, self.page_indices = views["page_indptr"], views["page_indices"]
        self._flag = self._memory[starts["flag"] :][:1]
        self._starts, self._max_pages = starts, max_pages
        addresses = {name: self._memory.data.ptr + 4 * start for name, start in starts.items()}
        kept = {name: addresses[name] for name in ("page_indices", "flag")}
        work = [tuple(addresses[name] for name in ("header", "tiles", "ctas"))]
        self.uploaded: dict[Any, Any] = {self.device: (self._memory, kept, work)}

        values = {name: addresses[name] for name in _POINTERS.split()}
        values |= {"num_sequences": max_sequences, "max_tokens": max_tokens, "max_tokens_each": max_tokens_each}
        values |= {"max_pages": max_pages, "max_tiles": max_tiles, "num_kv_heads": num_kv_heads, "group_size": group_size}
        values |= {"block_size": block_size, "window": min(sliding_window or _NO_WINDOW, _NO_WINDOW), "num_ctas": grid.num_ctas}
        values |= {"tile_rows": grid.tile_rows, "decode_rows": DECODE_ROWS, "decode_cost": grid.decode_cost}
        values |= {"prefill_cost": grid.prefill_cost, "item_cost": grid.item_cost}
        self._params = np.zeros((), PARAMS)
        for name, value in values.items():
            self._params[name] = value
        self._kernel = jit.kernel(SOURCE, NAME, STEP=grid.step)
        size = starts["header"]  # of what `update` copies, at most
        self._staging = [np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * size), np.int32, size) for _ in range(2)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._turn = 0

    def update(self, q_indptr: np.ndarray, seq_lens: np.ndarray, page_indptr: np.ndarray, page_indices: np.ndarray) -> None:
        """Copy a batch to the device, host arrays of int32 as `plan` takes them; queued on the current stream.

        InvalidArgument, before anything is queued, where `plan` would raise it, and where the batch is too large.
        """
        tokens = validation.check_rows(q_indptr, seq_lens, causal=True)
        validation.check_pages(seq_lens, page_indptr, page_indices, self.block_size, self.num_blocks, None)
        n, num_pages = seq_lens.size, int(page_indptr[-1])
        for what, got, most, name in (
            ("sequences", n, self.max_sequences, "seq_lens"),
            ("rows", int(q_indptr[-1]), self.num_tokens, "q_indptr"),
            ("rows in one sequence", int(tokens.max(initial=0)), self.max_tokens_each, "q_indptr"),
            ("entries", num_pages, self._max_pages, "page_indptr"),
        ):
            if got > most:
                raise InvalidArgument(f"{name} gives {got} {what}; give {most} at most, or make a DevicePlanner for more")
        self._turn ^= 1
        staging, copied, starts = self._staging[self._turn], self._copied[self._turn], self._starts
        copied.synchronize()  # the copy before the last has been made
        for name, array, rest in (
            ("q_indptr", q_indptr, q_indptr[-1]),
            ("seq_lens", seq_lens, 0),
            ("page_indptr", page_indptr, num_pages),
        ):
            start, size = starts[name], self.max_sequences + (name != "seq_lens")
            staging[start : start + array.size] = array
            staging[start + array.size : start + size] = rest
        start = starts["page_indices"]
        staging[start : start + num_pages] = page_indices[:num_pages]
        cuda = jit.import_cupy().cuda
        size, stream = 4 * (start + num_pages), cuda.get_current_stream()
        target, to_device = self._memory.data.ptr, cuda.runtime.memcpyHostToDevice
        cuda.runtime.memcpyAsync(target, staging.ctypes.data, size, to_device, stream.ptr)
        copied.record(stream)

    def launch(self) -> None:
        """Queue the planning of what the arrays hold then, on the current stream."""
        shared = 8 * (32 + self.max_sequences)
        self._kernel((1, 1, 1), (THREADS, 1, 1), (self._params,), shared_mem=shared)

    def check(self) -> None:
        """Wait for the current stream; CupagedError if since the last check anything in the arrays had to be clamped."""
        if jit.import_cupy().asnumpy(self._flag)[0]:
            self._flag[...] = 0
            cause = "a batch planned on the device had a length or a page id that cannot be, and its results are wrong"
            raise CupagedError(f"{cause}; correct q_indptr, seq_lens, page_indptr or page_indices and run the step again")
