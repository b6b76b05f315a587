"""Steps of one token a sequence as captured graphs: the forward pass once for each number of sequences, then replayed."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.attention.planner import DECODE_ROWS
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.model.llama import Batch, Llama
from cupaged.model.parameters import kinds
from cupaged.model.sampling import DRAWS
from cupaged.ops import captured, chain, cuda, products

Array = Any  # cupy.ndarray

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sequences that there are graphs for; of more see `_sizes`
# What a graph reads for each row, beside what its planners have, in this order: the seed, which is aligned to 8 bytes, first,
# the token, which may be there already, last.
_INPUTS = [(name, DRAWS[name]) for name in sorted(DRAWS.names, key=lambda name: name != "seed")]
_INPUTS.append(("token_ids", np.dtype(np.int32)))


def variants(config: ModelConfig, dtype: str, kv_dtype: str, quantization: str | None, max_num_seqs: int) -> list[jit.Variant]:
    """The kernels of a Decoder, beside those of `ops.cuda`."""
    step = attention.kernel.STEP["sm80"]  # of decodes, on every device; to ask for a grid would compile a kernel first
    found = [(attention.device_plan.SOURCE, attention.device_plan.NAME, {"STEP": step})]
    if products.takes(config, quantization):
        most = min(_sizes(max_num_seqs)[-1], products.MOST_ROWS)
        found += chain.variants(dtype, kv_dtype, kinds(quantization), most)
    if config.num_heads > config.num_kv_heads * DECODE_ROWS:  # decodes have tiles of prefill class
        found += attention.kernel.variants_of_device(dtype, config.head_dim, kv_dtype, batch_invariant=True)
    return found


def _sizes(most: int) -> list[int]:
    """Numbers of sequences that there are graphs for, up to the first that is at least `most`."""
    sizes = list(_SIZES)
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(32, 1 << sizes[-1].bit_length() - 3))
    return sizes[: bisect.bisect_left(sizes, most) + 1]


class Drawn:
    """Tokens that the device is about to draw."""

    def __init__(self, host: np.ndarray, copied: Any, count: int) -> None:
        self._host, self._copied, self._count = host, copied, count

    def tokens(self) -> list[int]:
        """They are waited for; to be asked for before the step after the next one is queued."""
        self._copied.synchronize()
        return self._host[: self._count].tolist()


class Decoder:
    """The logits of a model for steps of one token a sequence, and draws from them, on one GPU.

    A graph is captured when a step of its size first comes; a step with fewer sequences has rows that belong to none. Where
    `products.takes` the model, up to products.MOST_ROWS sequences are computed by a `Chain`; else the operations of `ops.cuda`
    are captured one by one. The pools are those of every step. Everything is queued on the current stream, which must be the
    same for all steps.
    """

    def __init__(
        self, model: Llama, k_pool: Array, v_pool: Array, kv_scales: Array | None, max_model_len: int, max_num_seqs: int
    ) -> None:
        self._model, self._pools = model, (k_pool, v_pool, kv_scales)
        self._max_model_len, self._max_num_seqs = max_model_len, min(max_num_seqs, attention.device_plan.MOST_SEQUENCES)
        self._most_chained = products.MOST_ROWS if products.takes(model.config, model.quantization) else 0
        self._sizes = _sizes(self._max_num_seqs)
        self._graphs: dict[int, _Graph] = {}
        self._capture = _Capture()
        self._last: _Graph | None = None  # the one replayed last
        event = functools.partial(jit.import_cupy().cuda.Event, disable_timing=True)
        self._drawn = [(cuda.pinned((self._sizes[-1],), "int32"), event()) for _ in range(2)]  # tokens, and when they are there
        self._moving = cuda.upload(np.zeros(self._sizes[-1], np.int32))
        self._turn = 0

    @functools.cached_property
    def max_sequences(self) -> int:
        """That a step may have. Found out when it is first asked for: cuBLAS takes time to load."""
        if self._max_num_seqs <= self._most_chained or captured.takes_products():
            return self._max_num_seqs
        return self._most_chained

    def takes(self, batch: Batch) -> bool:
        """Whether every sequence has one token, whose logits are wanted, and there are not too many."""
        count = len(batch.seq_lens)
        return len(batch.token_ids) == len(batch.logit_rows) == count <= self.max_sequences and bool(
            (np.diff(batch.q_indptr) == 1).all()
        )

    def logits(self, batch: Batch) -> Array:
        """float32 [B, vocab] of the batch's sequences in the order of its logit_rows; overwritten by the next step."""
        batch = _in_order(batch)
        graph = self._graph_for(batch)
        graph.write(batch, np.zeros(0, DRAWS), batch.token_ids)
        return self._replay(graph)[: batch.seq_lens.size]

    def queue(self, batch: Batch, draws: np.ndarray, rows: list[int] | None = None) -> Drawn:
        """Queue the step of a batch whose logit_rows are in order, and the draw of a token for each sequence.

        draws   DRAWS [B]
        rows    where given, the token of sequence i is not in batch.token_ids but what is drawn in row rows[i] of the step
                queued last, which must be one with draws
        """
        last, graph = self._last, self._graph_for(batch)
        graph.write(batch, draws, batch.token_ids if rows is None else None)
        if rows is not None and not (last is graph and rows == list(range(len(rows)))):  # else they are where they belong
            moving, tokens = self._moving.data.ptr, graph.token_ids.data.ptr
            _copy(moving, last.token_ids.data.ptr, last.token_ids.nbytes)  # out of their own way
            starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
            for start, stop in itertools.pairwise([*starts, len(rows)]):
                _copy(tokens + 4 * start, moving + 4 * rows[start], 4 * (stop - start))
        self._replay(graph)
        # Behind this step and before the next one, which may overwrite them.
        host, copied = self._drawn[self._turn]
        self._turn ^= 1
        _copy(host.ctypes.data, graph.token_ids.data.ptr, graph.token_ids.nbytes)
        copied.record()
        return Drawn(host, copied, batch.seq_lens.size)

    def check(self) -> None:
        """DeviceError if a wait in one of the graphs has failed since the last look; only known once the device is done."""
        rooms = [graph.chain.room for graph in self._graphs.values() if graph.chain is not None]
        if any(room.flag[0] for room in rooms):
            # The next step may be under way, over what the failed one left, and fail as well.
            jit.import_cupy().cuda.get_current_stream().synchronize()
            for room in rooms:
                room.reset()
            raise DeviceError(products.WAITED_IN_VAIN)

    def _graph_for(self, batch: Batch) -> _Graph:
        size = next(size for size in self._sizes if size >= batch.seq_lens.size)
        chained = size <= self._most_chained
        for each in [size] if chained else [self._sizes[-1], size]:  # the largest first: the others have room in its memory
            if each not in self._graphs:
                self._graphs[each] = _Graph(self._model, self._pools, each, self._max_model_len, chained, self._capture)
        return self._graphs[size]

    def _replay(self, graph: _Graph) -> Array:
        self._last = graph
        return graph.replay()


