"""Captured decode steps on a GPU: what the engine generates by them, and a step whose kernels wait in vain."""

import time

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from op_cases import QUANTISED, SEED

from cupaged import LLM, SamplingParams
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.model.llama import Batch
from cupaged.ops import cuda, products

LIMIT = 2e-2  # ||logits - those of the operations one by one|| / ||those||
APPENDED_LIMIT = {"auto": 2e-2, "int8": 4e-2, "fp8": 6e-2}  # the same of K and V, where a code may fall the other way
MODELS = ("llama-gqa", "llama-bias", "llama-tied", "qwen2-window", "qwen3-window")


@pytest.fixture(params=[True, False], ids=["chained", "one by one"])
def load(request, tmp_path, monkeypatch):
    """Makes an LLM whose small steps are a chain's, if the device has that, or none of whose are."""

    def make(name="llama-gqa", **options):
        if not request.param:
            monkeypatch.setattr(products, "takes", lambda *of: False)
        folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS[name])
        llm = LLM(folder, device="cuda", dtype="bfloat16", kv_memory="64MiB", **options)
        if request.param and not products.takes(llm.config, llm.quantization):
            pytest.skip("a chain needs compute capability 9.0, and widths that this model does not have")
        return llm

    return make


class Beside:
    """The operations one by one over the K/V that a step has left: no code of theirs falls the other way. What they append
    themselves goes elsewhere, and is in `appended` beside what the step has: float32 [num_kv_heads * B, head_dim] of each."""

    def __init__(self, ops, batch):
        self._ops, self.appended = ops, []
        last = batch.seq_lens - 1
        self._blocks = lambda size: batch.page_indices[batch.page_indptr[:-1] + last // size]
        self._slots = lambda size: last % size

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def rope_append(self, qkv, rope_table, k_pool, v_pool, kv_scales, *rest):
        there = k_pool, v_pool, kv_scales
        elsewhere = [None if array is None else self._copy(array) for array in there]
        q = self._ops.rope_append(qkv, rope_table, *elsewhere, *rest)
        for which in range(2):
            self.appended.append([self._newest(pools[which], pools[2], which) for pools in (there, elsewhere)])
        return q

    def _copy(self, array):
        copy, gpu = self._ops.empty(array.shape, array.dtype), jit.import_cupy().cuda
        where = copy.data.ptr, array.data.ptr, array.nbytes
        gpu.runtime.memcpyAsync(*where, gpu.runtime.memcpyDefault, gpu.get_current_stream().ptr)
        return copy

    def _newest(self, pool, scales, which):
        num_kv_heads, num_blocks, size, head_dim = pool.shape
        rows = (np.arange(num_kv_heads)[:, None] * num_blocks + self._blocks(size)) * size + self._slots(size)
        ids = self._ops.upload(rows.reshape(-1).astype(np.int32))
        values = self._ops.download(self._ops.embedding(ids, pool.reshape(-1, head_dim)))
        if values.dtype == np.uint8:  # the scales are 1
            values = values.view(ml_dtypes.float8_e4m3fn)
        values = values.astype(np.float32)
        if pool.dtype == np.int8:
            values *= self._ops.download(scales).reshape(-1, 2)[rows.reshape(-1), which, None]
        return values


@pytest.mark.parametrize(
    ("name", "kv_dtype", "quantization"),
    [
        *((name, kv, None) for name in MODELS for kv in ("auto", "int8", "fp8")),
        *(("llama-gqa", "auto", quantization) for quantization in QUANTISED),
    ],
)
def test_logits_of_a_batch_are_those_of_the_operations(load, name, kv_dtype, quantization):
    """The same step by the decoder and by the operations one by one, for batches of every kernel."""
    options = {"max_num_seqs": 200, "max_num_batched_tokens": 8192}  # all begin together
    llm = load(name, kv_cache_dtype=kv_dtype, quantization=quantization, **options)
    model = llm.engine.model
    assert model.decoder.max_sequences == 200
    rng = np.random.default_rng([SEED, 71])
    prompts = [rng.integers(0, llm.config.vocab_size, n).tolist() for n in rng.integers(1, 40, 200)]
    steps, appended = [], []
    forward = model.forward

    def both(batch, *pools, ops=None):
        logits = forward(batch, *pools, ops=ops)
        if ops is None and model.decoder.takes(batch):
            beside = Beside(model.ops, batch)
            steps.append((cuda.download(logits), cuda.download(forward(batch, *pools, ops=beside))))
            appended.extend(beside.appended)
        return logits

    model.forward = both
    model.decoder.queue = None  # every step by `forward`
    params = [SamplingParams(temperature=0, max_tokens=2 + i % 7, ignore_eos=True, logprobs=0) for i in range(200)]
    for count in (200, 96, 64, 29, 12, 3, 1):
        llm.generate([{"prompt_token_ids": ids} for ids in prompts[:count]], params[:count])
    assert {200, 96, 64, 29, 12, 3, 1} <= {len(got) for got, _ in steps}
    for got, want in steps:
        assert np.linalg.norm(got - want) <= LIMIT * np.linalg.norm(want)
    for got, want in appended:
        assert np.linalg.norm(got - want) <= APPENDED_LIMIT[kv_dtype] * np.linalg.norm(want)


def steps_of(llm, count, rng):
    """A prefill of so many sequences of random lengths, and the step of one token of each behind it."""
    lengths = rng.integers(1, 60, count).astype(np.int32)
    size = llm.engine.pool.block_size
    num_pages = -(-(lengths + 1) // size)
    pages = 1 + rng.permutation(llm.engine.pool.num_blocks - 1)[: num_pages.sum()].astype(np.int32)
    page_indptr = np.concatenate([[0], num_pages.cumsum()]).astype(np.int32)
    each, rows = np.arange(count + 1, dtype=np.int32), np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    tokens, more = (rng.integers(0, llm.config.vocab_size, n).astype(np.int32) for n in (rows[-1], count))
    prefill = Batch(tokens, rows[1:] - 1, rows, lengths, page_indptr, pages)
    return prefill, Batch(more, each[:-1], each, lengths + 1, page_indptr, pages)


@pytest.mark.parametrize("count", [3, 96, 200])
def test_a_graph_gives_the_same_whatever_is_allocated_or_replayed_in_between(load, count):
    llm = load(max_num_seqs=256)
    model, pool = llm.engine.model, llm.engine.pool
    decoder, cupy, rng = model.decoder, jit.import_cupy(), np.random.default_rng([SEED, 73])
    pools = pool.k, pool.v, pool.scales
    prefill, step = steps_of(llm, count, rng)
    model.forward(prefill, *pools, ops=model.ops)
    want = cuda.download(model.forward(step, *pools, ops=model.ops))
    first = cuda.download(decoder.logits(step))
    assert np.linalg.norm(first - want) <= LIMIT * np.linalg.norm(want)
    graph = decoder._last
    others = [decoder._capture._stream, cupy.cuda.get_current_stream()]  # whose free memory CuPy would give
    for other in (1, 64, 130, 256):
        for stream in others:
            with stream:
                cupy.get_default_memory_pool().free_all_blocks()
                rubbish = [cupy.empty(int(n), np.uint8) for n in 2 ** rng.uniform(9, 25, 40)]
                for array in rubbish:
                    array.data.memset(0xFF, array.nbytes)  # NaN in every type
                stream.synchronize()
        np.testing.assert_array_equal(cuda.download(decoder.logits(step)), first)
        keys, values = pool.k.copy(), pool.v.copy()
        decoder.logits(steps_of(llm, other, rng)[1])  # a graph that is captured now; what it reads is of no matter
        pool.k[...], pool.v[...] = keys, values
        np.testing.assert_array_equal(cuda.download(decoder.logits(step)), first)
        del rubbish
    assert graph in decoder._graphs.values()


def test_an_engine_of_many_sequences_gives_what_it_gives_one_by_one(load, monkeypatch):
    llm = load(max_num_seqs=200, enable_prefix_caching=False)
    rng = np.random.default_rng([SEED, 74])
    prompts = [{"prompt_token_ids": rng.integers(0, llm.config.vocab_size, n).tolist()} for n in rng.integers(1, 40, 200)]
    params = [SamplingParams(temperature=0, max_tokens=10 + number % 20, ignore_eos=True) for number in range(200)]
    outputs = llm.generate(prompts, params)
    assert max(llm.engine.model.decoder._graphs) == 224
    assert min(llm.engine.model.decoder._graphs) < 64
    monkeypatch.setattr(llm.engine.model, "decoder", None)
    num_equal = 0
    for got, want in zip(outputs, llm.generate(prompts, params), strict=True):
        assert got.error is None
        got, want, prompt = got.outputs[0].token_ids, want.outputs[0].token_ids, want.prompt_token_ids
        assert len(got) == len(want)
        num_equal += got == want
        if got != want:  # at a near tie, which rounding decides
            first = next(i for i in range(len(got)) if got[i] != want[i])
            logits = llm.logits([*prompt, *want[:first]])[-1]
            assert abs(logits[got[first]] - logits[want[first]]) <= 0.15 * logits.std()
    assert num_equal >= 100


@pytest.mark.parametrize("load", [True], indirect=True)
def test_a_kernel_that_waits_in_vain_ends_and_the_next_request_works(load, monkeypatch):
    """Tiles of one product are not counted: whoever waits gives up, the request fails in words, and nothing hangs."""
    llm = load()
    params, prompt = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), {"prompt_token_ids": [5, 6, 7]}
    want = llm.generate(prompt, params)[0].outputs[0].token_ids
    kernel, count = jit.kernel, "red_add_release_gpu(product.done, 1)"
    assert jit.read_source(products.SOURCE).count(count) == 1

    def withheld(source, name, **defines):
        if source != products.SOURCE:
            return kernel(source, name, **defines)
        with monkeypatch.context() as patch:
            read = jit.read_source
            patch.setattr(jit, "read_source", lambda file: read(file).replace(count, f"if (product.finish != SWIGLU) {count}"))
            return kernel(source, name, **defines, PATIENCE=20_000_000)  # 20 ms

    with monkeypatch.context() as patch:
        patch.setattr(jit, "kernel", withheld)
        llm.engine.model.decoder._graphs.clear()
        began = time.perf_counter()
        with pytest.raises(DeviceError, match="waited in vain"):
            llm.generate(prompt, params)
        assert time.perf_counter() - began < 30
    llm.engine.model.decoder._graphs.clear()
    assert llm.generate(prompt, params)[0].outputs[0].token_ids == want
