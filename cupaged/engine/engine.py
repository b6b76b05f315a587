"""The step loop: schedule -> forward -> sample -> detokenise."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.engine.ahead import Ahead
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.completion import Completion
from cupaged.engine.drawing import Work, draw
from cupaged.engine.kv_pool import KVPool
from cupaged.engine.outputs import CompletionOutput, EngineStats, MeanTimes, RequestMetrics, RequestOutput
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence
from cupaged.engine.speculative import Proposer
from cupaged.errors import CupagedError, InvalidArgument, OutOfMemory
from cupaged.model.llama import Batch, Llama
from cupaged.model.sampling import SamplingParams, Score

_LOGIT_ROWS = 256  # of one sequence whose logits are on the device at once, where those of all its rows are asked for
_Rows = list[tuple[Sequence, list[int]]]  # positions of sequences


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
        proposer: guesses tokens, up to max_draft at once, that are verified together (speculative decoding). What is generated
            does not change: see `_accept`. Requests with logits processors, which may keep count of their calls, go without;
            so does the end of a prompt that several completions begin from.
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
        proposer: Proposer | None = None,
        max_draft: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.eos_token_ids, self.max_model_len = eos_token_ids, max_model_len
        self.blocks = BlockManager(pool.num_blocks, pool.block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens)
        self._ahead = Ahead(model, self.scheduler)
        self._proposer, self._max_draft = proposer, max_draft
        self._completions: dict[Sequence, Completion] = {}
        self._of_request: dict[int, list[Completion]] = {}  # by id(RequestOutput): those that have not ended
        self.others: set[Sequence] = set()  # with blocks, beside the scheduler's
        self._taking: Completion | None = None  # what tokens are being handed out to
        self._random = random.Random(seed)
        self._num_requests = self._num_steps = self._num_generated = 0
        self._step_s = self._policy_s = 0.0
        self._accepted: Counter[int] = Counter()
        self._num_draft_tokens = 0
        self._times = MeanTimes()

    def add(self, prompt: str | None, token_ids: list[int], params: SamplingParams, priority: int = 0) -> RequestOutput:
        """Queue a request; the RequestOutput is updated in place by `step` until it is finished.

        Of waiting requests those of the smallest priority go first.
        """
        self.check_prompt(token_ids, num_new=1)
        self._check_vocabulary("stop_token_ids holds", params.stop_token_ids)
        self._check_vocabulary("logit_bias holds", params.logit_bias or ())
        forbidden = {token for token, value in (params.logit_bias or {}).items() if value == -np.inf}
        if params.min_tokens:
            forbidden.update(self.eos_token_ids, params.stop_token_ids)
        if len(forbidden) >= self.model.config.vocab_size:
            raise InvalidArgument("logit_bias and min_tokens forbid every token; leave at least one")
        logprobs = params.logprobs is not None
        outputs = [
            CompletionOutput(index, logprobs=[] if logprobs else None, cumulative_logprob=0.0 if logprobs else None)
            for index in range(params.n)
        ]
        metrics = RequestMetrics(time.perf_counter(), num_prompt_tokens=len(token_ids))
        request = RequestOutput(str(self._num_requests), prompt, token_ids, outputs, metrics)
        self._num_requests += 1
        seed = self._random.getrandbits(64) if params.seed is None else int(params.seed) % 2**64
        limit = min(self.max_model_len, self.blocks.capacity)
        if params.max_tokens is not None:
            limit = min(limit, len(token_ids) + params.max_tokens)
        seq = Sequence(list(token_ids), len(token_ids), limit, priority)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
            seq.max_chunk, seq.use_cache = _LOGIT_ROWS, False
        first = Completion(seq, request, outputs[0], params, seed, self.eos_token_ids, self.tokenizer, outputs[1:])
        self._enter(first)
        self.scheduler.add(seq)
        return request

    def refuse(self, prompt: str | None, params: SamplingParams, error: str) -> RequestOutput:
        """The output of a request that `add` cannot take: finished, with its error."""
        now = time.perf_counter()
        outputs = [CompletionOutput(index, finish_reason="abort") for index in range(params.n)]
        metrics = RequestMetrics(now, finished_time=now)
        self._num_requests += 1
        return RequestOutput(str(self._num_requests - 1), prompt, [], outputs, metrics, finished=True, error=error)

    def abort(self, request: RequestOutput) -> None:
        """End a request now and free its blocks; a finished one is left as it is."""
        if not request.finished and request.error is None:
            request.error = "the request was aborted; add it again if it is still wanted"
        for completion in list(self._of_request.get(id(request), ())):
            self._finish(completion, "abort", None)

    def step(self) -> None:
        """Compute one batch: every request in it moves on.

        What a request's own callback raises ends that request, with `RequestOutput.error`. Any other exception (Ctrl-C too)
        passes through and leaves the engine such that the next step goes on.
        """
        began = time.perf_counter()
        try:
            self._propose()
            with self._policy():
                scheduled = self.scheduler.schedule()
            if scheduled:
                self._copy_blocks()
                drawn = self._draw([self._work(seq, count, began) for seq, count in scheduled])
                with self._policy():
                    self.blocks.advance(scheduled)
                for each in drawn:
                    self._hand_out(*each)
        except BaseException:
            self.recover()
            raise
        finally:
            self._num_steps += 1
            self._step_s += time.perf_counter() - began

    def stats(self) -> EngineStats:
        """What the engine has done so far and holds now."""
        scheduler, blocks = self.scheduler, self.blocks
        drafts = sum(self._accepted.values())
        slots = blocks.num_used * blocks.block_size
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            blocks_used=blocks.num_used,
            blocks_cached=blocks.num_cached,
            blocks_free=blocks.num_free,
            kv_waste=blocks.unused_slots([*scheduler.running, *self.others]) / slots if slots else 0.0,
            prefix_hit_rate=scheduler.num_found / scheduler.num_looked_up if scheduler.num_looked_up else 0.0,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_generated_tokens=self._num_generated,
            step_s=self._step_s,
            policy_s=self._policy_s + self._ahead.policy_s,
            num_drafts=drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=sum(length * count for length, count in self._accepted.items()),
            accepted_lengths=dict(sorted(self._accepted.items())),
            **self._times.as_dict(),
        )

    def logits(self, token_ids: list[int]) -> Iterator[np.ndarray]:
        """float32 [n, vocab] logits of all positions, some rows at a time; row t predicts token t + 1."""
        self.check_prompt(token_ids, num_new=0)
        # It starts without cached blocks, because every row is wanted.
        seq = Sequence(token_ids, len(token_ids), len(token_ids))
        with self.beside_the_scheduler():
            self.others.add(seq)
            if not self.blocks.grow(seq, seq.num_tokens):
                raise OutOfMemory("the KV pool is taken by running requests; finish or abort them first")
            while seq.num_computed < seq.num_tokens:
                count = min(seq.num_tokens - seq.num_computed, self.scheduler.max_num_batched_tokens, _LOGIT_ROWS)
                rows = list(range(seq.num_computed, seq.num_computed + count))
                yield self.model.ops.download(self.compute([(seq, count)], [(seq, rows)]))

    @contextmanager
    def beside_the_scheduler(self) -> Iterator[None]:
        """For work on sequences of one's own, which are in `others` as long as they have blocks; at its end those are freed."""
        before = set(self.others)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (CupagedError, GeneratorExit)):
                self.recover()
            raise
        finally:
            for seq in self.others - before:
                self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """Free the blocks of one of `others`."""
        self.blocks.release(seq)
        self.others.discard(seq)

    def compute(self, scheduled: list[tuple[Sequence, int]], rows: _Rows) -> np.ndarray:
        """Compute so many tokens of each sequence, whose blocks are allocated -> the float32 logits [R, vocab] of positions."""
        self._ahead.drop()
        self._copy_blocks()
        logits = self._forward(scheduled, rows)
        for seq, count in scheduled:
            seq.num_computed += count
        return logits

    def check_prompt(self, token_ids: list[int], num_new: int) -> None:
        """InvalidArgument unless the prompt is one and leaves room for so many tokens."""
        if not token_ids:
            raise InvalidArgument("the prompt is empty; give at least one token")
        for holder, room, remedy in (
            ("context", self.max_model_len, "max_model_len"),
            ("KV pool", self.blocks.capacity, "kv_memory"),
        ):
            if len(token_ids) + num_new > room:
                answer = ", one of them for the answer" if num_new and len(token_ids) == room else ""
                cause = f"the prompt has {len(token_ids)} tokens and the {holder} holds {room}{answer}"
                raise InvalidArgument(f"{cause}; shorten it or raise {remedy}")
        self._check_vocabulary("the prompt holds", token_ids)

    def _check_vocabulary(self, holder: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.model.config.vocab_size
        for token_id in token_ids:
            whole = isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool)
            if not whole or not 0 <= token_id < vocab_size:
                cause = f"{holder} {token_id!r}, which is not in the vocabulary"
                raise InvalidArgument(f"{cause}; token ids go from 0 to {vocab_size - 1}")

    # ---- a step

    @contextmanager
    def _policy(self) -> Iterator[None]:
        """The time inside counts as the scheduler's and the block manager's."""
        began = time.perf_counter()
        yield
        self._policy_s += time.perf_counter() - began

    def _propose(self) -> None:
        """Let every sequence that has but its last token to compute guess the next ones."""
        if self._proposer is None:
            return
        for seq in list(self.scheduler.running):
            limit = min(self._max_draft, seq.max_tokens - seq.num_tokens - 1)
            completion = self._completions[seq]
            if limit < 1 or seq.num_tokens - seq.num_computed != 1:
                continue
            if completion.params.logits_processors or completion.siblings:
                continue
            try:
                draft = list(self._proposer.propose(seq, limit))[:limit]
                self._check_vocabulary("the proposer's guess holds", draft)
                seq.draft = draft
            except Exception as error:
                self._fail(completion, "the proposer failed", error)

    def _copy_blocks(self) -> None:
        pairs = self.blocks.copies()
        if pairs:
            sources, targets = (self.model.ops.upload(np.array(blocks, np.int32)) for blocks in zip(*pairs, strict=True))
            for pool in self.pool.by_block:
                self.model.ops.copy_blocks(pool, sources, targets)
            self.blocks.copied()

    def _work(self, seq: Sequence, count: int, now: float) -> Work:
        completion = self._completions[seq]
        request = completion.request
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        stop, draws, prompt = seq.num_computed + count, [], []
        if stop >= seq.num_tokens:
            draws = list(range(seq.num_tokens - 1, stop))
            # As many siblings as may run begin here; the others will find the prompt in the prefix cache.
            draws += draws[:1] * min(len(completion.siblings), self.scheduler.max_num_seqs - len(self.scheduler.running))
        if request.prompt_logprobs is not None:  # after a preemption some are there already
            first = max(seq.num_computed, len(request.prompt_logprobs) - 1)
            prompt = list(range(first, min(stop, seq.num_prompt_tokens - 1)))
        return Work(completion, count, draws, prompt)

    def _forward(self, scheduled: list[tuple[Sequence, int]], rows: _Rows) -> np.ndarray:
        """The float32 logits [R, vocab] of `rows`, all of them among the tokens computed."""
        tokens: list[int] = []
        tables: list[array[int]] = []
        q_indptr, seq_lens, page_indptr = [0], [], [0]
        row_of_position_0: dict[Sequence, int] = {}
        # Those with the same first block side by side: attention may read the prefix that they share once for all.
        for seq, count in sorted(scheduled, key=lambda each: each[0].page_table[0]):
            stop = seq.num_computed + count
            row_of_position_0[seq] = len(tokens) - seq.num_computed
            tokens += seq.token_ids[seq.num_computed : stop]
            tokens += seq.draft[: max(0, stop - seq.num_tokens)]
            tables.append(seq.page_table[: -(-stop // self.pool.block_size)])
            q_indptr.append(len(tokens))
            seq_lens.append(stop)
            page_indptr.append(page_indptr[-1] + len(tables[-1]))
        wanted = [row_of_position_0[seq] + position for seq, positions in rows for position in positions]
        arrays = [np.array(ids, np.int32) for ids in (tokens, wanted, q_indptr, seq_lens, page_indptr)]
        batch = Batch(*arrays, np.frombuffer(b"".join(tables), np.int32))
        return self.model.forward(batch, self.pool.k, self.pool.v, self.pool.scales)

    def _draw(self, work: list[Work]) -> list[tuple[list[Work], list[int], dict[int, Score]]]:
        """Compute and draw tokens: plain decodes on a Decoder as `Ahead` says, the rest by `draw`. What to hand out to whom."""
        step, decodes, rest = self._ahead.take(work)
        if step is None and (step := self._ahead.begin(work)) is not None:
            decodes, rest = work, []
        drawn = []
        if rest:
            wanted = [(item.completion.seq, item.draws) for item in rest]
            wanted += [(item.completion.seq, item.prompt) for item in rest]
            logits = self._forward([(item.completion.seq, item.count) for item in rest], wanted)
            drawn = [(rest, *draw(self.model.ops, logits, rest))]
        elif self._proposer is None:  # else the next step is likely to have drafts
            self._ahead.go_on(step)
        tokens = [] if step is None else step.tokens()
        self.model.check()  # the device is done with this step, and nothing has been handed out
        return [(decodes, tokens, {}), *drawn]

    def _hand_out(self, work: list[Work], tokens: list[int], scores: dict[int, Score]) -> None:
        """Move every completion on by what was computed and drawn for it."""
        now, row, prompt_row = time.perf_counter(), 0, len(tokens)
        for item in work:
            self._taking = completion = item.completion
            rows = range(row, row + len(item.draws))
            prompt_rows = range(prompt_row, prompt_row + len(item.prompt))
            row, prompt_row = rows.stop, prompt_rows.stop
            if completion.seq not in self._completions:  # ended in this step, by a callback or with another of its request
                continue
            if completion.failure is not None:
                self._fail(completion, "a logits processor failed", completion.failure)
                continue
            try:
                count = completion.params.prompt_logprobs
                for each in prompt_rows:
                    completion.request.prompt_logprobs.append(completion.logprobs(scores[each], count))
                self._take(item, [(tokens[each], scores.get(each)) for each in rows], now)
            except Exception as error:
                self._fail(completion, "its text cannot be made", error)
        self._taking = None

    def _take(self, item: Work, drawn: list[tuple[int, Score | None]], now: float) -> None:
        completion, seq = item.completion, item.completion.seq
        given = [(completion, drawn)]
        if drawn and completion.siblings:
            with self._policy():
                takers = [completion, *self._fork(completion, len(drawn) - 1)]
            given = [(taker, [one]) for taker, one in zip(takers, drawn, strict=True)]
            for taker, [(token_id, _)] in given:
                taker.seq.token_ids.append(token_id)
        elif seq.draft:
            with self._policy():
                accepted = self._accept(seq, [token_id for token_id, _ in drawn])
                given = [(completion, drawn[: accepted + 1])]
                self.blocks.shrink(seq, seq.num_tokens + accepted)
                seq.token_ids += [token_id for token_id, _ in given[0][1]]
                self.blocks.publish(seq)
        elif drawn:
            seq.token_ids.append(drawn[0][0])
        for taker, received in given:
            for token_id, own_score in received:
                self._num_generated += 1
                end = taker.append(token_id, own_score, now)
                if end is not None:
                    self._finish(taker, *end)
                    break

    def _accept(self, seq: Sequence, drawn: list[int]) -> int:
        """How many of the draft's tokens stand: those up to the first that differs from what was drawn in its place.

        This is the rejection sampling of Leviathan et al. (2023, section 2.3) for a draft that is certain of its tokens: one is
        accepted with the probability that the model gives it, and what replaces a rejected one is distributed as the model's
        other tokens. As draws are keyed by position, they are even the very tokens that plain decoding draws.
        """
        draft, seq.draft = seq.draft, []
        accepted = next((i for i, (guess, token) in enumerate(zip(draft, drawn, strict=False)) if guess != token), len(draft))
        self._num_draft_tokens += len(draft)
        self._accepted[accepted] += 1
        return accepted

    def _fork(self, completion: Completion, count: int) -> list[Completion]:
        """The first `count` siblings, on the blocks of the prompt; the others wait to find them in the prefix cache."""
        seq, prompt = completion.seq, completion.request.prompt_token_ids
        self.blocks.publish(seq)  # once for all of them
        siblings: list[Completion] = []
        for output in completion.siblings:
            if len(siblings) < count:
                child = self.scheduler.fork(seq)
            else:
                child = Sequence(list(prompt), len(prompt), seq.max_tokens, seq.priority)
                self.scheduler.add(child)
            siblings.append(replace(completion, seq=child, output=output, siblings=[]))
            self._enter(siblings[-1])
        completion.siblings = []
        return siblings[:count]

    def _enter(self, completion: Completion) -> None:
        self._completions[completion.seq] = completion
        self._of_request.setdefault(id(completion.request), []).append(completion)

    def _finish(self, completion: Completion, reason: str, stop_reason: int | str | None) -> None:
        with self._policy():
            self.scheduler.remove(completion.seq)
        self._completions.pop(completion.seq, None)
        completion.end(reason, stop_reason)
        request = completion.request
        living = [other for other in self._of_request[id(request)] if other is not completion]
        if living:
            self._of_request[id(request)] = living
        else:
            request.metrics.finished_time = time.perf_counter()
            request.finished = True
            self._times.add(request.metrics)
            del self._of_request[id(request)]

    def _fail(self, completion: Completion, what: str, error: BaseException) -> None:
        """End a request because of an exception that is its own."""
        cause = " ".join((str(error) if isinstance(error, CupagedError) else f"{type(error).__name__}: {error}").split())
        completion.request.error = f"{what} ({cause}); mend it, and ask again"
        self.abort(completion.request)

    def recover(self) -> None:
        """After an exception anywhere in here: the books anew, and every sequence goes on from the last token it was given.

        The one that was just being given some may have been left between two tokens: its request ends.
        """
        self._ahead.drop()
        self.scheduler.recover(self.others)
        known = set(self.scheduler.waiting)
        for seq in known.difference(self._completions):
            self.scheduler.remove(seq)
        broken = [self._completions[seq] for seq in self._completions if seq not in known]  # on their way out
        for completion in broken:
            del completion.seq.page_table[:]  # they are nobody's by now
        if self._taking is not None:
            broken.append(self._taking)
            self._taking = None
        for request in [completion.request for completion in broken if not completion.request.finished]:
            request.error = "the request was interrupted between two of its tokens; ask again"
            self.abort(request)
            for output in request.outputs:
                output.finish_reason = output.finish_reason or "abort"
