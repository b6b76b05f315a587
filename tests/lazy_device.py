"""A device that computes what is queued in order, but as late as it can; and a model of integers. For the engine's policy."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np

from cupaged.errors import DeviceError
from cupaged.model.llama import Batch
from cupaged.model.sampling import DRAWS
from cupaged.ops import numpy as numpy_ops


class LazyOps:
    """`cupaged.ops.numpy`, whose operations on the pool first let the device finish what was queued before."""

    def __init__(self) -> None:
        self.finish_queue = lambda: None

    def __getattr__(self, name: str) -> object:
        return getattr(numpy_ops, name)

    def copy_blocks(self, pool: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        self.finish_queue()
        numpy_ops.copy_blocks(pool, sources, targets)


class LazyDecoder:
    """Stands in for `cupaged.model.decoder.Decoder` over `compute(batch) -> logits`, and checks how it is used.

    A step that is queued runs when its tokens, or something queued behind it, are waited for.
    """

    def __init__(self, compute, max_sequences: int = 64) -> None:
        self._compute, self.max_sequences = compute, max_sequences
        self._queue: deque[_Drawn] = deque()
        self._tokens: np.ndarray | None = None  # of the last step that ran; None: it had no draws
        self.num_queued = 0  # steps with draws
        self.queued_behind: list[int] = []  # for each wait, how many steps were queued behind the one waited for
        self.fails = False  # the flag that a kernel raises
        self.before_tokens = lambda: None

    def takes(self, batch: Batch) -> bool:
        count = len(batch.seq_lens)
        return len(batch.token_ids) == len(batch.logit_rows) == count <= self.max_sequences and bool(
            (np.diff(batch.q_indptr) == 1).all()
        )

    def logits(self, batch: Batch) -> np.ndarray:
        self.finish_queue()
        self._tokens = None
        return self._compute(batch)

    def queue(self, batch: Batch, draws: np.ndarray, rows: list[int] | None = None) -> _Drawn:
        count = len(batch.seq_lens)
        assert 0 < count <= self.max_sequences
        assert (batch.logit_rows == np.arange(count)).all()
        assert (batch.q_indptr == np.arange(count + 1)).all()
        assert (draws["position"] == batch.seq_lens).all()
        assert len(batch.token_ids if rows is None else rows) == len(draws) == count
        for array in (batch.logit_rows, batch.q_indptr, batch.seq_lens, batch.page_indptr, batch.page_indices):
            assert array.dtype == np.int32
        self.num_queued += 1
        drawn = _Drawn(self, batch, draws.copy(), None if rows is None else list(rows), self.num_queued)
        self._queue.append(drawn)
        return drawn

    def check(self) -> None:
        if self.fails:
            self.finish_queue()
            self.fails = False
            raise DeviceError("a kernel waited in vain; try once more")

    def finish_queue(self, last: _Drawn | None = None) -> None:
        """Run what is queued, up to a step."""
        while self._queue and (last is None or last.result is None):
            step = self._queue.popleft()
            token_ids = step.batch.token_ids if step.rows is None else self._tokens[step.rows]
            batch = Batch(**{**vars(step.batch), "token_ids": token_ids.astype(np.int32)})
            logits = self._compute(batch)
            self._tokens = step.result = numpy_ops.sample(logits, *(step.draws[name] for name in DRAWS.names))


class _Drawn:
    def __init__(self, decoder: LazyDecoder, batch: Batch, draws: np.ndarray, rows: list[int] | None, number: int) -> None:
        self._decoder, self.batch, self.draws, self.rows, self._number = decoder, batch, draws, rows, number
        self.result: np.ndarray | None = None

    def tokens(self) -> list[int]:
        behind = self._decoder.num_queued - self._number
        assert behind <= 1, "its place on the host is another step's"
        self._decoder.queued_behind.append(behind)
        self._decoder.before_tokens()
        self._decoder.finish_queue(self)
        return self.result.tolist()


class IntegerModel:
    """Stands in for `Llama`: the K/V of a position is a number mixed from its token and all K/V before, read through the pages.

    So one wrong slot, read or written, changes every logit after it; and a row does not depend on what else is in the batch.
    """

    VOCAB = 12

    def __init__(self, num_blocks: int, block_size: int, ahead: bool, max_sequences: int = 64) -> None:
        self.config, self.ops = SimpleNamespace(vocab_size=self.VOCAB), LazyOps()
        rng = np.random.default_rng()
        k = rng.integers(0, 2**32, (1, 1, num_blocks, block_size, 2), np.uint32)  # 8 bytes a slot: a uint64
        self.pool = SimpleNamespace(num_blocks=num_blocks, block_size=block_size, k=k, v=None, scales=None, by_block=[k])
        self.decoder = LazyDecoder(self._compute, max_sequences) if ahead else None
        if ahead:
            self.ops.finish_queue = self.decoder.finish_queue

    def forward(self, batch: Batch, *_: object) -> np.ndarray:
        if self.decoder is not None:
            if self.decoder.takes(batch):
                return self.decoder.logits(batch)
            self.decoder.finish_queue()
        return self._compute(batch)

    def check(self) -> None:
        if self.decoder is not None:
            self.decoder.check()

    def _compute(self, batch: Batch) -> np.ndarray:
        slots = self.pool.k.reshape(self.pool.num_blocks, -1).view(np.uint64)
        size, sums = self.pool.block_size, []
        written = set()
        for b, length in enumerate(batch.seq_lens.tolist()):
            pages = batch.page_indices[batch.page_indptr[b] : batch.page_indptr[b + 1]]
            tokens = batch.token_ids[batch.q_indptr[b] : batch.q_indptr[b + 1]].tolist()
            assert pages.min() > 0
            assert pages.max() < self.pool.num_blocks
            for position in range(length - len(tokens), length):
                places = np.arange(position + 1)
                before = slots[pages[places[:-1] // size], places[:-1] % size].sum()
                token = tokens[position - length]
                assert 0 <= token < self.VOCAB
                place = pages[position // size], position % size
                assert place not in written, "two tokens are written to one slot"
                written.add(place)
                slots[place] = _mixed(before + np.uint64((position << 8) + token + 1))
                sums.append(slots[pages[places // size], places % size].sum())
        seen = np.array(sums, np.uint64)[batch.logit_rows]
        noise = _mixed(seen[:, None] + np.arange(1, self.VOCAB + 1, dtype=np.uint64))
        return (noise >> np.uint64(40)).astype(np.float32) / np.float32(2**22)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014)"""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
