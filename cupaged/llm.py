"""The front door: a model folder in, text out."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import threadpoolctl
from tqdm import tqdm

from cupaged.checkpoint.config import ModelConfig, load_config, load_generation_config
from cupaged.checkpoint.fetch import resolve
from cupaged.checkpoint.loading import Loading
from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.checkpoint.weights import expected_tensors, open_weights
from cupaged.engine.beam_search import BeamSearchParams, beam_search
from cupaged.engine.dtypes import choose_dtype, choose_kv_dtype, stored_as
from cupaged.engine.engine import Engine
from cupaged.engine.kv_pool import KVPool, activation_bytes, blocks_that_fit, check_block_size
from cupaged.engine.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from cupaged.engine.speculative import NgramProposer, Proposer
from cupaged.errors import CupagedError, DeviceError, InvalidArgument
from cupaged.model.llama import Llama
from cupaged.model.parameters import check_quantization, kinds, unquantised_bytes
from cupaged.model.sampling import SamplingParams
from cupaged.ops.quantized import check_kind

logger = logging.getLogger("cupaged")

CPU_STEP_TOKENS, GPU_STEP_TOKENS = 512, 8192  # of a prefill, computed at once

Prompt = str | Sequence[int] | dict
Message = dict[str, str]


@dataclass
class PoolStats:
    """The KV pool in blocks (of `block_size` tokens) and bytes; cached blocks are free ones whose content can be reused."""

    num_blocks: int
    block_size: int
    bytes: int
    used_blocks: int
    peak_used_blocks: int
    cached_blocks: int


class LLM:
    """A Llama-family model ready to generate.

    Args:
        model: a name that `cupaged fetch` knows, a Hugging Face folder, or `ORG/NAME` on the Hugging Face hub.
        tokenizer: another folder to take the tokenizer from.
        device: "cpu", "cuda", "cuda:N", or "auto": the first GPU if it can be used, else the CPU.
        dtype: "float32" on the CPU; "bfloat16" or "float16" on a GPU; "auto": on a GPU what the weights are, else bfloat16.
        kv_cache_dtype: of the KV pool: "auto" for that of the weights; "int8" or "fp8" for about half of the memory; on the CPU
            also "bfloat16" or "float16".
        block_size: tokens in a block of the KV pool, a power of two from 1 to 256.
        max_model_len: tokens of prompt and completion together; default: as far as the model was made for and the pool reaches.
        max_num_seqs, max_num_batched_tokens: sequences and tokens computed in one step, at most.
        kv_memory: bytes of the KV pool, as a number or like "24MB"; default: enough for max_num_seqs full sequences,
            within a quarter of the free memory of the CPU or gpu_memory_utilization.
        gpu_memory_utilization: share of a GPU's memory that weights and pool may take.
        quantization: "int8", "fp8" or "int4": the matrices become codes of 8 or 4 bits with float16 scales while they are
            loaded; with "fp8" the output head is int8. Embedding, norms and biases stay. None: all weights are of `dtype`.
        load_format: "auto", or "dummy" for random weights (to measure speed without a download). `model` may then be a bare
            config.json, by any name; prompts are token ids, and texts empty, if there is no tokenizer.
        enable_prefix_caching: keep the K/V of finished sequences and reuse them for equal prefixes.
        batch_invariant: a sequence's logits do not depend on what else is computed with it, nor on how its prompt is cut into
            steps, to the bit; slower. For GPUs of compute capability 9.0, and models without sliding windows.
        speculative: what guesses tokens, which are then verified several at once; what is generated does not change. "ngram":
            an earlier occurrence of the last ones; or a `NgramProposer`, or anything with its `propose`. Requests with logits
            processors go without. None: off.
        num_speculative_tokens: guessed at once, at most; default: 4.
        seed: of the draws of requests that bring no seed.
        threads: of the CPU's matrix products; default: all cores.

    Attributes:
        load_seconds: that all of it took, from checking arguments to the last compiled kernel.
        load_stats: how many bytes of weights were loaded in how many seconds of these; None for random weights.

    Raises:
        InvalidArgument, CheckpointError, FetchError, DeviceError, OutOfMemory: each one line of cause and remedy.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        kv_memory: int | str | None = None,
        gpu_memory_utilization: float = 0.9,
        quantization: str | None = None,
        load_format: str = "auto",
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        speculative: str | Proposer | None = None,
        num_speculative_tokens: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        **unsupported: object,
    ) -> None:
        if unsupported:
            raise InvalidArgument(f"LLM has no argument {', '.join(sorted(unsupported))}; help(cupaged.LLM) lists those it has")
        check_block_size(block_size)
        for name, value in [
            ("max_model_len", max_model_len),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("threads", threads),
            ("num_speculative_tokens", num_speculative_tokens),
        ]:
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least 1")
        if not isinstance(gpu_memory_utilization, (int, float)) or not 0 < gpu_memory_utilization <= 1:
            raise InvalidArgument(f"gpu_memory_utilization is {gpu_memory_utilization!r}; give a share above 0 and at most 1")
        if load_format not in ("auto", "dummy"):
            raise InvalidArgument(f"load_format is {load_format!r}; give 'auto' or 'dummy'")
        if quantization is not None:
            check_kind(quantization)
            if batch_invariant:
                raise InvalidArgument("batch_invariant does not know quantised weights yet; leave it or quantization out")
        if speculative is None and num_speculative_tokens is not None:
            raise InvalidArgument(
                f"num_speculative_tokens is {num_speculative_tokens} and nothing guesses; give speculative too"
            )
        max_draft = 0 if speculative is None else num_speculative_tokens or 4
        proposer = NgramProposer(max_draft) if speculative == "ngram" else speculative
        if proposer is not None and not callable(getattr(proposer, "propose", None)):
            raise InvalidArgument(f"speculative is {speculative!r}; give 'ngram', a NgramProposer or None")
        started = time.perf_counter()
        self._abandoned: deque[RequestOutput] = deque()  # of streams that nobody holds any more
        if threads is not None:
            threadpoolctl.threadpool_limits(threads, "blas")
        ops, device_index = select_device(device)
        self.device = "cpu" if device_index is None else f"cuda:{device_index}"
        self._device = ops.device(device_index or 0)

        bare = load_format == "dummy" and os.path.isfile(model)  # a config.json by whatever name
        self.path = Path(model) if bare else resolve(str(model))
        self.config: ModelConfig = load_config(self.path)
        check_quantization(self.config, quantization)
        self.generation_config = load_generation_config(self.path)
        if bare and tokenizer is None:
            self.tokenizer = Tokenizer.without_text()
        else:
            self.tokenizer = Tokenizer.from_folder(self.path if tokenizer is None else resolve(str(tokenizer)))
        stored = None if load_format == "dummy" else open_weights(self.path, self.config)
        loading = Loading(stored) if stored else None
        self.dtype = choose_dtype(dtype, stored.dtype if stored else self.config.dtype or "float32", ops)
        self.kv_cache_dtype = choose_kv_dtype(kv_cache_dtype, self.dtype, ops)
        self.quantization = quantization
        longest = max_model_len or self.config.max_position_embeddings
        if longest > self.config.max_position_embeddings:
            logger.warning(
                "max_model_len %d is beyond the %d the model was made for", longest, self.config.max_position_embeddings
            )
        step_tokens = max_num_batched_tokens or (CPU_STEP_TOKENS if device_index is None else GPU_STEP_TOKENS)
        if batch_invariant:
            ops = self._batch_invariant(device_index)
        with self._device:
            decoder = None if device_index is None or batch_invariant else importlib.import_module("cupaged.model.decoder")
            types = self.dtype, stored_as(self.kv_cache_dtype)
            graphs = decoder.variants(self.config, *types, quantization, max_num_seqs) if decoder else []
            also = [*graphs, *ops.variants_of_weights(kinds(quantization), self.dtype)]
            with ops.compiling(*types, self.config.head_dim, block_size, self.config.qk_norm, also):
                weights = loading or _random_weights(self.config, ops, self.dtype)
                llama = Llama(self.config, weights, ops, self.dtype, longest, quantization)
            reserved = activation_bytes(self.config, step_tokens, max_num_seqs, max_draft)
            reserved += unquantised_bytes(self.config, self.dtype, quantization)  # free now, but in pieces; and for products
            num_blocks = blocks_that_fit(
                ops,
                self.config,
                self.kv_cache_dtype,
                block_size,
                max_num_seqs * longest,
                kv_memory,
                gpu_memory_utilization,
                reserved,
            )
            pool = KVPool(ops, self.config, self.kv_cache_dtype, num_blocks, block_size)
            if decoder:
                llama.decoder = decoder.Decoder(llama, pool.k, pool.v, pool.scales, longest, max_num_seqs)
        capacity = (num_blocks - 1) * block_size
        if capacity < longest:
            if max_model_len is not None:
                raise InvalidArgument(
                    f"max_model_len is {max_model_len} and the KV pool holds {capacity} tokens; lower it or raise kv_memory"
                )
            logger.info("the KV pool holds %d tokens: the context ends there, not at the model's %d", capacity, longest)
        self.max_model_len = min(longest, capacity)
        eos = self.generation_config.get("eos_token_id", self.config.eos_token_ids)
        foreign = [token_id for token_id in eos if not 0 <= token_id < self.config.vocab_size]
        if foreign:
            logger.warning("ignoring the eos_token_id %s, which is not in the vocabulary", foreign)
        self.engine = Engine(
            llama,
            self.tokenizer,
            pool,
            eos_token_ids=tuple(token_id for token_id in eos if token_id not in foreign),
            max_model_len=longest,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_tokens,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            proposer=proposer,
            max_draft=max_draft,
        )
        self.load_seconds = time.perf_counter() - started
        self.load_stats = loading.stats if loading else None
        logger.info("loaded %s on %s in %s in %.2f s", self.path.name, self.device, self.precision, self.load_seconds)

    @property
    def precision(self) -> str:
        """For people to read: the dtype, and what the weights are if that is another."""
        return self.dtype if self.quantization is None else f"{self.dtype} with {self.quantization} weights"

    def _batch_invariant(self, device_index: int | None) -> ModuleType:
        """The operations of `batch_invariant`; InvalidArgument where there are none."""
        if any(self.config.sliding_windows):
            cause = "batch_invariant is for models without sliding windows, whose attention begins where others in the batch do"
            raise InvalidArgument(f"{cause}; leave it out")
        if device_index is not None:
            products = importlib.import_module("cupaged.ops.products")
            with self._device:
                if products.takes(self.config):
                    return importlib.import_module("cupaged.ops.invariant").BatchInvariant()
        wanted = "a GPU of compute capability 9.0 and a model whose widths are multiples of 8"
        raise InvalidArgument(f"batch_invariant is for {wanted}, which this is not; leave it out")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, together; outputs in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, `{"prompt_token_ids": [...]}`, or a list of these; in the place of each also
                `{"messages": [...]}`, as for `chat`.
            sampling_params: one for all or one each; default: `default_sampling_params()`.
            priority: of each prompt; while they wait, those of the smallest go first.
            use_tqdm: show the progress of several prompts where stderr is a terminal.

        Arguments that are wrong as such raise InvalidArgument, and so does a single prompt that cannot be used (malformed, too
        long, at odds with its parameters). Of several such prompts, each ends with its own `RequestOutput.error` and a warning
        in the log, and the others are completed.
        """
        if isinstance(prompts, (str, dict)) or _is_token_ids(prompts):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise InvalidArgument(f"prompts is {prompts!r}; give a string, token ids, or a list of these")
        if sampling_params is None:
            sampling_params = self.default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or len(sampling_params) != len(prompts):
            raise InvalidArgument(f"sampling_params is none for all nor one for each of {len(prompts)} prompts; give either")
        for params in sampling_params:
            if not isinstance(params, SamplingParams):
                raise InvalidArgument(f"sampling_params holds {params!r}; give SamplingParams(...)")
        priorities = [0] * len(prompts) if priority is None else priority
        if not isinstance(priorities, Sequence) or len(priorities) != len(prompts) or not all(map(_is_whole, priorities)):
            raise InvalidArgument(f"priority is {priority!r}; give a whole number for each of {len(prompts)} prompts")
        requests: list[RequestOutput] = []
        shown = use_tqdm and len(prompts) > 1 and sys.stderr is not None and sys.stderr.isatty()
        bar = tqdm(total=len(prompts), unit="prompt", disable=not shown, leave=False)
        try:
            for prompt, params, urgency in zip(prompts, sampling_params, priorities, strict=True):
                try:
                    requests.append(self._add(prompt, params, urgency))
                except InvalidArgument as error:
                    if len(prompts) == 1:
                        raise
                    logger.warning("prompt %d of %d cannot be used: %s", len(requests), len(prompts), error)
                    requests.append(self.engine.refuse(prompt if isinstance(prompt, str) else None, params, str(error)))
            num_first, due = 0, 0.0  # the first ones, all finished; when the bar is drawn again
            while num_first < len(requests):
                if requests[num_first].finished:
                    num_first += 1
                    continue
                self._step()
                if shown and time.perf_counter() > due:
                    bar.update(sum(request.finished for request in requests) - bar.n)
                    due = time.perf_counter() + 0.1
        finally:
            bar.close()
            for request in requests:
                self.engine.abort(request)
        return requests

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The most probable completions of one prompt or of each of many: `params.beam_width` outputs, best first.

        Prompts are searched one after another; requests that run meanwhile keep their blocks and wait. InvalidArgument for a
        single prompt that cannot be used; of several, such a one ends with its own `RequestOutput.error`. OutOfMemory where
        the KV pool cannot hold the beams.
        """
        if isinstance(prompts, (str, dict)) or _is_token_ids(prompts):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise InvalidArgument(f"prompts is {prompts!r}; give a string, token ids, or a list of these")
        if not isinstance(params, BeamSearchParams):
            raise InvalidArgument(f"params is {params!r}; give BeamSearchParams(...)")
        results = []
        for number, prompt in enumerate(prompts):
            try:
                text, token_ids = self.encode_prompt(prompt)
                metrics = RequestMetrics(time.perf_counter(), num_prompt_tokens=len(token_ids))
                with self._device:
                    beams = beam_search(self.engine, token_ids, params)
            except InvalidArgument as error:
                if len(prompts) == 1:
                    raise
                logger.warning("prompt %d of %d cannot be used: %s", number, len(prompts), error)
                text, several = prompt if isinstance(prompt, str) else None, SamplingParams(n=params.beam_width)
                results.append(self.engine.refuse(text, several, str(error)))
                continue
            outputs = []
            for index, beam in enumerate(beams):
                reason = "stop" if beam.ended else "length"
                completion = CompletionOutput(index, token_ids=beam.token_ids, finish_reason=reason)
                completion.text = self.tokenizer.decode(i for i in beam.token_ids if i < self.tokenizer.vocab_size)
                completion.cumulative_logprob = beam.cumulative_logprob
                outputs.append(completion)
            metrics.finished_time = time.perf_counter()
            metrics.num_generated_tokens = sum(len(output.token_ids) for output in outputs)
            results.append(RequestOutput(f"beam-{number}", text, token_ids, outputs, metrics, finished=True))
        return results

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: lists of {"role": "system" | "user" | "assistant", "content": text}."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
            raise InvalidArgument(f'messages is {messages!r}; give at least one {{"role": ..., "content": ...}}')
        conversations = [messages] if isinstance(messages[0], dict) else messages
        return self.generate([{"messages": turns} for turns in conversations], sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """The completion of one prompt, as an iterator of the text's pieces; a piece never ends within a character or emoji."""
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        if isinstance(params, SamplingParams) and params.n != 1:
            raise InvalidArgument(f"a stream carries one completion and n is {params.n}; use generate")
        return Stream(self, self._add(prompt, params))

    def add(self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0) -> RequestOutput:
        """Queue one prompt; `step` moves the output that is returned on, in place, until it is `finished`.

        Of the prompts that wait, those of the smallest priority go first. `add`, `step` and `abort` are the loop under
        `generate`, for programs that feed and read while it runs.
        """
        if not _is_whole(priority):
            raise InvalidArgument(f"priority is {priority!r}; give a whole number")
        return self._add(prompt, self.default_sampling_params() if sampling_params is None else sampling_params, priority)

    def step(self) -> None:
        """Compute one batch of what was added; call it while a request is unfinished."""
        self._step()

    def abort(self, request: RequestOutput) -> None:
        """End a request now, with finish_reason "abort", and free its blocks; a finished one is left as it is."""
        self.engine.abort(request)

    def default_sampling_params(self, **overrides: object) -> SamplingParams:
        """What the model's generation_config.json asks for, greedy where it says nothing, until the model ends.

        Keyword arguments other than None go before both.
        """
        config = self.generation_config
        given = {name: value for name, value in overrides.items() if value is not None}
        values: dict = {"temperature": 0.0, "max_tokens": config.get("max_new_tokens")}
        if config.get("do_sample"):
            values["temperature"] = config.get("temperature", 1.0)
        values |= {name: config[name] for name in ("repetition_penalty",) if name in config}
        values |= given
        if values["temperature"] != 0:  # how to draw, where something is drawn
            values |= {name: config[name] for name in ("top_k", "top_p", "min_p") if name in config and name not in given}
        return SamplingParams(**values)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, vocab_size]: row t holds the logits of the token after ids[: t + 1]."""
        with self._device:
            return np.concatenate(list(self.engine.logits(_as_list(ids, "the token ids are", "whole numbers"))))

    def perplexity(self, text: str | Sequence[int]) -> float:
        """exp of the mean negative log-likelihood (natural log) of every token but the first, given those before it."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else _as_list(text, "the token ids are", "whole numbers")
        if len(ids) < 2:
            raise InvalidArgument(f"perplexity needs at least 2 tokens and the text has {len(ids)}; give a longer text")
        total, row = 0.0, 0
        with self._device:
            for logits in self.engine.logits(ids):
                targets = ids[row + 1 : row + 1 + len(logits)]
                logits = logits[: len(targets)].astype(np.float64)
                top = logits.max(axis=1)
                log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                total += float((log_sum - logits[np.arange(len(targets)), targets]).sum())
                row += len(targets)
        return float(np.exp(total / (len(ids) - 1)))

    def stats(self) -> EngineStats:
        """Counts and times of all that has been generated so far, and what runs and waits now."""
        self._end_abandoned()
        return self.engine.stats()

    def pool_stats(self) -> PoolStats:
        """How full the KV pool is now, and was at most."""
        self._end_abandoned()
        blocks, pool = self.engine.blocks, self.engine.pool
        return PoolStats(pool.num_blocks, pool.block_size, pool.bytes, blocks.num_used, blocks.peak_used, blocks.num_cached)

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> RequestOutput:
        if not isinstance(params, SamplingParams):
            raise InvalidArgument(f"sampling_params holds {params!r}; give SamplingParams(...)")
        return self.engine.add(*self.encode_prompt(prompt), params, priority)

    def encode_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text if it was one, token ids) of a prompt; InvalidArgument where it is none. May run beside a step."""
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            token_ids = self.tokenizer.encode(text)
        elif isinstance(prompt, dict) and set(prompt) == {"prompt_token_ids"}:
            token_ids = prompt["prompt_token_ids"]
        elif isinstance(prompt, dict) and set(prompt) == {"messages"}:
            token_ids = self.tokenizer.encode_chat(_as_list(prompt["messages"], "the messages are", "dicts"))
        else:
            token_ids = prompt
        if not isinstance(token_ids, (Sequence, np.ndarray)) or isinstance(token_ids, (str, bytes)):
            raise InvalidArgument(f'a prompt is {_shown(prompt)}; give a string, token ids or {{"prompt_token_ids": [...]}}')
        return text, list(token_ids)

    def _step(self) -> None:
        self._end_abandoned()
        with self._device:
            self.engine.step()

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self.engine.abort(self._abandoned.popleft())


class Stream:
    """Iterator over the pieces of one completion's text; `output` is the RequestOutput so far, whole after the last piece."""

    def __init__(self, llm: LLM, output: RequestOutput) -> None:
        self.output = output
        self._llm = llm
        self._shown = 0
        self._closed = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        completion = self.output.outputs[0]
        while len(completion.text) == self._shown:
            if self._closed:
                raise StopIteration
            if self.output.error is not None:
                raise CupagedError(self.output.error)
            if self.output.finished:
                raise StopIteration
            self._llm._step()
        piece = completion.text[self._shown :]
        self._shown = len(completion.text)
        return piece

    def close(self) -> None:
        """Stop generating and free the request's blocks; harmless once it is finished."""
        self._closed = True
        self._llm.engine.abort(self.output)

    def __del__(self) -> None:
        self._llm._abandoned.append(self.output)  # a garbage collection may be in the midst of a step


