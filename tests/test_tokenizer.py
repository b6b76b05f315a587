"""Tokenizer folders: encoding, streaming of whole characters, chat templates, and what is refused."""

import json
import random
from datetime import datetime

import pytest
import reference
import tokenizers
from tiny_models import write_tokenizer
from tokenizers import decoders, models, normalizers, processors

from cupaged.checkpoint.tokenizer import Tokenizer
from cupaged.errors import CheckpointError, InvalidArgument

TEXT = "naïve 日本語 👩‍👩‍👧‍👦 🇫🇷 e\u0301\n\ttab"
BOS, EOS = 256, 257  # of write_tokenizer, where ids below are bytes
HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer whose ids are bytes, as Llama 3's and Qwen's are for what they have no word for."""
    write_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def byte_fallback(tmp_path):
    """Llama 2's and Mistral's kind: a sentencepiece with bytes for the characters that it lacks; id 0 is the BOS."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁ab", "é"]
    model = models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, [], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def with_template(folder, template, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **settings}))
    return Tokenizer.from_folder(folder)


def pieces(tokenizer, ids, **options):
    stream = tokenizer.decode_stream(**options)
    return [piece for piece in map(stream.step, ids) if piece is not None]


def test_encode_and_decode(byte_level):
    ids = byte_level.encode(TEXT)
    assert ids == list(TEXT.encode())
    assert byte_level.decode(ids) == TEXT
    assert byte_level.decode([BOS, *ids, EOS]) == TEXT
    assert byte_level.decode([BOS, *ids, EOS], skip_special_tokens=False) == f"<s>{TEXT}</s>"
    assert byte_level.encode("<s>x") == [BOS, ord("x")]
    assert byte_level.encode("") == []
    assert byte_level.decode([]) == ""
    assert byte_level.token_to_id("</s>") == EOS
    assert byte_level.token_to_id("no such token") is None
    assert byte_level.vocab_size == 260


def test_special_tokens_truncation_and_padding(byte_fallback):
    ids = byte_fallback.encode("ab " * 20)
    assert ids[0] == 0
    assert byte_fallback.encode("ab " * 20, add_special_tokens=False) == ids[1:]
    assert len(ids) > 50  # the file's own truncation to 3 and padding to 50 are off


def test_vocab_size_counts_up_to_the_largest_id(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.from_folder(folder).vocab_size == 1000


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_stream_gives_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(TEXT)
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == TEXT
    assert all(len(piece) == 1 for piece in streamed)  # a token is at most a character here, and none is held back
    assert "\ufffd" not in "".join(streamed)


def test_stream_and_special_tokens(byte_level):
    ids = [BOS, *b"a", 258, *"é".encode(), EOS]
    assert pieces(byte_level, ids) == ["a", "é"]
    assert pieces(byte_level, ids, skip_special_tokens=False) == ["<s>", "a", "<|im_start|>", "é", "</s>"]


def test_stream_holds_an_incomplete_character_until_it_is_decided(byte_level):
    stream = byte_level.decode_stream()
    assert [stream.step(byte) for byte in "👍".encode()] == [None, None, None, "👍"]
    assert [stream.step(byte) for byte in b"\xe2\x82x"] == [None, None, "\ufffdx"]
    assert stream.step(0xFF) is None


def test_stream_passes_over_ids_without_a_token(byte_level):
    assert pieces(byte_level, [ord("a"), 271, ord("b")]) == ["a", "b"]  # models pad their vocabulary


def test_stream_of_random_bytes_is_the_text(byte_level):
    random_ = random.Random(0)
    for _ in range(2000):
        ids = [random_.choice([random_.randrange(260), *"é👍".encode()]) for _ in range(random_.randint(1, 20))]
        streamed, text = "".join(pieces(byte_level, ids)), byte_level.decode(ids)
        assert text.startswith(streamed)
        assert text[len(streamed) :].strip("\ufffd") == ""


def test_stream_of_random_byte_fallback_never_fails(byte_fallback):
    """tokenizers' own DecodeStream raises on some of these: an invalid byte changes how valid ones before it decode."""
    random_ = random.Random(0)
    for _ in range(2000):
        ids = [random_.randrange(byte_fallback.vocab_size) for _ in range(random_.randint(1, 20))]
        assert "".join(pieces(byte_fallback, [*ids, 258])).endswith("a")
    assert pieces(byte_fallback, [258, 1 + 0x42, 1 + 0xFF, 258]) == ["a", "B", "\ufffda"]


def test_stream_takes_constant_time_a_token(byte_level):
    stream = byte_level.decode_stream()
    for id_ in [BOS, ord("x")] * 20_000:  # would take minutes if what is skipped or shown were decoded again and again
        stream.step(id_)
    assert stream.step(ord("y")) == "y"


@pytest.mark.parametrize("ids", [[-1], [260], [2**40], ["1"], [1.0], [None]])
def test_ids_outside_the_vocabulary_are_refused(byte_level, ids):
    with pytest.raises(InvalidArgument, match="from 0 to 259"):
        byte_level.decode([1, *ids])


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", None, 3, b"bytes", ["a"]])
def test_text_that_is_none_is_refused(byte_level, text):
    with pytest.raises(InvalidArgument):
        byte_level.encode(text)


def test_chat(folder):
    tokenizer = with_template(folder, CHATML)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Café?"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCafé?<|im_end|>\n"
    assert tokenizer.chat_template == CHATML
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == text
    assert tokenizer.render_chat(messages) == f"{text}<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(messages)
    assert ids[0] == 258
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{text}<|im_start|>assistant\n"


def test_chat_has_one_bos(byte_fallback, tmp_path):
    tokenizer = with_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token="<s>")
    assert tokenizer.encode("ab")[0] == 0
    assert tokenizer.encode_chat(HELLO).count(0) == 1


