"""The graphs of decode steps, captured and replayed over emulated kernels."""

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from op_cases import QUANTISED, SEED

from cupaged import SamplingParams
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.checkpoint.weights import open_weights
from cupaged.cuda import tensor_map
from cupaged.engine.ahead import Ahead
from cupaged.engine.engine import Engine
from cupaged.engine.kv_pool import KVPool
from cupaged.errors import DeviceError
from cupaged.model.decoder import Decoder
from cupaged.model.llama import Batch, Llama
from cupaged.model.sampling import DRAWS
from cupaged.ops import cuda, products
from cupaged.ops import numpy as reference_ops

from .emulator import Kernel
from .test_weight_stream import alone, encode_slices

LIMIT = {"bfloat16": 2e-2, "int8": 2e-2, "fp8": 6e-2}  # ||logits - reference|| / ||reference||, as in tests/gpu
BLOCKS, BLOCK_SIZE = 24, 16


@pytest.fixture
def decoding(ops, monkeypatch, tmp_path):
    """Models on the emulated and on the NumPy operations, the first with a Decoder, and their pools."""
    monkeypatch.setattr(tensor_map, "encode_slices", encode_slices)
    alone(monkeypatch)
    monkeypatch.setattr(products, "_num_ctas", lambda: 3)

    def make(name, kv_dtype="bfloat16", chained=True, quantization=None):
        monkeypatch.setattr(products, "takes", lambda *of: chained)
        folder = tiny_models.write_model(tmp_path, tiny_models.EVEN_CONFIGS[name])
        config = load_config(folder)
        weights = [(tensor, array.astype(ml_dtypes.bfloat16)) for tensor, array in open_weights(folder, config)]
        sides = (ops, "bfloat16"), (reference_ops, "float32")
        models = [Llama(config, weights, o, dtype, 64, quantization) for o, dtype in sides]
        pools = [KVPool(o, config, d, BLOCKS, BLOCK_SIZE) for o, d in ((ops, kv_dtype), (reference_ops, "float32"))]
        pools[0].k.view(np.uint8)[...] = pools[0].v.view(np.uint8)[...] = 0  # block 0 is nobody's
        models[0].decoder = Decoder(models[0], pools[0].k, pools[0].v, pools[0].scales, 64, 16)
        return models, pools

    return make


