"""Weights of 8 and 4 bits: what their codes stand for, and models with them on the CPU; tests/op_cases.py has the products."""

import math
import weakref
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import pytest
import reference
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import QUANTISED, SHAPES_OF_QUANTISED, check_quantized

from cupaged import LLM, InvalidArgument, SamplingParams
from cupaged.bench.limits import weight_and_kv_bytes
from cupaged.checkpoint.config import load_config
from cupaged.checkpoint.weights import open_weights
from cupaged.model.llama import Llama
from cupaged.model.parameters import bytes_of_a_step, device_bytes, load, unquantised_bytes
from cupaged.ops import numpy as ops

LOGITS_LIMIT = {"int8": 1e-2, "fp8": 0.1, "int4": 0.25}  # ||logits - reference|| / ||reference||; small matrices lose most
PERPLEXITY_LIMIT = {"int8": 0.02, "fp8": 0.03}  # relative; SmolLM2's weights have 4 bits already, of other scales than ours
MATRICES = ("qkv", "o", "gate_up", "down")
ROOT = Path(__file__).parents[1]


@st.composite
def matrices(draw):
    """Rows of 32 to 256 weights of every magnitude that float16 has, in one of the types of checkpoints."""
    inner, rows = draw(st.sampled_from([32, 64, 96, 256])), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_normal((rows, inner)) * 2.0 ** rng.uniform(-30, draw(st.sampled_from([-20, 0, 12])), (rows, 1))
    weights += draw(st.sampled_from([0.0, 0.0, 1e-3, -50.0]))
    weights *= rng.random(weights.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return weights.astype(draw(st.sampled_from(["bfloat16", "float16", "float32"])))


@pytest.mark.parametrize("kind", QUANTISED)
@given(weights=matrices())
@settings(deadline=None, max_examples=150)
def test_no_weight_moves_further_than_half_a_step(kind, weights):
    matrix = ops.quantize(weights, kind)
    exact, back = weights.astype(np.float64), ops.dequantize(matrix, "float64")
    scales = matrix.scales.astype(np.float64)
    assert np.isfinite(scales).all()
    if kind == "int4":
        group = next(n for n in (128, 64, 32) if weights.shape[1] % n == 0)
        assert scales.shape == (len(weights), weights.shape[1] // group, 2)
        scale = scales[..., 0].repeat(group, axis=1)
        allowed = scale / 2
    else:
        assert scales.shape == (len(weights),)
        scale = scales[:, None]
        allowed = scale / 2 if kind == "int8" else np.maximum(abs(exact) / 16, scale * 2**-10)
    rounding = 2.0**-21 * (abs(exact) + 16 * scale)  # of the quotients, in float32
    assert (abs(back - exact) <= allowed + rounding).all()
    spread = exact - np.minimum(exact.min(), 0) if kind == "int4" else abs(exact)
    largest = {"int8": 127, "fp8": 448, "int4": 15}[kind]
    # no coarser than need be: a scale is rounded upwards by a step of float16 at most, and so is what is subtracted
    assert (scale <= (spread.max() + abs(exact).max() * 2**-10 + 2**-24) / largest * (1 + 2**-10) + 2**-24).all()


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES_OF_QUANTISED, ids=str)
def test_a_matrix_is_dequantised_whole_and_in_slices(kind, shape):
    check_quantized(ops, kind, "float32", shape)


def test_codes_by_hand():
    row = np.float32([127, -63.5, 0.5, 1.5, *[0] * 28])
    matrix = ops.quantize(row[None], "int8")
    assert (matrix.codes[0, :5].tolist(), matrix.scales.tolist()) == ([127, -64, 0, 2, 0], [1.0])
    matrix = ops.quantize(np.float32([[448, -1, 2**-9, 17, *[0] * 28]]), "fp8")
    assert (matrix.codes[0, :5].tolist(), matrix.scales.tolist()) == ([0x7E, 0xB8, 0x01, 0x58, 0], [1.0])  # 17: to 16, the even
    matrix = ops.quantize(np.float32([[-2, 13, 0.4, 0.6, *[-2] * 28]]), "int4")
    assert (matrix.codes[0, :3].tolist(), matrix.scales.tolist()) == ([0xF0, 0x32, 0], [[[1.0, -2.0]]])


def test_int4_takes_the_largest_groups_that_divide_a_row():
    groups = {
        inner: inner // ops.quantize(np.ones((2, inner)), "int4").scales.shape[1] for inner in (32, 96, 64, 320, 128, 384)
    }
    assert groups == {32: 32, 96: 32, 64: 64, 320: 64, 128: 128, 384: 128}


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match=r"'int4' takes rows of a multiple of 32 .* have 48"):
        ops.quantize(np.ones((3, 48)), "int4")
    with pytest.raises(InvalidArgument, match=r"'fp8' takes rows of a multiple of 16 .* have 40"):
        ops.quantize(np.ones((3, 40)), "fp8")
    with pytest.raises(InvalidArgument, match="quantization is 'nf4'; give 'int8', 'fp8' or 'int4'"):
        ops.quantize(np.ones((3, 64)), "nf4")
    folder = tiny_models.write_model(tmp_path, {**tiny_models.CONFIGS["llama-gqa"], "intermediate_size": 176})
    with pytest.raises(InvalidArgument, match=r"'int4' .* the model's down matrix have 176; take 'int8' or 'fp8'"):
        LLM(folder, device="cpu", quantization="int4")
    LLM(folder, device="cpu", quantization="int8")
    for kind in ("int5", "", 8):
        with pytest.raises(InvalidArgument, match=f"quantization is {kind!r}; give 'int8', 'fp8' or 'int4', or leave it out"):
            LLM("no/such-model", device="cpu", quantization=kind)
    with pytest.raises(InvalidArgument, match="batch_invariant does not know quantised weights"):
        LLM(folder, quantization="int8", batch_invariant=True)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "qwen3"])
