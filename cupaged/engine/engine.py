"""The step loop: schedule -> forward -> sample -> detokenise."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.detokenizer import Detokenizer
from cupaged.engine.kv_pool import KVPool
from cupaged.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence
from cupaged.errors import InvalidArgument, OutOfMemory
from cupaged.model.llama import Batch, Llama
from cupaged.model.sampling import SamplingParams, SamplingRow, sample

_LOGIT_ROWS = 256  # rows whose logits are on the device at once when all are asked for


@dataclass(eq=False)
class _Candidate:
    """One completion in the making: its sequence, its text, and the request it belongs to."""

    seq: Sequence
    detokenizer: Detokenizer
    request: RequestOutput
    output: CompletionOutput
    params: SamplingParams
    seed: int
    seen: dict[int, int] | None  # kept only where a penalty asks for it


class Engine:
    """Requests in, tokens out, over one model and one KV pool.

    Args:
        model: the forward pass.
        tokenizer: for the text of completions.
        pool: the device arrays whose blocks are handed out.
        eos_token_ids: tokens that end a completion.
        max_model_len: tokens that a sequence may hold, prompt included.
        max_num_seqs, max_num_batched_tokens: limits of one step.
        enable_prefix_caching: reuse the K/V of equal prefixes.
        seed: of the draws of requests that bring none of their own.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        pool: KVPool,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.eos_token_ids, self.max_model_len = eos_token_ids, max_model_len
        self.blocks = BlockManager(pool.num_blocks, pool.block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens)
        self._candidates: dict[Sequence, _Candidate] = {}
        self._random = random.Random(seed)
        self._num_requests = 0

    def add(self, prompt: str | None, token_ids: list[int], params: SamplingParams) -> RequestOutput:
        """Queue a request; the RequestOutput is updated in place by `step` until it is finished."""
        self._check_prompt(token_ids, num_new=1)
        self._check_vocabulary("stop_token_ids holds", params.stop_token_ids)
        arrival = time.perf_counter()
        outputs = [CompletionOutput(index) for index in range(params.n)]
        metrics = RequestMetrics(arrival, num_prompt_tokens=len(token_ids))
        request = RequestOutput(str(self._num_requests), prompt, token_ids, outputs, metrics)
        self._num_requests += 1
        seed = self._random.getrandbits(64) if params.seed is None else int(params.seed) % 2**64
        limit = min(self.max_model_len, self.blocks.capacity)
        if params.max_tokens is not None:
            limit = min(limit, len(token_ids) + params.max_tokens)
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        for output in outputs:
            seq = Sequence(list(token_ids), len(token_ids), limit)
            detokenizer = Detokenizer(self.tokenizer, params.stop, params.skip_special_tokens)
            seen = dict.fromkeys(token_ids, 0) if penalised else None
            self._candidates[seq] = _Candidate(seq, detokenizer, request, output, params, seed, seen)
            self.scheduler.add(seq)
        return request

    def abort(self, request: RequestOutput) -> None:
        """End a request now and free its blocks; a finished one is left as it is."""
        for candidate in [c for c in self._candidates.values() if c.request is request]:
            self._finish(candidate, "abort", None)

    def step(self) -> None:
        """Compute one batch: every request in it moves on."""
        scheduled = self.scheduler.schedule()
        drawing = [seq for seq, count in scheduled if seq.num_computed + count == seq.num_tokens]
        logits = self._forward(scheduled, logits_of_all_rows=False)
        rows = [self._sampling_row(self._candidates[seq]) for seq in drawing]
        tokens = sample(self.model.ops, logits, rows) if rows else []
        for seq, count in scheduled:
            seq.num_computed += count
            self.blocks.publish(seq)
        for seq, token_id in zip(drawing, tokens, strict=True):
            self._append(self._candidates[seq], token_id)

    def logits(self, token_ids: list[int]) -> Iterator[np.ndarray]:
        """float32 [n, vocab] logits of all positions, some rows at a time; row t predicts token t + 1."""
        self._check_prompt(token_ids, num_new=0)
        # A sequence beside the scheduler's: it starts without cached blocks, because every row is wanted.
        seq = Sequence(token_ids, len(token_ids), len(token_ids))
        try:
            if not self.blocks.grow(seq, seq.num_tokens):
                raise OutOfMemory("the KV pool is taken by running requests; finish or abort them first")
            while seq.num_computed < seq.num_tokens:
                count = min(seq.num_tokens - seq.num_computed, self.scheduler.max_num_batched_tokens, _LOGIT_ROWS)
                yield self.model.ops.download(self._forward([(seq, count)], logits_of_all_rows=True))
                seq.num_computed += count
        finally:
            self.blocks.release(seq)

    def _check_prompt(self, token_ids: list[int], num_new: int) -> None:
        if not token_ids:
            raise InvalidArgument("the prompt is empty; give at least one token")
        self._check_vocabulary("the prompt holds", token_ids)
        for holder, room, remedy in (
            ("context", self.max_model_len, "max_model_len"),
            ("KV pool", self.blocks.capacity, "kv_memory"),
        ):
            if len(token_ids) + num_new > room:
                answer = ", one of them for the answer" if num_new and len(token_ids) == room else ""
                cause = f"the prompt has {len(token_ids)} tokens and the {holder} holds {room}{answer}"
                raise InvalidArgument(f"{cause}; shorten it or raise {remedy}")

    def _check_vocabulary(self, holder: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.model.config.vocab_size
        for token_id in token_ids:
            whole = isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool)
            if not whole or not 0 <= token_id < vocab_size:
                cause = f"{holder} {token_id!r}, which is not in the vocabulary"
                raise InvalidArgument(f"{cause}; token ids go from 0 to {vocab_size - 1}")

    def _forward(self, scheduled: list[tuple[Sequence, int]], logits_of_all_rows: bool) -> np.ndarray:
        tokens: list[int] = []
        rows: list[int] = []
        pages: list[int] = []
        q_indptr, seq_lens, page_indptr = [0], [], [0]
        for seq, count in scheduled:
            stop = seq.num_computed + count
            tokens += seq.token_ids[seq.num_computed : stop]
            if not logits_of_all_rows and stop == seq.num_tokens:
                rows.append(len(tokens) - 1)
            pages += seq.page_table[: -(-stop // self.pool.block_size)]
            q_indptr.append(len(tokens))
            seq_lens.append(stop)
            page_indptr.append(len(pages))
        if logits_of_all_rows:
            rows = list(range(len(tokens)))
        batch = Batch(*(np.array(ids, np.int32) for ids in (tokens, rows, q_indptr, seq_lens, page_indptr, pages)))
        return self.model.forward(batch, self.pool.k, self.pool.v)

    def _sampling_row(self, candidate: _Candidate) -> SamplingRow:
        params, seq = candidate.params, candidate.seq
        too_early = seq.num_tokens - seq.num_prompt_tokens < params.min_tokens
        forbidden = (*self.eos_token_ids, *params.stop_token_ids) if too_early else ()
        return SamplingRow(params, candidate.seed, candidate.output.index, seq.num_tokens, candidate.seen or {}, forbidden)

    def _append(self, candidate: _Candidate, token_id: int) -> None:
        seq, params, metrics = candidate.seq, candidate.params, candidate.request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = time.perf_counter()
            metrics.num_cached_tokens = seq.num_cached
        metrics.num_generated_tokens += 1
        seq.token_ids.append(token_id)
        candidate.output.token_ids.append(token_id)
        if candidate.seen is not None:
            candidate.seen[token_id] = candidate.seen.get(token_id, 0) + 1
        if token_id in params.stop_token_ids:
            return self._finish(candidate, "stop", token_id)
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return self._finish(candidate, "stop", None)
        stop = candidate.detokenizer.append(token_id)
        candidate.output.text = candidate.detokenizer.text
        if stop is not None:
            return self._finish(candidate, "stop", stop)
        if seq.num_tokens >= seq.max_tokens:
            return self._finish(candidate, "length", None)
        return None

    def _finish(self, candidate: _Candidate, reason: str, stop_reason: int | str | None) -> None:
        self.scheduler.remove(candidate.seq)
        del self._candidates[candidate.seq]
        if not isinstance(stop_reason, str):
            candidate.detokenizer.finish()
        candidate.output.text = candidate.detokenizer.text
        candidate.output.finish_reason, candidate.output.stop_reason = reason, stop_reason
        request = candidate.request
        if all(output.finish_reason for output in request.outputs):
            request.finished = True
            request.metrics.finished_time = time.perf_counter()
