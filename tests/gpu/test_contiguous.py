"""The contiguous cache that `bench generate` measures against gives the logits of the pages on a GPU."""

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM
from cupaged.bench.contiguous import Contiguous, contiguous_step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "qwen3-window"])
def test_logits_are_those_of_the_pages(tmp_path, name, dtype):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name])
    llm = LLM(folder, device="cuda", dtype=dtype, kv_memory="64MiB")
    ids = np.random.default_rng([SEED, 91]).integers(0, 256, (3, 60)).astype(np.int32)
    ops = llm.engine.model.ops
    with ops.device():
        model = Contiguous(llm.engine.model, batch=3, max_len=60)
        for begin, stop in ((0, 33), (33, 34), (34, 60)):
            logits = ops.download(model.forward(ids[:, begin:stop])).astype(np.float64)
            for sequence, row in zip(ids, logits, strict=True):
                expected = llm.logits(sequence[:stop].tolist())[-1]
                tolerance = {"bfloat16": 3e-2, "float16": 4e-3}[dtype]
                assert np.linalg.norm(row - expected) < tolerance * np.linalg.norm(expected), f"CUPAGED_TEST_SEED={SEED}"


def test_a_step_takes_time(tmp_path):
    llm = LLM(tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"]), device="cuda", kv_memory="64MiB")
    assert 0 < contiguous_step(llm, batch=2, context=70, tokens=5) < 1000