def _copy(target: int, source: int, size: int) -> None:
    """Queue a copy of so many bytes from an address to another, of the device or of pinned memory."""
    runtime, stream = jit.import_cupy().cuda.runtime, jit.import_cupy().cuda.get_current_stream()
    runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream.ptr)


def _in_order(batch: Batch) -> Batch:
    """The batch with its sequences in the order of logit_rows."""
    order = batch.logit_rows
    if (order == np.arange(order.size)).all():
        return batch
    counts = np.diff(batch.page_indptr)[order]
    page_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    places = np.repeat(batch.page_indptr[:-1][order] - page_indptr[:-1], counts) + np.arange(page_indptr[-1])
    return Batch(
        batch.token_ids[order],
        np.arange(order.size, dtype=np.int32),
        batch.q_indptr,
        batch.seq_lens[order],
        page_indptr,
        batch.page_indices[places],
    )


class _Capture:
    """Makes graphs that are replayed on one stream, one after another.

    They have one memory, for what is computed within a replay; what is in it need not outlive that, but for the result, which
    holds until the next replay. Captured operations allocate there and free as always, so that later ones, and those of later
    graphs, have the same addresses: whoever writes there comes, in the order of the stream, behind all who read what was there
    before. Nobody else gets that memory, and it stays as long as this does: a pool that finds no more room in the device frees
    what it holds, but this one asks CuPy's, which frees its own, and else fails. Arrays that are to hold anything from a replay
    to the next must come from elsewhere.
    """

    def __init__(self) -> None:
        self._cupy = jit.import_cupy()
        self._stream = self._cupy.cuda.Stream(non_blocking=True)  # one for all: pools keep what they have by stream
        self._default = self._cupy.get_default_memory_pool()
        self._memory = self._cupy.cuda.MemoryPool(self._default.malloc)

    def __call__(self, compute: Callable[[], Array]) -> tuple[Any, Array]:
        """The graph of what `compute` queues, and the array that it returns, as each replay leaves it."""
        cupy, stream = self._cupy, self._stream
        cupy.cuda.get_current_stream().synchronize()
        with stream:
            compute()  # outside of that memory: all is compiled, and arrays are there that others keep, too
            stream.synchronize()
            stream.begin_capture()
            try:
                with cupy.cuda.using_allocator(self._memory.malloc):
                    result = compute()
            finally:
                graph = stream.end_capture()
        self._default.free_all_blocks(stream)  # what the first time took is of no use to other streams
        # Not the array itself: its memory is free for the next graph.
        there = cupy.cuda.UnownedMemory(result.data.ptr, result.nbytes, self._memory)
        return graph, cupy.ndarray(result.shape, result.dtype, cupy.cuda.MemoryPointer(there, 0))


