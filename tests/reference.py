"""What an independent implementation computed (scripts/make_goldens.py), and how the tests on CPU and GPU compare with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from cupaged.checkpoint import fetch
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.model.parameters import load
from cupaged.ops import numpy as numpy_ops

_FOLDER = Path(__file__).parent / "goldens"
_MODEL = "smollm2-135m-instruct"
SMOLLM2 = json.loads((_FOLDER / "smollm2.json").read_text(encoding="utf-8"))


def assert_loaded_exactly(ops, folder: Path, dtype: str) -> None:
    """Every array of the model in `folder`, once it is on the device of `ops`, has the bits that it has on the CPU."""
    config = load_config(folder)
    found, expected = (load(config, open_weights(folder, config), o, dtype) for o in (ops, numpy_ops))
    for ours, theirs in zip([found, *found.layers], [expected, *expected.layers], strict=True):
        for name, array in vars(theirs).items():
            if name != "layers" and array is not None:
                assert ops.download(getattr(ours, name)).tobytes() == array.tobytes(), name


def tiny_logits_distance(llm, name: str) -> float:
    """||logits - reference|| / ||reference|| of the tiny model `name`, which `llm` runs, over its prompt."""
    with np.load(_FOLDER / "tiny_logits.npz") as archive:
        reference = archive[name].astype(np.float64)
    logits = llm.logits(tiny_models.prompt(name))
    assert logits.dtype == np.float32
    assert logits.shape == (tiny_models.PROMPT_LENGTH, tiny_models.CONFIGS[name]["vocab_size"])
    return float(np.linalg.norm(logits[:, ::2] - reference) / np.linalg.norm(reference))


def smollm2_folder() -> Path:
    """Where SmolLM2 is; skips the test, saying so, where it has not been fetched."""
    folder = fetch.models_folder() / _MODEL
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{_MODEL} is not fetched: run `python -m cupaged fetch {_MODEL}`")
    return folder


def greedy_prompts(least_gap: float) -> list[dict]:
    """The goldens' greedy continuations along which the best logit leads by more than `least_gap`."""
    return [golden for golden in SMOLLM2["greedy"] if golden["least_gap"] > least_gap]


def assert_greedy_equal(llm, goldens: list[dict]) -> None:
    """`llm` continues all the prompts, together in one batch, as the goldens say."""
    from cupaged import SamplingParams

    prompts = [golden["prompt_ids"] for golden in goldens]
    params = [SamplingParams(temperature=0, max_tokens=len(golden["ids"])) for golden in goldens]
    results = [request.outputs[0] for request in llm.generate(prompts, params)]
    got = [(result.text, list(result.token_ids), result.finish_reason) for result in results]
    assert got == [(golden["text"], golden["ids"], golden["finish_reason"]) for golden in goldens]
