"""Logits of `ops.invariant`, emulated: the same bits in any company, and however a prompt is cut."""

import numpy as np
import pytest
import tiny_models
from op_cases import SEED

from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.cuda import tensor_map
from cupaged.engine.kv_pool import KVPool
from cupaged.errors import DeviceError
from cupaged.model.llama import Batch, Llama
from cupaged.ops import numpy as reference_ops
from cupaged.ops import products
from cupaged.ops.invariant import BatchInvariant

from .test_weight_stream import alone, encode_slices

BLOCK_SIZE, BLOCKS = 16, 60


@pytest.fixture
def make(ops, monkeypatch, tmp_path):
    monkeypatch.setattr(tensor_map, "encode_slices", encode_slices)
    alone(monkeypatch)
    monkeypatch.setattr(products, "_num_ctas", lambda: 3)

    def make(name):
        folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS[name])
        config = load_config(folder)
        weights = list(open_weights(folder, config))
        invariant = BatchInvariant()
        models = [Llama(config, weights, o, d, 256) for o, d in ((invariant, "bfloat16"), (reference_ops, "float32"))]
        pools = [KVPool(o, config, d, BLOCKS, BLOCK_SIZE) for o, d in ((ops, "bfloat16"), (reference_ops, "float32"))]
        return models, pools

    return make


def step(chunks, pages):
    """Batch of {sequence: (ids of all its tokens so far, how many of them are new)}, the last logits of each wanted."""
    lengths = [len(ids) for ids, _ in chunks.values()]
    counts = [count for _, count in chunks.values()]
    tables = [pages[number][: -(-length // BLOCK_SIZE)] for number, length in zip(chunks, lengths, strict=True)]
    return Batch(
        token_ids=np.concatenate([ids[len(ids) - count :] for ids, count in chunks.values()]).astype(np.int32),
        logit_rows=np.cumsum(counts, dtype=np.int32) - 1,
        q_indptr=np.cumsum([0, *counts], dtype=np.int32),
        seq_lens=np.int32(lengths),
        page_indptr=np.cumsum([0, *map(len, tables)], dtype=np.int32),
        page_indices=np.concatenate(tables).astype(np.int32),
    )


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "qwen3"])
def test_the_same_bits_in_any_company_and_any_cut(make, name):
    (model, reference), pools = make(name)
    rng = np.random.default_rng([SEED, 81])
    ids = rng.integers(0, model.config.vocab_size, 81)
    others = {number: rng.integers(0, model.config.vocab_size, 1 + 7 * number) for number in range(1, 9)}
    pages = dict(enumerate(rng.permutation(np.arange(1, BLOCKS))[: 9 * 6].reshape(9, 6)))

    def run(cuts, company):
        """The logits after 80 and after 81 tokens, the first 80 computed in such steps, beside others."""
        pools[0].k.view(np.uint8)[...] = pools[0].v.view(np.uint8)[...] = 0xFF
        found, stop = [], 0
        for count in (*cuts, 1):
            stop += count
            chunks = {0: (ids[:stop], count)} | {number: (others[number], len(others[number])) for number in company}
            logits = model.forward(step(chunks, pages), pools[0].k, pools[0].v)
            model.check()
            found.append(np.array(logits)[0])
        return np.stack(found[-2:])

    whole = run([80], [])
    for cuts, company in (([80], range(1, 9)), ([3, 70, 7], []), ([64, 16], [5]), ([79, 1], [1, 2])):
        assert run(cuts, company).tobytes() == whole.tobytes(), f"cut into {cuts}, beside {list(company)}"
    want = [reference.forward(step({0: (ids[:n], c)}, pages), pools[1].k, pools[1].v)[0] for n, c in ((80, 80), (81, 1))]
    assert np.linalg.norm(whole - want) <= 2e-2 * np.linalg.norm(want)


def test_a_failed_product_is_told_once(make):
    (model, _), pools = make("llama-gqa")
    pages = {0: np.arange(1, 3)}
    model.forward(step({0: (np.arange(5), 5)}, pages), pools[0].k, pools[0].v)
    model.check()
    model.ops._room.flag[0] = 1  # as a kernel leaves it
    with pytest.raises(DeviceError, match="waited in vain"):
        model.check()
    model.check()
