"""tokenizer.json and its companions: text <-> token ids, and conversations -> prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from operator import index
from pathlib import Path

import tokenizers
import tokenizers.models

from cupaged.checkpoint.chat_template import find_chat_template, render
from cupaged.checkpoint.config import read_json
from cupaged.errors import CheckpointError, CupagedError, InvalidArgument

_INCOMPLETE = "\ufffd"  # what bytes that do not (yet) make a character decode to

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level vocabularies write a byte as a letter: a printable one as itself, the others as those from U+0100 on.
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)).difference(_PRINTABLE)))
}


class Tokenizer:
    """The tokenizer of a model.

    Attributes:
        vocab_size: ids lie in [0, vocab_size), added tokens included. A model's own vocabulary may be larger (padding).
        chat_template: the Jinja source, or None for a model without one.
    """

    vocab_size: int
    chat_template: str | None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises:
            CheckpointError: tokenizer.json is missing, or one of the files is broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise _no_tokenizer(folder)
        with _failing_as(CheckpointError, f"{path} is not a valid tokenizer", "Download the file again"):
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        companions = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
        settings = [read_json(companion) if companion.exists() else {} for companion in companions]
        special = {}
        for values in reversed(settings):  # tokenizer_config.json wins
            special.update(_special_tokens(values))
        return cls(tokenizer, find_chat_template(folder, settings[0]), special)

    @classmethod
    def without_text(cls) -> Tokenizer:
        """For a model without a tokenizer: no token has a text, and no text has tokens."""
        return cls(tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="")), None, {})

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: str | None, special_tokens: dict[str, str]) -> None:
        # Files may carry the truncation and padding of some training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._special_ids = frozenset(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        # One more than the largest id: the count of tokens is smaller where ids have gaps.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens`: with the BOS and the like that the model wants around a raw prompt."""
        if not self.vocab_size:
            raise InvalidArgument("The model has no tokenizer. Give token ids, or name a folder with one.")
        if not isinstance(text, str):
            raise InvalidArgument(f"A text is expected, not {type(text).__name__}. Give a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"The text holds a lone surrogate at character {error.start}. Give text that can be written as UTF-8."
            ) from error
        with _failing_as(InvalidArgument, "The tokenizer cannot encode the text", "Change the text or check tokenizer.json"):
            # As a batch of one: `encode` holds Python's lock, which for a text of megabytes stops all other threads.
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoding.ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        for id_ in ids:
            try:
                inside = 0 <= index(id_) < self.vocab_size
            except TypeError:
                inside = False
            if not inside:
                raise InvalidArgument(
                    f"The token id {id_!r} is not in the vocabulary. Give integers from 0 to {self.vocab_size - 1}."
                )
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_token(self, id_: int) -> str:
        """The text of one token by itself, special ones by their names; "" for ids of a padded vocabulary."""
        return self._tokenizer.decode([id_], skip_special_tokens=False) if id_ < self.vocab_size else ""

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that one token stands for, special ones for their names: parts of a character too, which have no text."""
        token = self._tokenizer.id_to_token(id_) if id_ < self.vocab_size else None
        if token is None:
            return b""
        if id_ not in self._added_ids:
            if self._is_byte_level and all(letter in _BYTE_OF_LETTER for letter in token):
                return bytes(_BYTE_OF_LETTER[letter] for letter in token)
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
                return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()  # as SentencePiece writes a blank

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.to_json())["decoder"])

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder for ids that arrive one by one."""
        return DecodeStream(self._tokenizer, self._special_ids if skip_special_tokens else frozenset())

    def to_json(self) -> str:
        """What tokenizer.json says, for libraries that read it too."""
        return self._tokenizer.to_str()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact name; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The prompt that the chat template makes of [{"role": ..., "content": ...}, ...].

        Raises:
            InvalidArgument: there is no template, it refuses the messages, or it fails.
        """
        if self.chat_template is None:
            raise InvalidArgument("The model has no chat template. Send a raw prompt, or choose an instruction-tuned model.")
        return render(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **self._special_tokens)

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Token ids of the rendered chat, ready to be answered. The template has written the BOS, so none is added."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


class DecodeStream:
    """Text of ids that arrive one by one, in whole characters.

    tokenizers.decoders.DecodeStream would serve but for vocabularies with byte fallback (Llama 2, Mistral): an invalid byte
    after a valid one changes how the run of bytes before it decodes, on which 0.23 raises "Invalid prefix encountered".
    Here the text shown is never taken back, and what follows is counted from its length.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []  # the tokens of the piece before (a decoder may strip the space of the very first) and since
        self._num_before = 0  # how many of them belong to the piece before
        self._num_shown = 0  # characters of their text that were returned

    def step(self, token_id: int) -> str | None:
        """The text that this token completes; None if it completes no character.

        An id without a token (the model's vocabulary may be larger than the tokenizer's) has no text.
        """
        if token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None:
            return None
        self._ids.append(token_id)
        text = self._decode()
        whole = text.rstrip(_INCOMPLETE)
        piece = whole[self._num_shown :]
        if not piece:
            return None
        self._num_shown = len(whole)
        if whole == text:
            self._ids = self._ids[self._num_before :]
            self._num_before = len(self._ids)
            self._num_shown = len(self._decode())
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)


@contextmanager
def _failing_as(kind: type[CupagedError], cause: str, remedy: str) -> Iterator[None]:
    """Turn what the tokenizers library raises, bare Exception and on some broken files a panic (a BaseException), into ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise kind(f"{cause}: {' '.join(str(error).split())}. {remedy}.") from error


def _special_tokens(values: dict) -> dict[str, str]:
    """bos_token, eos_token, ...: each a string or {"content": string}; others are left out."""
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in contents.items() if key.endswith("_token") and isinstance(value, str)}


def _no_tokenizer(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is not a folder. Give the folder of a model in Hugging Face format.")
    other = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (folder / name).exists()]
    if other:
        return CheckpointError(
            f"{folder} holds {other[0]}, but no tokenizer.json. "
            "Write one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return CheckpointError(f"{folder} holds no tokenizer.json. Download it from where the model comes from.")
