"""Token ids -> text as it grows: whole characters, whole emoji, and never a piece of a stop string."""

from __future__ import annotations

import unicodedata

from cupaged.checkpoint.tokenizer import Tokenizer

_ZERO_WIDTH_JOINER = "\u200d"
_EXTENDING = ("Mn", "Me", "Cf", "Sk")  # Unicode categories of what may follow the first character of an emoji
_BASES = ("So", "Sm", "Cn")  # and of that first character; Cn: newer than this Python
_OTHER_BASES = "\u203c\u2049\u2139\u3030\u303d"  # emoji among punctuation and letters
_KEYCAPS = "0123456789#*"


class Detokenizer:
    """Incremental text of one completion.

    Args:
        tokenizer: the model's.
        stop: strings that end the text; the first to occur is found by `append` and cut off.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], skip_special_tokens: bool) -> None:
        self._stream = tokenizer.decode_stream(skip_special_tokens)
        self._stop = stop
        self._held = ""  # decoded, but it may yet turn into a stop string or a longer emoji
        self.text = ""  # safe to show

    def append(self, token_id: int, may_stop: bool = True) -> str | None:
        """Take the next token; the stop string if it completes one. Without `may_stop` all is text, stop strings too."""
        text = self._held + (self._stream.step(token_id) or "")
        stops = self._stop if may_stop else ()
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            end, stop = min(found, key=lambda hit: hit[0])
            self.text += text[:end]
            self._held = ""
            return stop
        safe = len(text) - max(_stop_overlap(text, stops), _open_cluster(text))
        self.text += text[:safe]
        self._held = text[safe:]
        return None

    def finish(self) -> None:
        """No more tokens: what was held back is text. Bytes of a character that was never completed are dropped."""
        self.text += self._held
        self._held = ""


def _stop_overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    return max(
        (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
        default=0,
    )


def _open_cluster(text: str) -> int:
    """Length of the emoji or symbol at the end of `text` that the next character may still extend; 0 for ordinary text.

    A shown emoji can be several characters: selectors, modifiers and tags follow its first one, joiners bind it to the next,
    flags are pairs, and keycaps begin with a plain digit (Unicode Technical Standard 51, section 1.4).
    """
    start = len(text)
    while True:
        first = start
        while first and text[first - 1] > "\x7f" and unicodedata.category(text[first - 1]) in _EXTENDING:
            first -= 1
        if not first or not _begins_emoji(text[first - 1]):
            return len(text) - start
        start = first - 1
        if _second_of_flag(text, start):
            start -= 1
        if not start or text[start - 1] != _ZERO_WIDTH_JOINER:
            return len(text) - start


def _begins_emoji(character: str) -> bool:
    if character <= "\x7f":
        return character in _KEYCAPS
    return character in _OTHER_BASES or unicodedata.category(character) in _BASES


def _second_of_flag(text: str, index: int) -> bool:
    """Whether the regional indicator at `index` completes a pair."""
    run = index
    while run >= 0 and "\U0001f1e6" <= text[run] <= "\U0001f1ff":
        run -= 1
    return (index - run) % 2 == 0 and index > run