def test_all_matrices_of_a_model_are_codes_and_nothing_else_is(tmp_path, name, kind):
    config = load_config(tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name]))
    pairs = list(open_weights(tmp_path, config))
    plain = load(config, pairs, ops, "float32")
    np.random.default_rng().shuffle(pairs)
    made = load(config, pairs, ops, "float32", kind)
    for layer, before in zip(made.layers, plain.layers, strict=True):
        for field, array in vars(before).items():
            if field not in MATRICES:
                np.testing.assert_array_equal(getattr(layer, field), array)
                continue
            matrix, expected = getattr(layer, field), ops.quantize(array, kind)
            assert (matrix.kind, matrix.shape) == (kind, array.shape)
            assert matrix.codes.tobytes() == expected.codes.tobytes()
            assert matrix.scales.tobytes() == expected.scales.tobytes()
    np.testing.assert_array_equal(made.embed, plain.embed)
    assert made.head.kind == ("int8" if kind == "fp8" else kind)
    assert made.head.codes.tobytes() == ops.quantize(plain.head, made.head.kind).codes.tobytes()


@pytest.mark.parametrize("kind", [None, *QUANTISED])
@pytest.mark.parametrize("name", ["llama-bias", "llama-tied"])
def test_bytes_are_counted_as_they_are(tmp_path, name, kind):
    llm = LLM(tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name]), device="cpu", quantization=kind)
    params, config = llm.engine.model.params, llm.config
    layers = sum(array.nbytes for layer in params.layers for array in vars(layer).values() if array is not None)
    embed, head = params.embed.nbytes, 0 if params.head is params.embed else params.head.nbytes
    assert device_bytes(config, "float32", kind) == layers + embed + head + params.norm.nbytes
    read = layers + (head or embed) + params.norm.nbytes
    assert bytes_of_a_step(config, "float32", kind) == weight_and_kv_bytes(llm)[0] == read
    if kind is not None:  # an eighth or a quarter of float32 and the scales, of groups of 32 weights or rows of 64 at least
        numbers = sum(math.prod(getattr(layer, field).shape) for layer in params.layers for field in MATRICES)
        held = sum(getattr(layer, field).nbytes for layer in params.layers for field in MATRICES)
        assert held <= numbers * (0.5 + 4 / 32 if kind == "int4" else 1 + 2 / 64)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_matrix_is_quantised_once_its_last_part_is_there(tmp_path, kind):
    """In the order of a file no more of them is there unquantised than is said, and in the end nothing."""
    config = load_config(tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"]))
    made, most = [], 0

    def there():
        return sum(array().nbytes for array in made if array() is not None)

    class Device:
        def __getattr__(self, name):
            return getattr(ops, name)

        def _made(self, array):
            nonlocal most
            if array.ndim == 2:
                made.append(weakref.ref(array))
            most = max(most, there())
            return array

        def upload(self, array, dtype=None):
            return self._made(ops.upload(array, dtype))

        def empty(self, shape, dtype):
            return self._made(ops.empty(shape, dtype))

    def on_device():  # as random weights are
        for name, array in sorted(open_weights(tmp_path, config)):
            yield name, array.copy()

    parameters = load(config, on_device(), Device(), "float32", kind)
    embed = parameters.embed.nbytes
    assert there() == embed
    assert 0 < most - embed <= unquantised_bytes(config, "float32", kind)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "mistral-window", "qwen3"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_logits_of_tiny_models(tmp_path, name, kind):
    llm = LLM(tiny_models.write_model(tmp_path, tiny_models.CONFIGS[name]), device="cpu", quantization=kind)
    assert 1e-4 < reference.tiny_logits_distance(llm, name) <= LOGITS_LIMIT[kind]


@pytest.mark.parametrize("kind", QUANTISED)
def test_logits_are_those_of_what_the_codes_stand_for(tmp_path, kind):
    """A model whose weights are what the codes stand for computes the same, to float32's rounding."""
    config = load_config(tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-gqa"]))
    llm = LLM(tmp_path, device="cpu", quantization=kind)
    plain = LLM(tmp_path, device="cpu")
    for layer, quantised in zip(plain.engine.model.params.layers, llm.engine.model.params.layers, strict=True):
        for field in MATRICES:
            setattr(layer, field, ops.dequantize(getattr(quantised, field), "float32"))
    plain.engine.model.params.head = ops.dequantize(llm.engine.model.params.head, "float32")
    ids = tiny_models.prompt("llama-gqa")
    assert isinstance(llm.engine.model, Llama)
    assert config.vocab_size == llm.logits(ids).shape[1]
    np.testing.assert_allclose(llm.logits(ids), plain.logits(ids), rtol=0, atol=1e-5 * abs(plain.logits(ids)).max())


@pytest.mark.parametrize("kind", QUANTISED)
def test_random_weights_are_quantised_too(tmp_path, kind):
    folder = tiny_models.write_model(tmp_path, tiny_models.CONFIGS["llama-tied"])
    llm = LLM(folder / "config.json", device="cpu", load_format="dummy", quantization=kind)
    assert (llm.quantization, llm.engine.model.params.layers[0].o.kind) == (kind, kind)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert len(llm.generate({"prompt_token_ids": [1, 2, 3]}, params)[0].outputs[0].token_ids) == 5


def test_perplexity_of_smollm2():
    """Over 3000 tokens, in pieces that are read each by itself."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "docs/new-model-family.md"))
    perplexity = {}
    for kind in (None, *PERPLEXITY_LIMIT):
        llm = LLM(reference.smollm2_folder(), device="cpu", quantization=kind, kv_memory="100MB", max_model_len=768, threads=1)
        ids = llm.tokenizer.encode(text)[:3072]
        assert len(ids) == 3072
        logs = [np.log(llm.perplexity(ids[start : start + 768])) for start in range(0, 3072, 768)]
        perplexity[kind] = np.exp(np.mean(logs))
    for kind, limit in PERPLEXITY_LIMIT.items():
        assert perplexity[kind] != perplexity[None]
        assert perplexity[kind] <= perplexity[None] * (1 + limit), perplexity
