"""From token ids to text, piece by piece: no broken characters, no half-shown stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a tokenizer shows for bytes that are not a whole character yet."""


class IncrementalText:
    """Turns a growing list of token ids into pieces of text whose concatenation is the whole text.

    A token's text can depend on its neighbours (a leading space is dropped at the start of a decode,
    a character can span tokens), so each piece is the difference of two decodes that share a prefix:
    the tokens of the previous piece. A piece that ends in a broken character waits for the next token.

    Parameters
    ----------
    decode : callable from a list of ids to text (special tokens left out)

    Example
    -------
    >>> text = IncrementalText(lambda ids: bytes(ids).decode("utf-8", "replace"))
    >>> [text.push(b) for b in "né".encode()], text.flush()
    (['n', '', 'é'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0
        self._context = 0

    def push(self, token_id: int) -> str:
        """Add one token and return the text that became certain, possibly empty."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """Return the text still held back; call once, after the last token."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self._shown == len(self._ids):
            return ""
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if (now.endswith(BROKEN) and not final) or len(now) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Finds stop strings in a stream of text pieces and never lets a part of one through.

    The longest suffix that could still become a stop string is held back until the next piece
    decides. Of several stop strings the one that is complete first counts (of two that end together the
    longer), so the result does not depend on where token boundaries fall.

    Example
    -------
    >>> stop = StopStrings(["END"])
    >>> stop.push("the E"), stop.push("N"), stop.push("Dless"), stop.found
    ('the ', '', '', 'END')
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not s for s in stops):
            raise ValueError("stop strings must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text, or None."""

    def push(self, piece: str) -> str:
        """Add a piece of text and return what may be shown."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = self._suffix_that_may_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text still held back; call once, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _suffix_that_may_stop(self, text: str) -> int:
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
