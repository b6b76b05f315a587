"""LLM(batch_invariant=True) on a GPU: the same logits, to the bit, at any batch size and however prompts are cut."""

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, InvalidArgument, SamplingParams


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "qwen3"])
def test_bits(tmp_path, name, dtype):
    folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS[name])

    def load(**options):
        try:
            return LLM(folder, device="cuda", dtype=dtype, kv_memory="64MiB", batch_invariant=True, **options)
        except InvalidArgument as error:
            pytest.skip(str(error))

    llms = [load(max_num_batched_tokens=tokens, max_num_seqs=64) for tokens in (None, 33, 1)]
    ids = tiny_models.prompt(name)
    logits = [llm.logits(ids) for llm in llms]
    assert logits[0].tobytes() == logits[1].tobytes() == logits[2].tobytes()
    want = LLM(folder, device="cpu").logits(ids)
    assert np.linalg.norm(logits[0] - want) <= {"bfloat16": 2e-2, "float16": 4e-3}[dtype] * np.linalg.norm(want)

    rng = np.random.default_rng([SEED, 82])
    vocab = llms[0].config.vocab_size
    prompts = [{"prompt_token_ids": rng.integers(0, vocab, n).tolist()} for n in rng.integers(1, 40, 64)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    first = []
    for count, llm in ((1, llms[0]), (8, llms[1]), (64, llms[0])):
        [request, *_] = llm.generate(prompts[:count], params)
        first.append((request.outputs[0].token_ids, request.outputs[0].cumulative_logprob))
    assert first[0] == first[1] == first[2]
