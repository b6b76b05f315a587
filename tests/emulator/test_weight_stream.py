"""cuda_src/weight_stream.cu and stream_start.cu, emulated, as `ops.chain` launches them."""

import ctypes

import numpy as np
import pytest
from op_cases import SEED

from cupaged.cuda import jit, tensor_map
from cupaged.ops import chain, cuda, products, quantized
from cupaged.ops.quantized import QuantizedMatrix

from . import emulator
from .guarded_memory import GuardedMemory

EPS = 1e-5
MATRICES = {"qkv", "o", "gate_up", "down", "head"}


def encode_slices(address, rows, row_bytes, box_rows, box_bytes):
    """What tensor_map.encode_slices makes, of an array of the host."""
    elements = np.ctypeslib.as_array((ctypes.c_uint8 * (rows * row_bytes)).from_address(address))
    return emulator.tensor_map(elements.reshape(rows, -1, 128).swapaxes(0, 1), (box_bytes // 128, box_rows, 128))


def alone(monkeypatch):
    """The emulator's CTAs do not know each other: no clusters."""
    monkeypatch.setattr(products, "_CLUSTER", dict.fromkeys(products._CLUSTER, 1))


@pytest.fixture
def make(monkeypatch):
    """A Chain over guarded memory, whose launches have so many CTAs; `defines` are those of all kernels."""
    memory, defines_of_all = GuardedMemory(), {}

    def kernel(source, name, **defines):
        kernel = emulator.emulate(source, name, **defines | (defines_of_all if source == products.SOURCE else {}))
        kernel.after_launch = memory.check
        return kernel

    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(jit, "import_cupy", lambda: memory)
    monkeypatch.setattr(cuda, "cupy", memory)
    monkeypatch.setattr(tensor_map, "encode_slices", encode_slices)
    alone(monkeypatch)

    def make(num_tokens, dtype, num_ctas, max_products, **defines):
        defines_of_all.update(defines)
        monkeypatch.setattr(products, "_num_ctas", lambda: num_ctas)
        return chain.Chain(num_tokens, dtype, dtype, {}, max_products)

    make.memory = memory
    return make


class Weights:
    """Of two layers without attention: what stands for it is the first of the product's columns."""

    def __init__(self, rng, hidden, heads, ffn, vocab, dtype, upload):
        def draw(*shape):
            values = rng.standard_normal(shape) / np.sqrt(shape[-1])
            return upload(values.astype(dtype))

        def gain(size):
            return upload((1 + rng.standard_normal(size) / 4).astype(dtype))

        self.hidden, self.heads = hidden, heads
        self.embed, self.head = draw(vocab, hidden), draw(vocab, hidden)
        self.embed[...] = (self.embed.astype(np.float32) * np.sqrt(hidden)).astype(dtype)
        self.layers = [
            {
                "input_norm": gain(hidden),
                "qkv": draw(heads + 64, hidden),
                "bias": gain(heads + 64),
                "o": draw(hidden, heads),
                "post_norm": gain(hidden),
                "gate_up": draw(2 * ffn, hidden),
                "gate_up_bias": gain(2 * ffn),
                "down": draw(hidden, ffn),
                "down_bias": gain(hidden),
            }
            for _ in range(2)
        ]
        self.norm = gain(hidden)

    def quantise(self, kind, head_kind):
        """Every matrix becomes codes; the reference is of what those stand for."""
        self.exact = {}
        for owner, kind_of_it in [*((layer, kind) for layer in self.layers), (vars(self), head_kind)]:
            for name in MATRICES & set(owner):
                matrix = owner[name]
                owner[name] = cuda.quantize(matrix, kind_of_it)
                exact = quantized.dequantize(quantized.quantize(np.asarray(matrix), kind_of_it), "float64")
                self.exact[id(owner[name])] = exact

    def forward(self, ops, ids):
        """The float32 logits, by the operations of a Chain."""
        x = ops.embedding(ids, self.embed)
        for layer in self.layers:
            qkv = ops.norm_linear(x, layer["input_norm"], EPS, layer["qkv"], layer["bias"])
            ops.flush()
            attended = ops._rows("attended", (self.heads,), ops.dtype)
            attended[...] = qkv[:, : self.heads]
            x = ops.linear_add(attended, layer["o"], x)
            h = ops.norm_swiglu(x, layer["post_norm"], EPS, layer["gate_up"], layer["gate_up_bias"])
            x = ops.linear_add(h, layer["down"], x, layer["down_bias"])
        logits = ops.norm_linear(ops.embedding(ids, x), self.norm, EPS, self.head, dtype="float32")
        ops.flush()
        return logits

    def reference(self, ids):
        """The same in float64."""

        def norm(x, gain):
            return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * gain.astype(np.float64)

        def float64(weight):
            return self.exact[id(weight)] if isinstance(weight, QuantizedMatrix) else weight.astype(np.float64)

        x = self.embed[ids].astype(np.float64)
        for layer in self.layers:
            w = {name: float64(array) for name, array in layer.items()}
            x = x + (norm(x, w["input_norm"]) @ w["qkv"].T + w["bias"])[:, : self.heads] @ w["o"].T
            both = (norm(x, w["post_norm"]) @ w["gate_up"].T + w["gate_up_bias"]).reshape(len(x), -1, 2, 8)
            gate, up = (both[:, :, i].reshape(len(x), -1) for i in range(2))
            x = x + gate / (1 + np.exp(-gate)) * up @ w["down"].T + w["down_bias"]
        return norm(x, self.norm) @ float64(self.head).T


CASES = [  # tokens, hidden, heads, ffn, vocab, dtype, CTAs
    (1, 128, 128, 256, 300, "bfloat16", 3),
    (8, 192, 64, 320, 160, "float16", 5),
    (5, 576, 576, 64, 64, "bfloat16", 2),
    (13, 128, 64, 128, 400, "bfloat16", 4),
    (32, 64, 64, 192, 128, "float16", 11),
    (64, 256, 128, 128, 271, "bfloat16", 3),
    (40, 320, 64, 64, 64, "bfloat16", 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(make, case):
    num_tokens, hidden, heads, ffn, vocab, dtype, num_ctas = case
    rng = np.random.default_rng([SEED, 51, CASES.index(case)])
    weights = Weights(rng, hidden, heads, ffn, vocab, dtype, make.memory.asarray)
    ops = make(num_tokens, dtype, num_ctas, max_products=9)
    results = []
    for _ in range(2):  # the second on what the first has left
        ids = make.memory.asarray(rng.integers(0, vocab, num_tokens).astype(np.int32))
        logits = weights.forward(ops, ids)
        results.append(np.array(logits))
        want = weights.reference(ids)
        error = np.linalg.norm(logits - want) / np.linalg.norm(want)
        assert error < (1e-2 if dtype == "bfloat16" else 1.5e-3), error
        assert not ops.room.flag[0]
        logits[...] = np.nan


@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, "bfloat16"), (11, "float16"), (30, "float16"), (40, "bfloat16")])
@pytest.mark.parametrize("kinds", [("int8", "int8"), ("fp8", "int8"), ("int4", "int4")], ids="-".join)
def test_products_of_quantised_weights(make, kinds, num_tokens, dtype):
    """Slices that are longer than a row's rest; a head of another kind, which is a launch of its own."""
    rng = np.random.default_rng([SEED, 55, num_tokens])
    ops = make(num_tokens, dtype, 3, max_products=9)
    hidden = 384 if kinds[0] != "int4" else 1280 if num_tokens == 1 else 256
    weights = Weights(rng, hidden, 256, 256, 143, dtype, make.memory.asarray)
    weights.quantise(*kinds)
    limit = {"bfloat16": 1e-2, "float16": 1.5e-3}[dtype] * (1.5 if kinds[0] == "int4" else 1)  # whose weights are rounded, too
    for _ in range(2):
        ids = make.memory.asarray(rng.integers(0, 143, num_tokens).astype(np.int32))
        logits, want = weights.forward(ops, ids), weights.reference(ids)
        assert np.linalg.norm(logits - want) < limit * np.linalg.norm(want)
        logits[...] = np.nan


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_one_product_of_quantised_weights(make, kind):
    """Within what one product may be off by, against float64 on what the codes stand for."""
    rng = np.random.default_rng([SEED, 56])
    ops = make(5, "bfloat16", 3, max_products=9)
    weights = Weights(rng, 512, 256, 256, 64, "bfloat16", make.memory.asarray)
    weights.quantise(kind, kind)
    ids, layer = make.memory.asarray(rng.integers(0, 64, 5).astype(np.int32)), weights.layers[0]
    got = ops.norm_linear(ops.embedding(ids, weights.embed), layer["input_norm"], EPS, layer["qkv"], dtype="float32")
    ops.flush()
    x = weights.embed[ids].astype(np.float64)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * layer["input_norm"].astype(np.float64)
    want = x @ weights.exact[id(layer["qkv"])].T
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_a_token_does_not_depend_on_the_others(make):
    """The same bits in every company that takes the same kernel, and from every schedule."""
    rng = np.random.default_rng([SEED, 52])
    weights = Weights(rng, 192, 128, 320, 144, "bfloat16", make.memory.asarray)
    ids = rng.integers(0, 144, 64).astype(np.int32)
    rows = {}
    for count in (1, 2, 8, 9, 13, 17, 32, 33, 64):
        ops = make(count, "bfloat16", 5, max_products=9)
        logits = weights.forward(ops, make.memory.asarray(ids[:count]))
        rows.setdefault(ops.rows, set()).add(np.array(logits[0]).tobytes())
    assert [len(bits) for bits in rows.values()] == [1, 1, 1, 1]


def test_a_product_that_never_ends(make, monkeypatch):
    """Whoever waits for it gives up and says so, nothing hangs, and the next step is right again."""
    rng = np.random.default_rng([SEED, 53])
    weights = Weights(rng, 128, 64, 64, 64, "bfloat16", make.memory.asarray)
    ops = make(3, "bfloat16", 3, max_products=9, PATIENCE=3000000)
    ids = make.memory.asarray(rng.integers(0, 64, 3).astype(np.int32))
    count = "red_add_release_gpu(product.done, 1)"
    text = jit.read_source(products.SOURCE)
    assert text.count(count) == 1
    with monkeypatch.context() as patch:
        changed = {products.SOURCE: text.replace(count, f"if (product.finish != SWIGLU) {count}")}
        changed[chain.START_SOURCE] = jit.read_source(chain.START_SOURCE)
        patch.setattr(jit, "read_source", changed.get)
        weights.forward(ops, ids)
    assert ops.room.flag[0]
    ops.room.reset()
    logits, want = weights.forward(ops, ids), weights.reference(ids)
    assert np.linalg.norm(logits - want) < 1e-2 * np.linalg.norm(want)
    assert not ops.room.flag[0]


MUTATIONS = {
    "weights are not waited for": ("mbarrier_wait_parity(&shared.weights_full[turn.stage], turn.parity);", ""),
    "x is not waited for": (
        "mbarrier_wait_parity(&shared.x_full[x_turn.stage], x_turn.parity);\n        XSlice",
        "XSlice",
    ),
    "weights are replaced in use": ("mbarrier_wait_parity(&shared.weights_empty[turn.stage], turn.parity ^ 1);", ""),
    "x is replaced in use": ("mbarrier_wait_parity(&shared.x_empty[turn.stage], turn.parity ^ 1);", ""),
    "x is copied before it is made": (
        "if (p) wait_for(chain.products[p - 1], chain.flag);\n",
        "",
    ),
    "squares are read before they are made": (
        "mbarrier_wait_parity(&shared.x_made[p], 0);",
        "",
    ),
    "factors are not waited for": (
        "mbarrier_wait_parity(&shared.factors_full[p], 0);",
        "",
    ),
    "sums are put where x is still read": (
        "named_barrier_sync(CONSUMERS, CONSUMER_THREADS);  // what was there has been read",
        "",
    ),
    "sums are finished before they are there": (
        "named_barrier_sync(CONSUMERS, CONSUMER_THREADS);\n      const int octets",
        "const int octets",
    ),
    "x comes over sums that are finished": ("          fence_proxy_async_shared();\n", ""),
    "squares are summed before they are there": (
        "named_barrier_sync(CONSUMERS, CONSUMER_THREADS);\n    if (threadIdx.x >= TOKENS) return;",
        "if (threadIdx.x >= TOKENS) return;",
    ),
    "tiles are counted before they are written": (
        "red_add_release_gpu(product.done, 1)",
        "atom_add_relaxed_gpu(product.done, 1)",
    ),
    "a warp is counted before it has written": (
        "fence_proxy_async_global();\n    named_barrier_sync(CONSUMERS, CONSUMER_THREADS);\n",
        "fence_proxy_async_global();\n",
    ),
}


def attempts_in_small_rings(make, monkeypatch, hidden, count, mutate=lambda text: text):
    """Steps whose results must be right, of a kernel whose rings have as few stages as it can do with."""
    rng = np.random.default_rng([SEED, 54])
    weights = Weights(rng, hidden, 128, 192, 144, "bfloat16", make.memory.asarray)
    ids = make.memory.asarray(rng.integers(0, 144, count).astype(np.int32))
    want = weights.reference(ids)
    start = jit.read_source(chain.START_SOURCE)
    changed = {products.SOURCE: mutate(jit.read_source(products.SOURCE)), chain.START_SOURCE: start}
    monkeypatch.setattr(jit, "read_source", lambda source: changed[source])
    stages = 2 if count <= 8 else 5  # of few tokens by mma.sync, of more by wgmma
    ops = make(count, "bfloat16", 3, max_products=9, STAGES=stages, X_STAGES=2, MOST_UNDER_WAY=2)
    for _ in range(40):
        logits = weights.forward(ops, ids)
        assert np.linalg.norm(logits - want) < 1e-2 * np.linalg.norm(want)
        logits[...] = ops._arrays["normed"][...] = ops._arrays["activated"][...] = np.nan


@pytest.mark.parametrize(("hidden", "count"), [(64, 3), (640, 3), (640, 24)])
def test_small_rings_are_enough(make, monkeypatch, hidden, count):
    """So the mutations below fail for what they change."""
    attempts_in_small_rings(make, monkeypatch, hidden, count)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_fails(make, monkeypatch, mutation):
    # Factors are late only where a CTA has little else to do; x is replaced where there is more than the ring holds; with many
    # tokens sums are where x was.
    hidden, count = 64 if "factors" in mutation else 640, 24 if mutation.startswith("x comes over") else 3
    old, new = MUTATIONS[mutation]

    assert jit.read_source(products.SOURCE).count(old) == 1
    with pytest.raises((AssertionError, emulator.EmulationError)):
        attempts_in_small_rings(make, monkeypatch, hidden, count, lambda text: text.replace(old, new))
