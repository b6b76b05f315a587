"""The engine over the emulated operations: forks, guesses, log-probabilities and constraints, as on a GPU."""

import numpy as np
import pytest
import tiny_models

from cupaged import NgramProposer, SamplingParams
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.checkpoint.weights import open_weights
from cupaged.engine.beam_search import BeamSearchParams, beam_search
from cupaged.engine.engine import Engine
from cupaged.engine.kv_pool import KVPool
from cupaged.model.llama import Llama


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_what_requests_ask_for_is_there(ops, tmp_path, kv_dtype):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"])
    config = load_config(folder)
    model = Llama(config, list(open_weights(folder, config)), ops, "bfloat16", 64)
    pool = KVPool(ops, config, kv_dtype, 30, 4)
    engine = Engine(model, Tokenizer.from_folder(folder), pool, (), 64, 8, 64, True, 0, NgramProposer(3), 3)

    def only_few(token_ids, logits):
        return np.where(np.arange(len(logits)) < 10, logits, -np.inf)

    requests = [
        engine.add(None, [1, 2, 3, 4, 5, 6], SamplingParams(n=2, seed=1, max_tokens=4, logprobs=3, prompt_logprobs=1)),
        engine.add(None, [7, 8] * 4, SamplingParams(temperature=0, max_tokens=9, logit_bias={7: 100})),
        engine.add(None, [9], SamplingParams(max_tokens=3, logits_processors=[only_few], repetition_penalty=1.1, min_tokens=2)),
    ]
    while not all(request.finished for request in requests):
        engine.step()
    several, repeated, constrained = requests
    assert [request.error for request in requests] == [None] * 3
    assert len(several.prompt_logprobs) == 6
    for output in several.outputs:
        assert [len(entry) in (3, 4) for entry in output.logprobs] == [True] * 4
        assert all(entry[token].logprob <= 0 for entry, token in zip(output.logprobs, output.token_ids, strict=True))
        assert all(sum(np.exp(logprob.logprob) for logprob in entry.values()) <= 1 for entry in output.logprobs)
    assert several.outputs[0].token_ids != several.outputs[1].token_ids
    assert repeated.outputs[0].token_ids == [7] * 9
    assert engine.stats().num_accepted_tokens > 0
    assert max(constrained.outputs[0].token_ids) < 10
    best, second = beam_search(engine, [1, 2, 3], BeamSearchParams(2, 3))
    assert best.cumulative_logprob >= second.cumulative_logprob
    engine.blocks.validate([])
    assert engine.blocks.num_used == 0
