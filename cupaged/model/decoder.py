"""Steps of one token a sequence as captured graphs: the forward pass once for each number of sequences, then replayed."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from cupaged import attention
from cupaged.checkpoint.config import ModelConfig
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.model.llama import Batch, Llama
from cupaged.model.parameters import kinds
from cupaged.model.sampling import DRAWS
from cupaged.ops import chain, cuda, products

Array = Any  # cupy.ndarray

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sequences that there are graphs for
# What a graph reads for each row, beside what its planners have, in this order: the seed, which is aligned to 8 bytes, first,
# the token, which may be there already, last.
_INPUTS = [(name, DRAWS[name]) for name in sorted(DRAWS.names, key=lambda name: name != "seed")]
_INPUTS.append(("token_ids", np.dtype(np.int32)))


def variants(config: ModelConfig, dtype: str, kv_dtype: str, quantization: str | None) -> list[jit.Variant]:
    """The kernels of a Decoder, beside those of `ops.cuda`; none where the device or the model is not for it."""
    if not products.takes(config, quantization):
        return []
    step = attention.grids_of_device(config.head_dim, dtype, kv_dtype)[0].step
    return [
        *chain.variants(dtype, kv_dtype, kinds(quantization)),
        (attention.device_plan.SOURCE, attention.device_plan.NAME, {"STEP": step}),
    ]


class Drawn:
    """Tokens that the device is about to draw."""

    def __init__(self, host: np.ndarray, copied: Any, count: int) -> None:
        self._host, self._copied, self._count = host, copied, count

    def tokens(self) -> list[int]:
        """They are waited for; to be asked for before the step after the next one is queued."""
        self._copied.synchronize()
        return self._host[: self._count].tolist()


class Decoder:
    """The logits of a model for steps of one token for each of up to 64 sequences, and draws from them, on one GPU.

    A graph is captured when a step of its size first comes; a step with fewer sequences has rows that belong to none. The pools
    are those of every step. Everything is queued on the current stream, which must be the same for all steps.
    """

    def __init__(
        self, model: Llama, k_pool: Array, v_pool: Array, kv_scales: Array | None, max_model_len: int, max_num_seqs: int
    ) -> None:
        self._model, self._pools = model, (k_pool, v_pool, kv_scales)
        self._max_model_len, self.max_sequences = max_model_len, min(max_num_seqs, _SIZES[-1])
        self._graphs: dict[int, _Graph] = {}
        self._last: _Graph | None = None  # the one replayed last
        event = functools.partial(jit.import_cupy().cuda.Event, disable_timing=True)
        self._drawn = [(cuda.pinned((_SIZES[-1],), "int32"), event()) for _ in range(2)]  # tokens, and when they are there
        self._moving = cuda.upload(np.zeros(_SIZES[-1], np.int32))
        self._turn = 0

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
        if any(graph.chain.room.flag[0] for graph in self._graphs.values()):
            # The next step may be under way, over what the failed one left, and fail as well.
            jit.import_cupy().cuda.get_current_stream().synchronize()
            for graph in self._graphs.values():
                graph.chain.room.reset()
            raise DeviceError(products.WAITED_IN_VAIN)

    def _graph_for(self, batch: Batch) -> _Graph:
        size = next(size for size in _SIZES if size >= batch.seq_lens.size)
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._model, self._pools, size, self._max_model_len)
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


class _Graph:
    """The forward pass of so many sequences and the draws from its logits, and the arrays that it reads a step from.

    What is drawn overwrites token_ids: a next step of the same sequences finds its tokens there.
    """

    def __init__(self, model: Llama, pools: tuple[Array, Array, Array | None], size: int, max_model_len: int) -> None:
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
                max_pages=size * -(-max_model_len // block_size),
                sliding_window=window,
            )
            for window in set(config.sliding_windows)
        }
        self.chain = chain.Chain(size, dtype, k_pool.dtype.name, self._planners, max_products=4 * config.num_layers + 1)
        words = size * sum(dtype.itemsize for _, dtype in _INPUTS) // 4
        self._inputs = cuda.upload(np.zeros(words, np.int32))
        columns = _columns(self._inputs, size)
        self.token_ids = columns["token_ids"]
        self._staging = [cuda.pinned((words,), "int32") for _ in range(2)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._turn = 0
        rows = cuda.upload(np.zeros(size, np.int32))
        batch = Batch(self.token_ids, rows, None, None, None, None)  # of the device; the planners have the rest

        def forward() -> Array:
            logits = model.forward(batch, *pools, ops=self.chain)
            self.chain.flush()
            cuda.launch_sample(logits, [columns[name] for name in DRAWS.names], self.token_ids)
            return logits

        cupy.cuda.get_current_stream().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            self._logits = forward()  # of no sequences: all is compiled and every array made
            stream.begin_capture()
            forward()
            self._graph = stream.end_capture()
        stream.synchronize()

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
