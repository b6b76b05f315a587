"""Decode steps queued one ahead on a GPU give the tokens that they give one at a time."""

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, SamplingParams
from cupaged.engine.ahead import Ahead


def load(folder, kv_dtype, most):
    return LLM(
        folder,
        device="cuda",
        dtype="bfloat16",
        kv_cache_dtype=kv_dtype,
        kv_memory="64MiB",
        max_num_seqs=most,
        enable_prefix_caching=False,
    )


@pytest.mark.parametrize(("kv_dtype", "most"), [("auto", 64), ("int8", 64), ("fp8", 64), ("auto", 200)])
def test_tokens_are_the_same_as_without(tmp_path, monkeypatch, kv_dtype, most):
    folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS["llama-gqa"])
    rng = np.random.default_rng([SEED, 72])
    vocab = load(folder, kv_dtype, most).config.vocab_size
    prompts = [{"prompt_token_ids": rng.integers(0, vocab, n).tolist()} for n in rng.integers(1, 40, most)]
    hows = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.9, "top_k": 40}, {"seed": 3, "min_p": 0.05}] * (most // 4)
    params = [SamplingParams(**how, max_tokens=5 + number % 60, ignore_eos=True) for number, how in enumerate(hows)]

    def tokens(count, ahead):
        """Of the first requests, and how many steps were queued ahead. On a pool that nobody has used before: a prefill has
        its sequences in the order of their blocks, and attention cuts what it reads by that order."""
        llm, num_ahead = load(folder, kv_dtype, most), 0
        queue = llm.engine.model.decoder.queue

        def counting(batch, draws, rows=None):
            nonlocal num_ahead
            num_ahead += rows is not None
            return queue(batch, draws, rows)

        llm.engine.model.decoder.queue = counting
        with monkeypatch.context() as patch:
            if not ahead:
                patch.setattr(Ahead, "go_on", lambda self, step: None)
            outputs = llm.generate(prompts[:count], params[:count])
        assert all(request.error is None for request in outputs)
        return [request.outputs[0].token_ids for request in outputs], num_ahead

    # Lengths are foreseen, and nothing is found that an earlier step has computed in other company: both ways have the same
    # batches in the same steps, and the same bits.
    for count in (most, 29, 3, 1):
        (want, none), (got, some) = tokens(count, False), tokens(count, True)
        assert got == want
        assert none == 0 < some


def test_ends_that_nobody_foresees(tmp_path):
    """The others' rows of the step ahead move. One batch more or less moves roundings, too."""
    llm = load(tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS["llama-gqa"]), "auto", 64)
    rng = np.random.default_rng([SEED, 73])
    vocab = llm.config.vocab_size
    prompts = [{"prompt_token_ids": rng.integers(0, vocab, n).tolist()} for n in rng.integers(1, 40, 64)]
    stop = [rng.choice(vocab, 12, replace=False).tolist() for _ in prompts]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=60, stop_token_ids=ids, ignore_eos=True)
        for i, ids in enumerate(stop)
    ]
    for request, ids in zip(llm.generate(prompts, params), stop, strict=True):
        assert request.error is None
        [output] = request.outputs
        ends = [token in ids for token in output.token_ids]
        assert not any(ends[:-1])
        assert (output.finish_reason, len(ends) == 60 or ends[-1]) == ("stop" if ends[-1] else "length", True)
    assert llm.stats().blocks_used == 0
