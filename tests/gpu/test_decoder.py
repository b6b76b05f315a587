"""Captured decode steps on a GPU: what the engine generates by them, and a step whose kernels wait in vain."""

import time

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, SamplingParams
from cupaged.cuda import jit
from cupaged.errors import DeviceError
from cupaged.ops import cuda, products


def load(tmp_path, name="llama-gqa", **options):
    folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS[name])
    llm = LLM(folder, device="cuda", dtype="bfloat16", kv_memory="64MiB", **options)
    if llm.engine.model.decoder is None:
        pytest.skip("captured decode steps need compute capability 9.0")
    return llm


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "llama-tied", "qwen2-window", "qwen3-window"])
def test_logits_of_a_batch_are_those_of_the_operations(tmp_path, name, kv_dtype):
    """The same step by the decoder and by the operations one by one, for batches of every kernel."""
    llm = load(tmp_path, name, kv_cache_dtype=kv_dtype, max_num_seqs=64)
    model = llm.engine.model
    rng = np.random.default_rng([SEED, 71])
    prompts = [rng.integers(0, llm.config.vocab_size, n).tolist() for n in rng.integers(1, 40, 64)]
    steps = []
    forward = model.forward

    def both(batch, *pools, ops=None):
        logits = forward(batch, *pools, ops=ops)
        if ops is None and model.decoder.takes(batch):
            steps.append((cuda.download(logits), cuda.download(forward(batch, *pools, ops=model.ops))))
        return logits

    model.forward = both
    model.decoder.queue = None  # every step by `forward`
    params = [SamplingParams(temperature=0, max_tokens=2 + i % 7, ignore_eos=True, logprobs=0) for i in range(64)]
    for count in (64, 29, 12, 3, 1):
        llm.generate([{"prompt_token_ids": ids} for ids in prompts[:count]], params[:count])
    assert {64, 29, 12, 3, 1} <= {len(got) for got, _ in steps}
    if kv_dtype != "auto":  # where a code falls the other way a step of few rows is off by some of its own: count all together
        steps = [tuple(np.concatenate(each) for each in zip(*steps, strict=True))]
    for got, want in steps:
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


def test_a_kernel_that_waits_in_vain_ends_and_the_next_request_works(tmp_path, monkeypatch):
    """Tiles of one product are not counted: whoever waits gives up, the request fails in words, and nothing hangs."""
    llm = load(tmp_path)
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
