"""Decode steps queued one ahead on a GPU give the tokens that they give one at a time."""

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, SamplingParams
from cupaged.engine.ahead import Ahead


@pytest.mark.parametrize(("kv_dtype", "most"), [("auto", 64), ("int8", 64), ("fp8", 64), ("auto", 200)])
def test_tokens_are_the_same_as_without(tmp_path, monkeypatch, kv_dtype, most):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    llm = LLM(
        folder,
        device="cuda",
        dtype="bfloat16",
        kv_cache_dtype=kv_dtype,
        kv_memory="64MiB",
        max_num_seqs=most,
        enable_prefix_caching=False,
    )
    rng = np.random.default_rng([SEED, 72])
    vocab, queue, num_ahead, found = llm.config.vocab_size, llm.engine.model.decoder.queue, 0, []

    def counting(batch, draws, rows=None):
        nonlocal num_ahead
        num_ahead += rows is not None
        return queue(batch, draws, rows)

    llm.engine.model.decoder.queue = counting
    prompts = [{"prompt_token_ids": rng.integers(0, vocab, n).tolist()} for n in rng.integers(1, 40, most)]
    hows = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.9, "top_k": 40}, {"seed": 3, "min_p": 0.05}] * (most // 4)
    params = [SamplingParams(**how, max_tokens=5 + number % 60, ignore_eos=True) for number, how in enumerate(hows)]
    # Lengths are foreseen, and nothing is found that an earlier step has computed in other company: both ways have the same
    # batches in the same steps, and the same bits.
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            if not ahead:
                patch.setattr(Ahead, "go_on", lambda self, step: None)
            outputs = [llm.generate(prompts[:n], params[:n]) for n in (most, 29, 3, 1)]
        assert all(request.error is None for requests in outputs for request in requests)
        assert (num_ahead > 50) == ahead
        found.append([request.outputs[0].token_ids for requests in outputs for request in requests])
    assert found[0] == found[1]
    # Ends that nobody foresees: the others' rows of the step ahead move. One batch more or less moves roundings, too.
    stop = [rng.choice(vocab, 12, replace=False).tolist() for _ in prompts]
    params = [
        SamplingParams(**how, max_tokens=60, stop_token_ids=ids, ignore_eos=True) for how, ids in zip(hows, stop, strict=True)
    ]
    for request, ids in zip(llm.generate(prompts, params), stop, strict=True):
        assert request.error is None
        [output] = request.outputs
        ends = [token in ids for token in output.token_ids]
        assert not any(ends[:-1])
        assert (output.finish_reason, len(ends) == 60 or ends[-1]) == ("stop" if ends[-1] else "length", True)
    assert llm.stats().blocks_used == 0
