"""Streaming text: nothing broken, nothing lost, no part of a stop string shown."""

from __future__ import annotations

import random

import pytest

from daco_rt.runtime.text import IncrementalText, StopStrings

WORDS = "plain ascii, naïve café, 日本語のテキスト, emoji 🙂🙃👩‍🚀, and back"


def _bytes_decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def test_bytes_of_every_script_stream_whole() -> None:
    text = IncrementalText(_bytes_decode)
    pieces = [text.push(b) for b in WORDS.encode()]
    assert all("\ufffd" not in p for p in pieces)
    assert "".join(pieces) + text.flush() == WORDS


def test_an_answer_that_ends_inside_a_character_keeps_its_broken_end() -> None:
    text = IncrementalText(_bytes_decode)
    ids = "ab🙂".encode()[:-1]
    pieces = [text.push(b) for b in ids]
    assert "".join(pieces) == "ab"
    assert "".join(pieces) + text.flush() == _bytes_decode(list(ids))


def test_a_decoder_that_drops_the_leading_space() -> None:
    words = ["▁the", "▁cat", "s", "▁sat"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    text = IncrementalText(decode)
    assert [text.push(i) for i in range(4)] == ["the", " cat", "s", " sat"]


def test_special_tokens_without_text_do_not_disturb() -> None:
    table = {0: "a", 1: "", 2: " b"}
    text = IncrementalText(lambda ids: "".join(table[i] for i in ids))
    assert "".join(text.push(i) for i in [1, 0, 1, 1, 2, 1]) + text.flush() == "a b"


def _reference(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def test_stop_strings_in_random_pieces() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 14)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))
        ]
        stop, shown, at = StopStrings(stops), "", 0
        while at < len(text) and stop.found is None:
            n = rng.randint(1, 3)
            shown += stop.push(text[at : at + n])
            at += n
            assert _reference(text, stops).startswith(shown)
        shown += stop.flush()
        assert shown == _reference(text, stops), (text, stops)
        assert (stop.found is not None) == any(s in text for s in stops)


def test_text_that_cannot_stop_is_not_held_back() -> None:
    stop = StopStrings(["\n\nUser:"])
    assert stop.push("Hello") == "Hello"
    assert stop.push("\n\nUs") == ""
    assert stop.push("ed") == "\n\nUsed"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
