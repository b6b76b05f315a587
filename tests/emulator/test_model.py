"""A whole model on the emulated operations: what a step's layers share, and K/V from one step to the next."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from op_cases import QUANTISED

from cupaged import SamplingParams, attention
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.cuda import jit
from cupaged.engine.dtypes import stored_as
from cupaged.engine.kv_pool import KVPool
from cupaged.model import decoder
from cupaged.model.llama import Batch, Llama
from cupaged.model.parameters import kinds
from cupaged.model.sampling import SamplingRow, sample
from cupaged.ops import numpy as reference_ops
from cupaged.ops import products

BFLOAT16 = ml_dtypes.bfloat16
LIMIT = {"bfloat16": 2e-2, "int8": 2e-2, "fp8": 6e-2}  # ||logits - reference|| / ||reference||, as in tests/gpu
PAGES = np.int32([5, 2, 7, 1, 3, 6])  # of blocks of 16: the first sequence has four, the second two


def batch(tokens, seq_lens):
    """The next tokens of both sequences, which then have these lengths; the last logits of each are wanted."""
    counts = [len(new) for new in tokens]
    return Batch(
        token_ids=np.concatenate(tokens).astype(np.int32),
        logit_rows=np.cumsum(counts, dtype=np.int32) - 1,
        q_indptr=np.cumsum([0, *counts], dtype=np.int32),
        seq_lens=np.int32(seq_lens),
        page_indptr=np.int32([0, 4, 6]),
        page_indices=PAGES,
    )


@pytest.mark.parametrize(
    ("name", "kv_dtype", "quantization"),
    [
        *(("llama-gqa", kv_dtype, None) for kv_dtype in ("bfloat16", "int8", "fp8")),
        *((name, "bfloat16", None) for name in ("llama-bias", "llama-tied", "qwen2-window", "qwen3-window")),
        *(("llama-gqa", "bfloat16", kind) for kind in QUANTISED),
        *(("llama-bias", "bfloat16", "int8"), ("llama-tied", "bfloat16", "fp8"), ("qwen3-window", "int8", "int4")),
    ],
)
def test_a_model_computes_what_the_numpy_operations_say(ops, monkeypatch, tmp_path, name, kv_dtype, quantization):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name])
    config = load_config(folder)
    weights = [(tensor, array.astype(BFLOAT16)) for tensor, array in open_weights(folder, config)]
    sides = (ops, "bfloat16"), (reference_ops, "float32")
    monkeypatch.setattr(ops, "_SCRATCH_BYTES", 2 * 192 * 100)  # a quantised matrix is multiplied in slices
    models = [Llama(config, weights, o, dtype, 64, quantization) for o, dtype in sides]
    pools = [KVPool(ops, config, kv_dtype, 8, 16), KVPool(reference_ops, config, "float32", 8, 16)]
    assert pools[0].k.dtype == stored_as(kv_dtype)
    planned = []
    plan = attention.plan
    monkeypatch.setattr(
        attention, "plan", lambda *args, **kwargs: (planned.append(kwargs["sliding_window"]), plan(*args, **kwargs))[1]
    )

    first, second = tiny_models.prompt(name)[:50], tiny_models.prompt(name)[-20:]
    steps = [
        batch([first[:49], second[:7]], [49, 7]),
        batch([first[49:], second[7:19]], [50, 19]),  # a decode beside a chunk of a prefill
        batch([[7], second[19:]], [51, 20]),
    ]
    for step in steps:
        logits = [model.forward(step, pool.k, pool.v, pool.scales) for model, pool in zip(models, pools, strict=True)]
        distance = np.linalg.norm(ops.download(logits[0]) - logits[1]) / np.linalg.norm(logits[1])
        assert distance <= LIMIT[kv_dtype]
        assert sorted(planned, key=str) == sorted(set(config.sliding_windows), key=str), (
            "one plan for each window, shared by layers"
        )
        planned.clear()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("name", "kv_dtype", "quantization"),
    [
        *(("llama-gqa", kv_dtype, None) for kv_dtype in ("bfloat16", "int8", "fp8")),
        *(("qwen3", "bfloat16", quantization) for quantization in (None, *QUANTISED)),
    ],
)
def test_what_is_compiled_at_the_start_is_what_a_request_takes(
    ops, monkeypatch, tmp_path, name, kv_dtype, quantization, graphs
):
    compiled, asked, kernel = [], [], jit.kernel
    monkeypatch.setattr(jit, "compiling", lambda variants: contextlib.nullcontext(compiled.extend(variants)))
    monkeypatch.setattr(
        jit, "kernel", lambda *names, **defines: (asked.append((*names, defines)), kernel(*names, **defines))[1]
    )
    monkeypatch.setattr(attention.kernel, "_takes_sm90", lambda *types: False)
    monkeypatch.setattr(products, "takes", lambda *of: False)

    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name])
    config = load_config(folder)
    also = ops.variants_of_weights(kinds(quantization), "bfloat16")
    if graphs:
        also += decoder.variants(config, "bfloat16", stored_as(kv_dtype), quantization, 4)
    with ops.compiling("bfloat16", stored_as(kv_dtype), config.head_dim, 16, config.qk_norm, also):
        model = Llama(config, open_weights(folder, config), ops, "bfloat16", 64, quantization)
    assert {name for _, name, _ in asked} == ({"quantize"} if quantization else set())
    pool = KVPool(ops, config, kv_dtype, 8, 16)
    if graphs:
        model.decoder = decoder.Decoder(model, pool.k, pool.v, pool.scales, 64, 4)
    for tokens, lengths in (([range(40), range(7)], [40, 7]), ([[5], [6]], [41, 8])):
        logits = model.forward(batch(tokens, lengths), pool.k, pool.v, pool.scales)
        sample(ops, logits, [SamplingRow(SamplingParams(), 1, 0, 50, None, {})] * 2)

    def names(variants):
        return {(source, name, *sorted(defines.items())) for source, name, defines in variants}

    assert names(asked) == names(compiled)