def batch(sequences, tokens, pages, order):
    """So many next tokens of each sequence (its length, then); the last logits of each are wanted, in this order."""
    counts = [len(new) for new in tokens]
    tables = [pages[number][: -(-length // BLOCK_SIZE)] for number, length in sequences]
    return Batch(
        token_ids=np.concatenate(tokens).astype(np.int32),
        logit_rows=(np.cumsum(counts, dtype=np.int32) - 1)[order],
        q_indptr=np.cumsum([0, *counts], dtype=np.int32),
        seq_lens=np.int32([length for _, length in sequences]),
        page_indptr=np.cumsum([0, *map(len, tables)], dtype=np.int32),
        page_indices=np.concatenate(tables).astype(np.int32),
    )


CASES = [
    *(("llama-gqa", kv_dtype) for kv_dtype in ("bfloat16", "int8", "fp8")),
    *((name, "bfloat16") for name in ("llama-bias", "llama-tied", "qwen2-window", "qwen3-window")),
]


@pytest.mark.parametrize(
    ("name", "kv_dtype", "chained", "quantization"),
    [
        *((*case, chained, None) for case in CASES for chained in (True, False)),
        *(("llama-gqa", "bfloat16", False, kind) for kind in QUANTISED),
        ("llama-bias", "bfloat16", False, "int8"),
    ],
)
def test_steps_of_a_batch_that_grows_and_shrinks(decoding, ops, monkeypatch, name, kv_dtype, chained, quantization):
    monkeypatch.setattr(ops, "_SCRATCH_BYTES", 2 * 192 * 100)  # a quantised matrix is multiplied in slices
    (model, reference), pools = decoding(name, kv_dtype, chained, quantization)
    rng = np.random.default_rng([SEED, 61])
    vocab = model.config.vocab_size
    pages = rng.permutation(np.arange(1, BLOCKS))[:20].reshape(5, 4)
    lengths = [30, 1, 17, 8, 16]
    prefill = batch(list(enumerate(lengths)), [rng.integers(0, vocab, length) for length in lengths], pages, np.arange(5))
    for one, pool in zip((model, reference), pools, strict=True):
        one.forward(prefill, pool.k, pool.v, pool.scales)
    assert not model.decoder.takes(prefill)
    for running in ([0], [0, 1, 2], [2, 1, 4, 0, 3], [3], [1, 0, 4]):
        for number in running:
            lengths[number] += 1
        step = batch(
            [(number, lengths[number]) for number in running],
            [rng.integers(0, vocab, 1) for _ in running],
            pages,
            rng.permutation(len(running)),
        )
        assert model.decoder.takes(step)
        got, want = (
            one.forward(step, pool.k, pool.v, pool.scales) for one, pool in zip((model, reference), pools, strict=True)
        )
        assert got.shape == want.shape
        error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() <= LIMIT[kv_dtype]
        got[...] = np.nan
        model.check()
    assert set(model.decoder._graphs) == {1, 4, 8} | ({16} if not chained else set())


@pytest.mark.parametrize("chained", [True, False])
def test_tokens_are_drawn_and_go_on_from_where_they_are(decoding, ops, chained):
    """Steps queued one behind the other, their tokens asked for a step later; each draw is that from the logits of its step."""
    (model, _), (pool, _) = decoding("llama-gqa", chained=chained)
    decoder, rng = model.decoder, np.random.default_rng([SEED, 62])
    vocab = model.config.vocab_size
    pages = rng.permutation(np.arange(1, BLOCKS))[:21].reshape(7, 3)
    lengths = np.int32([30, 1, 17, 8, 16, 3, 15])
    prefill = batch(list(enumerate(lengths)), [rng.integers(0, vocab, length) for length in lengths], pages, np.arange(7))
    model.forward(prefill, pool.k, pool.v)
    under = np.zeros(7, DRAWS)
    under["temperature"] = [0, 1, 0.5, 0, 1, 2, 1]
    under["top_k"], under["top_p"] = [0, 0, 7, 3, 0, 0, 50], [1, 0.9, 1, 1, 0.5, 1, 1]
    under["min_p"] = [0, 0, 0, 0, 0.1, 0.01, 0]
    under["seed"], under["candidate"] = rng.integers(0, 2**64, 7, np.uint64), rng.integers(0, 9, 7)
    tokens = dict(enumerate(rng.integers(0, vocab, 7).tolist()))
    waiting = running = None
    # In one graph, to fewer in the same, to a smaller one, on in that, and a new beginning.
    for following, from_host in (
        *(([0, 1, 2, 3, 4, 5, 6], True), ([0, 1, 2, 3, 4, 5, 6], False), ([0, 2, 3, 5, 6], False)),
        *(([0, 2, 6], False), ([0, 2, 6], False), ([4, 1, 3], True), ([1, 3], False)),
    ):
        rows = None if from_host else [running.index(number) for number in following]
        running = following
        lengths[running] += 1
        under["position"] = lengths
        known = [[tokens[number]] if from_host else [-1] for number in running]
        step = batch([(number, lengths[number]) for number in running], known, pages, np.arange(len(running)))
        drawn = decoder.queue(step, under[running], rows)
        if waiting is not None:
            tokens |= dict(zip(waiting[0], waiting[1].tokens(), strict=True))
        size = next(size for size in decoder._graphs if decoder._graphs[size] is decoder._last)
        logits = decoder._last._logits.copy()
        expected = ops.sample(logits[: len(running)], *(np.ascontiguousarray(under[running][name]) for name in DRAWS.names))
        assert drawn.tokens() == expected.tolist()
        assert (decoder._last.token_ids >= 0).all()
        assert (decoder._last.token_ids < vocab).all()
        if not from_host:  # the same step with tokens that the host knows
            check = batch(
                [(number, lengths[number]) for number in running],
                [[tokens[n]] for n in running],
                pages,
                np.arange(len(running)),
            )
            again = decoder._last.token_ids.copy()
            np.testing.assert_array_equal(decoder.logits(check), logits[: len(running)])
            decoder._graphs[size].token_ids[...] = again
        waiting = running, drawn
        model.check()
    assert set(decoder._graphs) == {8, 4, 2} | ({16} if not chained else set())


def test_a_failed_wait_is_told_once_and_the_next_step_is_right(decoding):
    (model, reference), pools = decoding("llama-gqa")
    step = batch([(0, 1)], [[3]], [[2]], np.arange(1))
    got, want = (one.forward(step, pool.k, pool.v) for one, pool in zip((model, reference), pools, strict=True))
    model.decoder._graphs[1].chain.room.flag[0] = 1  # as a kernel leaves it
    with pytest.raises(DeviceError, match=r"waited in vain.*try once more"):
        model.check()
    got = model.forward(step, pools[0].k, pools[0].v)
    model.check()
    assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("chained", [True, False])
def test_an_engine_one_step_ahead_gives_the_same_tokens(decoding, tmp_path, monkeypatch, chained):
    (model, _), (pool, _) = decoding("llama-gqa", chained=chained)
    queue, num_ahead, found = model.decoder.queue, 0, []

    def counting(batch, draws, rows=None):
        nonlocal num_ahead
        num_ahead += rows is not None
        return queue(batch, draws, rows)

    model.decoder.queue = counting
    hows = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "top_p": 0.9},
        {"temperature": 0, "max_tokens": 3},
        {"seed": 3, "n": 2},
    ]
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            if not ahead:
                patch.setattr(Ahead, "go_on", lambda self, step: None)
            engine = Engine(model, Tokenizer.from_folder(tmp_path), pool, (), 64, 8, 64, True, 0)
            requests = [
                engine.add(
                    None, [7 * number + 1] * (13 + number), SamplingParams(**{"max_tokens": 7, "ignore_eos": True} | how)
                )
                for number, how in enumerate(hows)
            ]
            while not all(request.finished for request in requests):
                engine.step()
        found.append([output.token_ids for request in requests for output in request.outputs])
        assert [request.error for request in requests] == [None] * len(requests)
        assert (num_ahead > 3) == ahead
        assert engine.blocks.num_used == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("chained", [True, False])
def test_more_sequences_than_a_chain_takes(decoding, ops, chained):
    """A step of 70 is captured one by one, its tokens where the smaller graph of the next finds them, and back."""
    (model, reference), pools = decoding("llama-gqa", chained=chained)
    model.decoder = Decoder(model, pools[0].k, pools[0].v, None, 64, 70)
    rng = np.random.default_rng([SEED, 63])
    everyone = np.arange(70)
    pages = np.repeat(np.arange(1, BLOCKS), 4)[:70, None]  # four have each block, and write what is equal there
    tokens = np.repeat(rng.integers(0, model.config.vocab_size, BLOCKS), 4)[:70]
    under = np.zeros(70, DRAWS)
    waiting = None
    for length, running in ((1, everyone), (2, everyone), (3, everyone[:40]), (4, everyone[8:40])):
        rows = None if length == 1 else [waiting[0].tolist().index(number) for number in running]
        step = batch([(n, length) for n in running], [[tokens[n]] for n in running], pages, np.arange(running.size))
        under["position"] = length
        drawn = model.decoder.queue(step, under[running], rows)
        if waiting is not None:
            tokens[waiting[0]] = waiting[1].tokens()
            step.token_ids[...] = tokens[running]
        want = reference.forward(step, pools[1].k, pools[1].v)
        got = model.decoder._last._logits[: running.size]
        assert np.linalg.norm(got - want) <= LIMIT["bfloat16"] * np.linalg.norm(want)
        assert drawn.tokens() == got.argmax(axis=1).tolist()
        waiting = running, drawn
        model.check()
    chains = {size: graph.chain is not None for size, graph in model.decoder._graphs.items()}
    assert chains == {96: False, 48: chained, 32: chained}


@pytest.mark.parametrize("chained", [True, False])
def test_without_products_in_graphs_there_is_what_the_chain_takes(decoding, monkeypatch, caplog, chained):
    (model, _), (pool, _) = decoding("llama-gqa", chained=chained)
    gemm = cuda._gemm

    def refusing(*args):
        if Kernel.captured is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        gemm(*args)

    monkeypatch.setattr(cuda, "_gemm", refusing)
    decoder = Decoder(model, pool.k, pool.v, None, 64, 70)
    assert decoder.max_sequences == (64 if chained else 0)
    assert decoder.max_sequences == (64 if chained else 0)
    [record] = caplog.records
    assert "one operation at a time" in record.getMessage()
    assert decoder.takes(batch([(0, 1)], [[3]], [[2]], np.arange(1))) == chained
    assert Decoder(model, pool.k, pool.v, None, 64, 16).max_sequences == (16 if chained else 0)
    assert len(caplog.records) == (1 if chained else 2)
