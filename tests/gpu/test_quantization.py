"""Models with weights of 8 and 4 bits on a GPU; the bounds are those of tests/test_quantization.py and what 16 bits may add."""

import gc
from pathlib import Path

import pytest
import reference
import tiny_models
from op_cases import QUANTISED

from cupaged import LLM, InvalidArgument
from cupaged.model.parameters import device_bytes

LOGITS_LIMIT = {"int8": 1e-2, "fp8": 0.1, "int4": 0.25}
DTYPE_LIMIT = {"bfloat16": 2e-2, "float16": 4e-3}
PERPLEXITY_LIMIT = {"int8": 0.02, "fp8": 0.03}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", DTYPE_LIMIT)
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "mistral-window", "qwen3"])
def test_logits_of_tiny_models(tmp_path, name, kind, dtype):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name])
    llm = LLM(folder, device="cuda", dtype=dtype, quantization=kind, max_num_batched_tokens=33, kv_memory="16MiB")
    assert reference.tiny_logits_distance(llm, name) <= LOGITS_LIMIT[kind] + DTYPE_LIMIT[dtype]


def test_perplexity_of_smollm2():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "docs/new-model-family.md"))
    perplexity = {}
    for kind in (None, *PERPLEXITY_LIMIT):
        options = {"device": "cuda", "dtype": "float16", "quantization": kind, "max_model_len": 3100, "kv_memory": "300MB"}
        llm = LLM(reference.smollm2_folder(), **options)
        perplexity[kind] = llm.perplexity(llm.tokenizer.encode(text)[:3072])
    for kind, limit in PERPLEXITY_LIMIT.items():
        assert perplexity[kind] <= perplexity[None] * (1 + limit), perplexity


@pytest.mark.parametrize("kind", [None, *QUANTISED])
def test_a_model_takes_the_memory_that_it_says(kind):
    import cupy

    gc.collect()
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    options = {"device": "cuda", "quantization": kind, "max_model_len": 512, "kv_memory": "16MiB", "max_num_seqs": 1}
    llm = LLM(reference.smollm2_folder(), **options)
    llm.generate("Hello", use_tqdm=False)
    weights = pool.used_bytes() - before - llm.pool_stats().bytes
    expected = device_bytes(llm.config, llm.dtype, kind)
    assert expected <= weights <= expected + (24 << 20)  # what a step keeps, the table of RoPE, paddings


def test_together_with_batch_invariance_it_is_refused():
    with pytest.raises(InvalidArgument, match="batch_invariant does not know quantised weights"):
        LLM(reference.smollm2_folder(), device="cuda", quantization="int8", batch_invariant=True)