def _is_token_ids(prompts: object) -> bool:
    """Whether `prompts` is one prompt as token ids, rather than a list of prompts."""
    return isinstance(prompts, (Sequence, np.ndarray)) and len(prompts) > 0 and isinstance(prompts[0], (int, float, np.number))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _as_list(values: object, what: str, kind: str) -> list:
    try:
        return list(values)
    except TypeError:
        raise InvalidArgument(f"{what} {values!r}; give a list of {kind}") from None


def _random_weights(config: ModelConfig, ops: ModuleType, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights of the right shapes, on the device: one small random tensor, repeated."""
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    for name, shape in expected_tensors(config).items():
        yield name, ops.repeat(np.ones(1 << 10, np.float32) if "norm" in name else noise, shape, dtype)


def select_device(device: str) -> tuple[ModuleType, int | None]:
    """The operations to run on, and the index of the GPU (None: the CPU)."""
    match = re.fullmatch(r"(auto|cpu|cuda)|cuda:(\d{1,4})", str(device))
    if match is None:
        raise InvalidArgument(f"device is {device!r}; give 'auto', 'cpu', 'cuda' or 'cuda:N'")
    jit = importlib.import_module("cupaged.cuda.jit")
    if match[1] not in ("auto", "cpu") or (match[1] == "auto" and jit.has_driver()):
        index = int(match[2] or 0)
        try:
            jit.check_device(index)
            return importlib.import_module("cupaged.ops.cuda"), index
        except DeviceError as error:
            if match[1] != "auto":
                raise
            logger.warning("running on the CPU: %s", error)
    return importlib.import_module("cupaged.ops.numpy"), None