def test_template_from_list_or_file(folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    assert with_template(folder, named).render_chat(HELLO) == "chat"
    assert with_template(folder, named[:1]).chat_template is None
    (folder / "chat_template.jinja").write_text("file wins: é", encoding="utf-8")
    assert with_template(folder, named).render_chat(HELLO) == "file wins: é"


def test_special_tokens_reach_the_template(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<other>", "unk_token": "<unk>"}))
    tokenizer = with_template(
        folder, "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}|", bos_token={"content": "<s>"}, eos_token="</s>"
    )
    assert tokenizer.render_chat(HELLO) == "<s></s><unk>|"


TEMPLATES = {
    "tojson escapes nothing": ("{{ {'é': '<&>'} | tojson }}", '{"é": "<&>"}'),
    "tojson indents": ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    "blocks are trimmed": ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    "generation is its contents": ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!", "Hello!"),
    "loops can break": ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "tools is none": ("{{ tools is none }}{{ add_generation_prompt }}", "TrueTrue"),
    "the date": ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    "namespace": ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_hugging_face(folder, name):
    template, text = TEMPLATES[name]
    assert with_template(folder, template).render_chat(HELLO) == text


FAILING = {
    "its own refusal": ("{{ raise_exception('Roles must\n alternate!') }}", "Roles must alternate"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "unknown tag": ("{% nonsense %}", "TemplateSyntaxError"),
    "open generation": ("{% generation %}x", "TemplateSyntaxError"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "escape": ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    "change": ("{{ messages.append(1) }}", "SecurityError"),
    "endless": ("{% for i in range(10**12) %}{% endfor %}", "OverflowError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_failing_template_is_one_line(folder, name):
    template, word = FAILING[name]
    tokenizer = with_template(folder, template)
    with pytest.raises(InvalidArgument, match=word) as caught:
        tokenizer.render_chat(HELLO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [None, "Hello", [], {}, ["Hello"], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]]
    + [[{"role": "user", "content": content}] for content in (None, 3, ["x"])],
)
def test_malformed_messages_are_refused(folder, messages):
    tokenizer = with_template(folder, CHATML)
    with pytest.raises(InvalidArgument, match="Give"):
        tokenizer.render_chat(messages)


def test_lone_surrogate_in_a_message_is_refused(folder):
    with pytest.raises(InvalidArgument, match="surrogate"):
        with_template(folder, CHATML).encode_chat([{"role": "user", "content": "\ud800"}])


def test_no_template(byte_level):
    assert byte_level.chat_template is None
    with pytest.raises(InvalidArgument, match="no chat template"):
        byte_level.encode_chat(HELLO)


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_tokenizer(tmp_path):
    refused(tmp_path / "nowhere", "not a folder")
    refused(tmp_path, "no tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    refused(tmp_path, "tokenizer.model", "save_pretrained")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path, str(tmp_path / "tokenizer.json"), "Download")


def test_tokenizer_that_makes_the_library_panic(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AQ=="}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(folder, "tokenizer.json", "precompiled_charsmap")


def test_text_that_the_vocabulary_lacks(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("known") == [0]
    with pytest.raises(InvalidArgument, match="cannot encode"):
        tokenizer.encode("unknown")


def test_mutated_tokenizer_raises_or_loads(folder):
    path = folder / "tokenizer.json"
    original, random_ = path.read_bytes(), random.Random(0)
    loaded, messages = 0, set()
    for _ in range(300):
        data = bytearray(original)
        for _ in range(random_.randint(1, 3)):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        path.write_bytes(data[: random_.choice([len(data), len(data), random_.randrange(len(data))])])
        try:
            Tokenizer.from_folder(folder).decode_stream().step(65)
            loaded += 1
        except CheckpointError as error:
            messages.add(str(error))
    assert loaded > 0
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("template", [3, {"default": "x"}, True])
def test_template_of_a_wrong_type(folder, template):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    refused(folder, "tokenizer_config.json", "chat_template")


def test_broken_companions(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    refused(folder, "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text("{")
    refused(folder, "tokenizer_config.json", "JSON")


def test_the_bytes_of_tokens_are_those_of_the_text():
    tokenizer = Tokenizer.from_folder(reference.smollm2_folder())
    text = "Straße 42: naïve 🐱‍👤, 日本語\n\tfin"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(1) == b"<|im_start|>"
    assert tokenizer.token_bytes(10**6) == b""
