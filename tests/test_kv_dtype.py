"""LLM with a KV pool of another type than its activations', on the CPU; tests/op_cases.py holds the codes themselves."""

from pathlib import Path

import pytest
import reference
import tiny_models

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.engine.dtypes import kv_bytes_per_token

KV_DTYPES = ["float16", "bfloat16", "int8", "fp8"]
LOGITS_LIMIT = {"float16": 2e-3, "bfloat16": 1e-2, "int8": 2e-2, "fp8": 6e-2}  # ||logits - reference|| / ||reference||
PERPLEXITY_LIMIT = {"int8": 0.005, "fp8": 0.02}  # relative
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", tiny_models.CONFIGS["llama-gqa"])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen3"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_logits_of_tiny_models(tmp_path, name, kv_dtype):
    llm = LLM(tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name]), device="cpu", kv_cache_dtype=kv_dtype)
    assert 1e-5 < reference.tiny_logits_distance(llm, name) <= LOGITS_LIMIT[kv_dtype]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_together_in_a_small_pool_as_alone(folder, kv_dtype):
    prompts = [[7], list(range(1, 40)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(200, 100, -1))]

    def run(prompts, **options):
        llm = LLM(folder, device="cpu", kv_cache_dtype=kv_dtype, **options)
        return [request.outputs[0].token_ids for request in llm.generate(prompts, GREEDY)]

    alone = [run([prompt], kv_memory="4MB")[0] for prompt in prompts]
    room = 36 * 4 * kv_bytes_per_token(LLM(folder, device="cpu").config, kv_dtype)
    assert run(prompts, block_size=4, kv_memory=room, max_num_batched_tokens=50) == alone


def test_a_pool_is_as_large_as_it_says(folder):
    for kv_dtype, of_a_number in {"auto": 4, "float16": 2, "fp8": 1, "int8": 1}.items():
        llm = LLM(folder, device="cpu", kv_cache_dtype=kv_dtype, kv_memory=100_000)
        config, pool, stats = llm.config, llm.engine.pool, llm.pool_stats()
        heads = config.num_layers * config.num_kv_heads
        token = 2 * heads * (of_a_number * config.head_dim + (2 if kv_dtype == "int8" else 0))
        assert stats.num_blocks == 100_000 // (16 * token)
        assert stats.bytes == stats.num_blocks * 16 * token <= 100_000
        held = pool.k.nbytes + pool.v.nbytes + (pool.scales.nbytes if kv_dtype == "int8" else 0)
        assert held == stats.bytes


@pytest.mark.parametrize("kv_dtype", ["int4", "fp8_e5m2", None, "float64"])
def test_other_types_are_refused(folder, kv_dtype):
    with pytest.raises(InvalidArgument, match=r"kv_cache_dtype .* 'auto' or 'float32' or .* 'int8'"):
        LLM(folder, device="cpu", kv_cache_dtype=kv_dtype)


def test_what_the_kernels_take_is_chosen_by_the_operations():
    from cupaged.engine.dtypes import choose_kv_dtype
    from cupaged.ops import cuda

    assert [choose_kv_dtype(name, "bfloat16", cuda) for name in ("auto", "bfloat16", "fp8", "int8")] == [
        *("bfloat16", "bfloat16", "fp8", "int8")
    ]
    with pytest.raises(InvalidArgument, match="'bfloat16' or 'fp8' or 'int8'"):
        choose_kv_dtype("float16", "bfloat16", cuda)


def test_perplexity_of_smollm2():
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")[:9000]
    perplexity = {}
    for kv_dtype in ("auto", *PERPLEXITY_LIMIT):
        options = {"kv_cache_dtype": kv_dtype, "kv_memory": "300MB", "max_model_len": 2560, "threads": 1}
        perplexity[kv_dtype] = LLM(reference.smollm2_folder(), device="cpu", **options).perplexity(text)
    for kv_dtype, limit in PERPLEXITY_LIMIT.items():
        assert perplexity[kv_dtype] == pytest.approx(perplexity["auto"], rel=limit)
        assert perplexity[kv_dtype] != perplexity["auto"]
