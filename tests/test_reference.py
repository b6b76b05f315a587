"""Logits, token ids and text on the CPU equal those of transformers in float32.

A tiny model's logits are within 1e-4 of the reference, which is itself within 1e-6 of float64; leaving out any option of its
config.json moves them by 3e-2 or more (the provenance in tests/goldens/tiny_logits.npz lists both).
"""

import hashlib

import numpy as np
import pytest
import reference
import tiny_models
from reference import SMOLLM2
from safetensors.numpy import load_file

from cupaged import LLM, SamplingParams


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    root, written = tmp_path_factory.mktemp("tiny"), {}

    def folder(name):
        if name not in written:
            written[name] = tiny_models.write_model(root / name, tiny_models.CONFIGS[name])
        return written[name]

    return folder


@pytest.mark.parametrize(
    ("block_size", "step_tokens"),
    [(16, None), (1, 1), (16, 33), (256, 7)],
    ids=["at once", "token by token, pages of 1", "chunks of 33", "chunks of 7, one page"],
)
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_logits_of_tiny_models(tiny_folder, name, block_size, step_tokens):
    llm = LLM(tiny_folder(name), device="cpu", block_size=block_size, max_num_batched_tokens=step_tokens, max_num_seqs=2)
    assert reference.tiny_logits_distance(llm, name) <= 1e-4


@pytest.fixture(scope="module")
def smollm2():
    # One thread: two that share their cores with other work wait for each other in every product, 16 times slower.
    return LLM(reference.smollm2_folder(), device="cpu", max_model_len=512, threads=1)


def test_smollm2_weights_are_dequantised_bit_for_bit():
    tensors = load_file(reference.smollm2_folder() / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name], "<f4"))
    assert digest.hexdigest() == SMOLLM2["weights_sha256"]


@pytest.mark.parametrize("golden", SMOLLM2["texts"], ids=lambda golden: repr(golden["text"][:20]))
def test_smollm2_token_ids(smollm2, golden):
    assert smollm2.tokenizer.encode(golden["text"]) == golden["ids"]
    assert smollm2.tokenizer.decode(golden["ids"], skip_special_tokens=False) == golden["text"]


@pytest.mark.parametrize("golden", SMOLLM2["chats"], ids=range(len(SMOLLM2["chats"])))
def test_smollm2_chats(smollm2, golden):
    assert smollm2.tokenizer.render_chat(golden["messages"]) == golden["rendered"]
    assert smollm2.tokenizer.encode_chat(golden["messages"]) == golden["ids"]


def test_smollm2_greedy_continuations(smollm2):
    reference.assert_greedy_equal(smollm2, SMOLLM2["greedy"])


def test_smollm2_answers_paris(smollm2):
    answer = smollm2.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=64)
    )[0].outputs[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("golden", SMOLLM2["logits"], ids=lambda golden: f"{len(golden['ids'])} tokens")
def test_smollm2_logits(smollm2, golden):
    logits = smollm2.logits(golden["ids"])[-1]
    assert logits.argmax() == golden["top_ids"][0]
    np.testing.assert_allclose(logits[golden["top_ids"]], golden["top_logits"], rtol=1e-3)


def test_smollm2_perplexity(smollm2):
    golden = SMOLLM2["perplexity"]
    assert smollm2.perplexity(golden["text"]) == pytest.approx(golden["value"], rel=1e-3)  # float32 on both sides