class _Graph:
    """The forward pass of so many sequences and the draws from its logits, and the arrays that it reads a step from.

    What is drawn overwrites token_ids: a next step of the same sequences finds its tokens there.
    """

    def __init__(
        self,
        model: Llama,
        pools: tuple[Array, Array, Array | None],
        size: int,
        max_model_len: int,
        chained: bool,
        capture: _Capture,
    ) -> None:
        cupy, config = jit.import_cupy(), model.config
        k_pool = pools[0]
        num_blocks, block_size, head_dim = k_pool.shape[2:]
        dtype = model.params.embed.dtype.name
        grid, _ = attention.grids_of_device(head_dim, dtype, k_pool.dtype.name)
        self._planners = {
            window: attention.DevicePlanner(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                block_size=block_size,
                num_blocks=num_blocks,
                grid=grid,
                max_sequences=size,
                max_tokens=size,
                max_tokens_each=1,
                max_pages=size * min(-(-max_model_len // block_size), num_blocks),
                sliding_window=window,
            )
            for window in set(config.sliding_windows)
        }
        self.chain: chain.Chain | None = None
        if chained:
            self.chain = chain.Chain(size, dtype, k_pool.dtype.name, self._planners, max_products=4 * config.num_layers + 1)
        words = size * sum(dtype.itemsize for _, dtype in _INPUTS) // 4
        self._inputs = cuda.upload(np.zeros(words, np.int32))
        columns = _columns(self._inputs, size)
        self.token_ids = columns["token_ids"]
        self._staging = [cuda.pinned((words,), "int32") for _ in range(2)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._turn = 0
        rows = cuda.upload(np.arange(size, dtype=np.int32))
        batch = Batch(self.token_ids, rows, None, None, None, None)  # of the device; the planners have the rest
        self._batch, ops = batch, self.chain or captured.Captured(self._planners)  # the batch: the graph reads its arrays

        def step() -> Array:  # the first time of no sequences
            logits = model.forward(batch, *pools, ops=ops)
            if self.chain is not None:
                self.chain.flush()
            cuda.launch_sample(logits, [columns[name] for name in DRAWS.names], self.token_ids)
            return logits

        self._graph, self._logits = capture(step)

    def write(self, batch: Batch, draws: np.ndarray, token_ids: np.ndarray | None) -> None:
        """Queue copies of what the next replay reads. Without draws there are greedy ones; no token_ids: leave those there."""
        for planner in self._planners.values():
            planner.update(batch.q_indptr, batch.seq_lens, batch.page_indptr, batch.page_indices)
        self._turn ^= 1
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        copied.synchronize()  # the copy before the last has been made
        staging[...] = 0
        columns = _columns(staging, self.token_ids.size)
        for name in DRAWS.names:
            columns[name][: draws.size] = draws[name]
        size = staging.nbytes
        if token_ids is None:
            size -= self.token_ids.nbytes
        else:
            columns["token_ids"][: token_ids.size] = token_ids
        _copy(self._inputs.data.ptr, staging.ctypes.data, size)
        copied.record()

    def replay(self) -> Array:
        self._graph.launch(jit.import_cupy().cuda.get_current_stream())
        return self._logits


def _columns(inputs: Array, size: int) -> dict[str, Array]:
    """The columns of _INPUTS in an array of int32."""
    columns, start = {}, 0
    for name, dtype in _INPUTS:
        stop = start + size * dtype.itemsize // 4
        columns[name], start = inputs[start:stop].view(dtype), stop
    return columns
