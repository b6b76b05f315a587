"""Streamed text: whole characters, whole emoji, stop strings found across tokens and never shown in part."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cupaged.engine.detokenizer import Detokenizer


class Pieces:
    """A tokenizer whose token i is the i-th of the given strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode_stream(self, skip_special_tokens):
        return self

    def step(self, token_id):
        return self.pieces[token_id] or None


def stream(pieces, stop=()):
    """All deltas, the stop string met, and the final text."""
    detokenizer = Detokenizer(Pieces(pieces), tuple(stop), True)
    deltas, shown, hit = [], 0, None
    for token_id in range(len(pieces)):
        hit = detokenizer.append(token_id)
        deltas.append(detokenizer.text[shown:])
        shown = len(detokenizer.text)
        if hit is not None:
            break
    else:
        detokenizer.finish()
        deltas.append(detokenizer.text[shown:])
    return deltas, hit, detokenizer.text


def test_a_stop_string_across_tokens_is_cut_and_never_shown():
    deltas, hit, text = stream(["Hello ", "<", "/s", ">", " more"], ["</s>"])
    assert (hit, text) == ("</s>", "Hello ")
    assert "".join(deltas) == "Hello "


def test_what_only_began_like_a_stop_string_is_shown_in_the_end():
    _, hit, text = stream(["a<", "/b", "<"], ["</s>"])
    assert hit is None
    assert text == "a</b<"


def test_the_earliest_of_several_stop_strings_wins():
    assert stream(["one two three"], ["three", "two"])[1:] == ("two", "one ")


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_text_is_all_before_the_first_stop_string(pieces, stop):
    deltas, hit, text = stream(pieces, stop)
    whole = "".join(pieces)
    assert "".join(deltas) == text
    assert not any(s in text for s in stop)
    if hit is None:
        assert text == whole
    else:
        assert whole.startswith(text + hit)


@pytest.mark.parametrize(
    "emoji",
    ["👍🏽", "👨‍👩‍👧", "❤️", "🇫🇷", "🏴‍☠️", "🙂", "👩🏽‍🚀", "1️⃣", "#️⃣", "↔️", "ℹ️", "‼️", "〰️", "🙂‍↔️", "❤️‍🔥", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"],
)
def test_an_emoji_of_several_characters_is_shown_whole(emoji):
    deltas, _, text = stream(["x", *emoji, "y", *emoji])
    assert text == f"x{emoji}y{emoji}"
    assert all(delta in ("", "x", emoji, emoji + "y", "y") for delta in deltas)


def test_a_row_of_flags_is_shown_flag_by_flag():
    deltas, _, text = stream(list("🇫🇷🇩🇪🇯🇵"))
    assert text == "🇫🇷🇩🇪🇯🇵"
    assert all(len(delta) in (0, 2, 4) for delta in deltas)


def test_plain_text_is_not_held_back():
    deltas, _, _ = stream(["Hello", ", ", "wörld", "。", "你好"])
    assert deltas == ["Hello", ", ", "wörld", "。", "你好", ""]


def test_a_digit_waits_for_one_token_because_a_keycap_may_follow():
    deltas, _, text = stream(["in 20", "24", ", yes"])
    assert deltas == ["in 2", "02", "4, yes", ""]
    assert text == "in 2024, yes"
